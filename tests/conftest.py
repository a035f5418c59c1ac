"""What all tests share: shapes drawn once, small runs in a temporary folder, no network."""

import functools
import signal
from pathlib import Path

import pytest
import torchvision

import data
import train
from history import read_history
from options import parse_args

# The smallest run that goes through everything: 2 epochs of 4 batches, the last one smaller.
TINY = "--dataset shapes --arch 4 8 --k 2 --hidden 8 --limit 100 --batch-size 32 --epochs 2".split()
# All that goes beyond the report, at once; the second block keeps its width.
RECIPE = (
    "--arch 8 8 12 --norm batch --downsample --residual --augment cutout --label-smoothing 0.1 "
    "--schedule onecycle --optimizer sgd --lr 0.1 --momentum 0.9 --nesterov --weight-decay 5e-4 "
    "--no-bias-decay --ema 0.9"
).split()
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
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path):
    """run(option, ...): a tiny run named "run" in tmp_path, changed by options; its history."""

    def run_tiny(*options):
        arguments = [*TINY, "--out", str(tmp_path), "--name", "run", *options]
        train.main(arguments)
        return read_history(parse_args("", arguments).out / "run.json")

    return run_tiny


def without_times(history):
    """A history less what differs between two equal runs: names, places and times."""
    epochs = [
        {key: value for key, value in epoch.items() if "second" not in key}
        for epoch in history["epochs"]
    ]
    kept = ("parameters", "macs", "batch_losses", "finished")
    return {key: history[key] for key in kept} | {"epochs": epochs}
