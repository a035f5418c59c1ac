"""The JSON record of a run, runs/NAME.json: read with every check, written atomically.

history = read_history("runs/row4.json")
write_history("runs/row4.json", history)
"""

import json
import os
from pathlib import Path

# Options that do not change what a run computes: they may differ when it is resumed.
NOT_HYPERPARAMETERS = set("data_dir name out device mix compile resume overwrite reported".split())

# Options that older histories lack, and what they then meant.
ADDED = {
    "norm": "none", "downsample": False, "residual": False, "bias_decay": True, "nesterov": False,
    "label_smoothing": 0.0, "ema": None,
}  # fmt: skip

EPOCH_FIGURES = ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds")


def read_history(path):
    """The history in a file, as a dict. OSError or ValueError say what is wrong with the file."""
    try:
        history = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    problem = _problem(history)
    if problem:
        raise ValueError(f"{path} is not a history that train.py wrote: {problem}")
    return history


def _refuse(constant):
    raise ValueError(f"{constant} is none of its values")


def _problem(history):
    """What keeps a parsed file from being a history, in a few words; None where nothing does."""
    if not isinstance(history, dict):
        return "it is not an object"
    kinds = {"name": str, "config": dict, "epochs": list, "batch_losses": list, "finished": bool}
    for key, kind in kinds.items():
        if not isinstance(history.get(key), kind):
            return f"{key!r} is missing or no {kind.__name__}"
    for number, epoch in enumerate(history["epochs"], start=1):
        for figure in EPOCH_FIGURES:
            if not isinstance(epoch, dict) or not _is_number(epoch.get(figure)):
                return f"epoch {number} has no number {figure!r}"
    if not all(map(_is_number, history["batch_losses"])):
        return "'batch_losses' holds something that is not a number"
    return None


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def hyperparameters(config):
    """Those options of a history's config that decide what the run computes."""
    config = config | {name: value for name, value in ADDED.items() if name not in config}
    return {name: value for name, value in config.items() if name not in NOT_HYPERPARAMETERS}


def write_history(path, history):
    """Write a history as strict JSON: ValueError if it holds NaN, OSError as the disk says."""
    write_text(path, json.dumps(history, indent=1, allow_nan=False) + "\n")


def write_text(path, text):
    """Write a text file as write_atomically does."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path, write):
    """Let write(file) fill a file beside `path`, then rename it: readers see the old or the new.

    OSError leaves what was at `path` in place.
    """
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
