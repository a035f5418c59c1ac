"""What all tests share: shapes drawn once, small runs in a temporary folder, no network."""

import contextlib
import copy
import functools
import os
import signal
import subprocess
from itertools import count
from pathlib import Path
from unittest.mock import Mock, patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch: the other core has tests, too

import pytest
from torch.nn.modules.module import register_module_forward_pre_hook

import data
import evaluate
import train
from checkpoint import load_checkpoint
from history import read_history
from model import Backbone

ROOT = Path(__file__).parent.parent
CIFAR10 = ROOT / "data"
# The smallest run that goes through everything: 2 epochs of 4 batches, the last one smaller.
TINY = (
    "--dataset shapes --arch 4 8 --k 2 --hidden 8 --limit 100 --batch-size 32 --epochs 2 "
    "--precision float32"
).split()
# All that goes beyond the report, at once.
RECIPE = (
    "--arch 8 8 12 --norm batch --downsample 3 --pool max --logit-scale 0.5 "
    "--init dirac --whiten --augment crop flip --label-smoothing 0.1 --schedule onecycle "
    "--optimizer sgd --lr 0.1 --momentum 0.9 --nesterov --weight-decay 5e-4"
).split()

data.draw_shapes = functools.cache(data.draw_shapes)  # once for all tests

needs_cifar10 = pytest.mark.skipif(
    not (CIFAR10 / "cifar-10-batches-py").is_dir(), reason=f"there is no CIFAR-10 in {CIFAR10}"
)


@pytest.fixture(autouse=True, scope="session")
def no_download():
    refuse = Mock(side_effect=OSError("no network in tests"))
    with patch("torchvision.datasets.cifar.download_and_extract_archive", refuse):
        yield


def execute(*command, **environment):
    """Run a command in the folder of the scripts; its result, with what it printed."""
    options = {"cwd": ROOT, "env": os.environ | environment, "timeout": 120}
    return subprocess.run(command, capture_output=True, text=True, **options)


def ended(function, *arguments):
    """Call what ends the process; its exit code, or the line that it leaves with exit code 1."""
    with pytest.raises(SystemExit) as stopped:
        function(*arguments)
    return stopped.value.code


@pytest.fixture
def refused(capsys):
    """refused(function, argument, ..., code=1): its one line on stderr as it exits with that."""

    def call(function, *arguments, code=1):
        capsys.readouterr()
        result, err = ended(function, *arguments), capsys.readouterr().err
        if isinstance(result, str):  # what Python prints itself as it exits with 1
            result, err = 1, err + result
        (line,) = (line for line in err.splitlines() if not line.startswith((" ", "usage:")))
        assert result == code
        return line

    return call


@pytest.fixture
def run(tmp_path):
    """run("--k 3 --fc 1", ...): a tiny run in tmp_path, changed by options; its history."""

    def run_tiny(*options, out=tmp_path):
        words = [word for option in options for word in option.split()]
        train.main([*TINY, "--name", "run", "--out", str(out), *words])
        return read_history(out / "run.json")

    return run_tiny


@contextlib.contextmanager
def at_batch(number, act):
    """Call act() as a network gets its batch of that number, of training and validation."""
    numbers = count(1)

    def look(module, inputs):
        if isinstance(module, Backbone) and next(numbers) == number:
            act()

    hook = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


@pytest.fixture
def stop(run):
    """stop(batches, options, ...): `run`, a signal within its batch of that number, and its exit
    code."""

    def run_and_stop(batches, *options):
        with at_batch(batches, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            return ended(run, *options)

    return run_and_stop


def evaluate_in(folder, *options):
    evaluate.main([str(folder / "run.pt"), *options])
    return read_history(folder / "run.json")["test"]


def weights(folder):
    return load_checkpoint(folder / "run.pt")["weights"]


def files(folder):
    """The content of every file below a folder, by name, but for the locks of runs."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def without_times(history):
    """A history less what differs between two equal runs: names, places and times."""
    epochs = [{key: e[key] for key in e if "second" not in key} for e in history["epochs"]]
    kept = ("parameters", "macs", "batch_losses", "finished")
    return {key: history[key] for key in kept} | {"epochs": epochs}


def ending(folder):
    """What the run in a folder ended with, but for times: its history and all its weights."""
    values = {name: tensor.tolist() for name, tensor in weights(folder).items()}
    return without_times(read_history(folder / "run.json")) | {"weights": values}


@pytest.fixture
def history():
    """A finished run of three epochs."""
    return {
        "name": "row4",
        "reported": [61.0],
        "parameters": 8360,
        "finished": True,
        "config": {"arch": [16, 8, 4], "k": 3, "fc": 1, "seed": 0, "epochs": 3, "gate": "softmax"},
        "epochs": [
            {
                "epoch": number,
                "lr": 0.001,
                "seconds": 2.0,
                "images_per_second": 1000.0,
                "train_loss": 2 / number,
                "train_accuracy": 20.0 * number,
                "val_loss": 2.1 / number,
                "val_accuracy": 15.0 * number,
            }
            for number in (1, 2, 3)
        ],
        "batch_losses": [2.3, 2.0, 1.5, 1.2],
    }


def changed(history, name, accuracy=None, **config):
    """A copy of a history under another name, with another last accuracy and other options."""
    other = copy.deepcopy(history) | {"name": name}
    other["config"] |= config
    if accuracy is not None:
        other["epochs"][-1]["val_accuracy"] = accuracy
    return other
