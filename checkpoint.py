"""Checkpoints, runs/NAME.pt: written whole, read without running anything that is in them.

    model = load_model("runs/row4.pt")       # in evaluation mode, on the CPU

A checkpoint is a dict: `config`, the options of its run; `precision`; `history`, as JSON; `weights`
and, as long as the run can go on, `state`.
"""

import functools
import zipfile
from pathlib import Path

import torch

from data import CLASSES
from device import explain_out_of_memory, first_line
from history import parse_history, write_atomically
from model import DEFAULTS, IMAGE_SIZE, build_model

FORMAT = "gated multi-convolution checkpoint 5"
PARTS = {"config": dict, "precision": str, "history": str, "weights": dict}


def write_checkpoint(path, checkpoint, stale=None):
    """Save a dict of tensors and plain values; a file `stale` then goes. OSError if that fails;
    what was there stays."""
    try:
        save = functools.partial(torch.save, {"format": FORMAT} | checkpoint)
        write_atomically(path, save, stale)
    except RuntimeError as error:  # so torch.save reports a failed write
        raise OSError(f"{path}: {first_line(error.__context__ or error)}") from error


def load_checkpoint(path):
    """Return what a run saved, a dict with `config`, `weights` and the rest. No code in it is
    run, and every part has to match its checksum. OSError or ValueError say what is wrong."""
    path = Path(path)
    path.open("rb").close()  # missing or unreadable is told as that
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():  # PyTorch does not read what is marked as a folder
                if entry.compress_type != zipfile.ZIP_STORED or entry.external_attr:
                    raise ValueError(f"{entry.filename} in it is compressed or a folder")
            if archive.testzip() is not None:
                raise ValueError("it is damaged: a checksum does not match")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"its format is {checkpoint['format']!r}, now it is {FORMAT!r}")
        check_parts(checkpoint)
    except Exception as error:  # a damaged file can make the readers raise nearly anything
        if explain_out_of_memory(error):
            raise
        what = f"{path} is not a whole checkpoint of train.py ({explain(error)})"
        raise ValueError(what) from error
    return checkpoint


def check_parts(checkpoint):
    """An exception, of whatever kind, if a checkpoint lacks what all who load it use."""
    if missing := PARTS.keys() - checkpoint.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    for name, kind in PARTS.items():
        if not isinstance(checkpoint[name], kind):
            raise TypeError(f"its {name} is no {kind.__name__}")
    config = checkpoint["config"]
    if not isinstance(config["data_dir"], str) or not isinstance(config["epochs"], int):
        raise TypeError("its data_dir is no str, or its epochs are no int")
    if not all(map(torch.is_tensor, checkpoint["weights"].values())):
        raise TypeError("its weights are no tensors")
    parse_history(checkpoint["history"])


def load_model(path):
    """Return the trained network in a checkpoint, in evaluation mode on the CPU. Its attributes
    `classes`, `config` and `precision` are the names of what it tells apart, the options of its run
    and the precision of that. OSError or ValueError say what is wrong with the file."""
    checkpoint = load_checkpoint(path)
    try:
        config, precision = checkpoint["config"], checkpoint["precision"]
        weights, classes = checkpoint["weights"], CLASSES[config["dataset"]]
        if config.get("residual"):
            raise ValueError("--residual: blocks no longer add their inputs to their outputs")
        check_sizes(DEFAULTS | config, weights)
        with torch.device("meta"):  # without memory, whatever the config says
            model = build_model(config, len(classes))
        model.classes, model.config, model.precision = classes, config, precision
        model.load_state_dict(weights, assign=True)
        model.float().to(memory_format=torch.contiguous_format)  # a GPU's has channels together
        model.requires_grad_(False).eval()(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    except Exception as error:  # a config can hold anything
        if explain_out_of_memory(error):
            raise
        what = f"{path}: its weights do not fit its options ({explain(error)})"
        raise ValueError(what) from error
    return model


def check_sizes(options, weights):
    """ValueError if the options are of more layers than there are weights, or a tensor of weights
    is larger than what is stored of it: a small file must not ask for a huge network."""
    layers = len(options["arch"]) + options["fc"]
    if layers > len(weights):
        raise ValueError(f"{layers:,} layers, but {len(weights):,} tensors of weights")
    for name, tensor in weights.items():
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} is larger than what is stored of it")


def explain(error):
    """Return an exception's type and text as one line that is not too long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
