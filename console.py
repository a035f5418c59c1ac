"""What a run says of itself: its environment and costs, a line per epoch, progress."""

import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision

from device import autocast, describe, precision_on
from model import costs

HEADER = "  epoch        lr  train loss  acc. %    val loss  acc. %     time  images/s"


def environment(model, device, precision):
    """What a run is made with, as its history keeps it."""
    described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(described, capture_output=True, text=True).stdout.strip()
    with autocast(device, precision):
        mix = [block.mix_on(device) for block in model.backbone.blocks().values()]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": describe(device),
        "precision": precision_on(device, precision),
        "mix": mix,
        "commit": commit or None,
    }


def summary(model, environment):
    """A table of what each part of the network costs, and what it runs on."""
    lines = ["              parameters   MACs/image, k convolutions   with mixed kernels   runs as"]
    mixes = [*environment["mix"], "", ""]
    for (name, parameters, textbook, mixed), mix in zip(costs(model), mixes):
        line = f"{name:<10} {parameters:>13,} {textbook:>28,} {mixed:>20,}   {mix}"
        lines.append(line.rstrip())
    return "\n".join([*lines, f"on {environment['device']}, {environment['precision']}"])


def epoch_line(epoch, epochs):
    """An epoch of the history as a line under HEADER."""
    return (
        f"{epoch['epoch']:>3}/{epochs:<3} {epoch['lr']:>9.6f}"
        f"  {epoch['train_loss']:>10.4f}  {epoch['train_accuracy']:>6.2f}"
        f"  {epoch['val_loss']:>10.4f}  {epoch['val_accuracy']:>6.2f}"
        f"  {duration(epoch['seconds']):>7}  {epoch['images_per_second']:>8,.0f}"
    )


def duration(seconds):
    """Seconds as 4.2s, 3m20s or 2h05m."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}h{minutes:02}m"
        if hours
        else f"{minutes}m{seconds:02}s"
        if minutes
        else f"{seconds}s"
    )


class Progress:
    """One line on the terminal, rewritten; nothing at all where stderr is a log or a pipe.

    Progress is counted in epochs, the current one in part: `start` is where this process began,
    `end` the whole run.
    """

    def __init__(self, start, end, images_per_epoch):
        self.start, self.end, self.images_per_epoch = start, end, images_per_epoch
        self.began = self.shown = time.monotonic()

    def show(self, done, step, steps):
        """Show how far the epoch is, how fast it goes and how long the whole run still takes."""
        now = time.monotonic()
        if now - self.shown > 0.1 and sys.stderr.isatty():
            self.shown = now
            speed = (done - self.start) / (now - self.began)  # epochs per second
            left = duration((self.end - done) / speed) if speed else "?"
            rate = f"{self.images_per_epoch * speed:,.0f} images/s"
            line = f"{int(done) + 1:>3}/{self.end}  batch {step}/{steps}  {rate}  {left} left"
            print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)

    def clear(self):
        """Make room for a line that stays."""
        if sys.stderr.isatty():
            print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)
