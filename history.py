"""The JSON record of a run, runs/NAME.json: what it holds, read and written.

    history = read_history("runs/row4.json")
    write_history("runs/row4.json", history)

And what all scripts share of paths, files and output. This file needs no PyTorch, so that plot.py
starts fast.
"""

import argparse
import contextlib
import errno
import glob
import json
import math
import os
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there, two runs of one name are not kept apart
    fcntl = None

METRICS = "train_loss train_accuracy val_loss val_accuracy seconds lr images_per_second".split()
# Options that do not change what a run computes: they may differ when it is resumed.
NOT_HYPERPARAMETERS = set("data_dir name out device mix compile resume overwrite reported".split())
# Options that some histories do not know, since they came later, or train.py no longer knows, and
# the values with which they do nothing: as a run trains that does not know them.
NEUTRAL = {
    "bias_decay": [True],
    "bias_lr": [None],
    "downsample": [[], False],
    "ema": [None],
    "logit_scale": [1.0],
    "residual": [False],
    "whiten": [False],
}


def read_history(path):
    """Return the history in a file, a dict. OSError or ValueError say what is wrong with it."""
    text = Path(path).read_bytes()
    try:
        return parse_history(text)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a history that train.py wrote ({reason})") from error


def parse_history(text):
    """Return the history in a JSON text, a dict. Exceptions of any kind say what is wrong with it:
    JSON can hold anything."""
    history = json.loads(text, parse_constant=int)  # int refuses "NaN" and "Infinity"
    numbers = [history["parameters"], history["config"].get("seed", 0)]
    numbers += history["reported"] + history["batch_losses"]
    for epoch in [] + history["epochs"]:  # a list, no dict
        numbers += [epoch[name] for name in METRICS] + list(epoch.values())
    numbers += [history["test"]["accuracy"]] if "test" in history else []
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a number is infinite")
    history["name"].encode(errors="replace"), history["finished"]  # are there
    return history


def write_history(path, history):
    """Write a history as strict JSON, an epoch a line: ValueError if it holds NaN, OSError if the
    disk refuses."""

    def dump(value):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(f"  {dump(entry)}" for entry in value) + "\n ]"
        return json.dumps(value, allow_nan=False)

    lines = ",\n".join(f" {dump(key)}: {dump(value)}" for key, value in history.items())
    write_atomically(path, lambda file: file.write(f"{{\n{lines}\n}}\n".encode()))


def write_atomically(path, write, stale=None):
    """Let write(file) fill a file beside `path`, then rename it: readers see the old or the new. A
    file `stale` goes just before that, so that it never lies beside the new. OSError, which names
    `path`, leaves what was there in place."""
    part = Path(f"{path}.{os.getpid()}.part")  # another process may be writing the same file
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            flush_to_disk(file)
        if stale:
            stale.unlink(missing_ok=True)
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a read-only disk, say; the first error counts
            part.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def flush_to_disk(file):
    """Wait until a file is on the disk, where its file system can say so."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise


def lock(file, waiting=None):
    """Keep other processes from locking an open file, until it is closed. If one has it locked,
    BlockingIOError; with `waiting`, a line to print on stderr, wait until it is free."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            raise
        print(waiting, file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:  # some file systems have no locks
        reason = f"{error.strerror}: {file.name} keeps no second process out"
        print(f"warning: {reason}", file=sys.stderr)


def hyperparameters(config):
    """Return those options of a history's config that decide what the run computes, less those that
    do nothing: runs of before and after an option came or went have the same."""
    return {
        name: value
        for name, value in config.items()
        if name not in NOT_HYPERPARAMETERS and value not in NEUTRAL.get(name, [])
    }


def to_path(text):
    """Return the path that an option names; the shell leaves the ~ of --out=~/runs to us."""
    if not text:  # a shell's unset variable, and not the current folder
        raise argparse.ArgumentTypeError("it is empty")
    return Path(os.path.expanduser(text))


def expand_patterns(paths):
    """Return paths with each * and ? expanded that no file is called by: cmd.exe leaves that to
    us. Brackets stand for themselves."""
    return [match for path in paths for match in _matches(path)]


def _matches(path):
    pattern = str(path).replace("[", "[[]")
    found = [] if os.path.exists(path) else sorted(map(Path, glob.glob(pattern)))
    return found or [path]


class _Output:
    """A text stream whose writes never fail: what nobody can read any more is dropped."""

    def __init__(self, stream):
        if hasattr(stream, "reconfigure"):  # a notebook's or IDLE's has no encoding
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:  # a pipe without reader, a closed terminal, a full disk
            self.stream = open(os.devnull, "w", encoding="utf-8", errors="replace")
            return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def harden_output():
    """Let nothing that this process prints end it: its files are what it works for. Characters that
    the output's encoding lacks are escaped, and what nobody can read any more is dropped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is not None:  # so it is where the shell closed it
            setattr(sys, name, _Output(getattr(sys, name)))
