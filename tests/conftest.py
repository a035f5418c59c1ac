"""What all tests share: shapes drawn once, small runs in a temporary folder, no network."""

import copy
import functools
import signal
from pathlib import Path

import pytest
import torchvision

import data
import train
from history import read_history
from run import Run

# The smallest run that goes through everything: 2 epochs of 4 batches, the last one smaller.
TINY = (
    "--dataset shapes --arch 4 8 --k 2 --hidden 8 --limit 100 --batch-size 32 --epochs 2 "
    "--precision float32"
).split()
# All that goes beyond the report, at once; the second block keeps its width.
RECIPE = (
    "--arch 8 8 12 --norm batch --downsample --residual --augment cutout --label-smoothing 0.1 "
    "--schedule onecycle --optimizer sgd --lr 0.1 --momentum 0.9 --nesterov --weight-decay 5e-4 "
    "--no-bias-decay --ema 0.9"
).split()
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
CIFAR10 = Path(__file__).parent.parent / "data"

needs_cifar10 = pytest.mark.skipif(
    not (CIFAR10 / "cifar-10-batches-py").is_dir(), reason=f"there is no CIFAR-10 in {CIFAR10}"
)


@pytest.fixture(autouse=True, scope="session")
def shapes_drawn_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "draw_shapes", functools.cache(data.draw_shapes))
        yield


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    def refuse(self):
        raise OSError("no network in tests")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", refuse)


@pytest.fixture(autouse=True)
def own_signals():
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path):
    """run(option, ...): a tiny run named "run" in tmp_path, changed by options; its history."""

    def run_tiny(*options):
        arguments = [*TINY, "--out", str(tmp_path), "--name", "run", *options]
        train.main(arguments)
        return read_history(train.parse_args(arguments).out / "run.json")

    return run_tiny


def left_in(folder):
    """The names of the files in a folder, but for the locks of runs."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def without_times(history):
    """A history less what differs between two equal runs: names, places and times."""
    epochs = [
        {key: value for key, value in epoch.items() if "second" not in key}
        for epoch in history["epochs"]
    ]
    kept = ("parameters", "macs", "batch_losses", "finished")
    return {key: history[key] for key in kept} | {"epochs": epochs}


@pytest.fixture
def history():
    """A finished run of three epochs."""
    epochs = [
        {
            "epoch": number,
            "lr": 0.001,
            "train_loss": 2 / number,
            "train_accuracy": 20.0 * number,
            "val_loss": 2.1 / number,
            "val_accuracy": 15.0 * number,
            "seconds": 2.0,
            "images_per_second": 1000.0,
        }
        for number in (1, 2, 3)
    ]
    return {
        "name": "row4",
        "config": {"arch": [16, 8, 4], "k": 3, "fc": 1, "seed": 0, "epochs": 3, "gate": "softmax"},
        "reported": 61.0,
        "parameters": 8360,
        "epochs": epochs,
        "batch_losses": [2.3, 2.0, 1.5, 1.2],
        "finished": True,
    }


def changed(history, name, accuracy=None, **config):
    """A copy of a history under another name, with another last accuracy and other options."""
    other = copy.deepcopy(history)
    other["name"] = name
    other["config"] |= config
    if accuracy is not None:
        other["epochs"][-1]["val_accuracy"] = accuracy
    return other


def stop_after(monkeypatch, batches, signal_number=15):
    """Let a signal come when so many batches, of training or validation, are done."""
    save_or_stop, count = Run._save_or_stop, [0]

    def counted(self):
        count[0] += 1
        if count[0] == batches:
            self._on_signal(signal_number, None)
        save_or_stop(self)

    monkeypatch.setattr(Run, "_save_or_stop", counted)
