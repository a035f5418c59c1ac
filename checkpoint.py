"""The files of a run: its name claimed, its weights and state written, loaded safely, found again.

model = load_model("runs/row4.pt")           # in evaluation mode, on the CPU
logits = model(images)                       # (N, 3, 32, 32), normalised -> (N, 10)
"""

import contextlib
import glob
import hashlib
import zipfile
from itertools import chain
from pathlib import Path

import torch

from history import read_history, refuse_other_options, write_atomically
from model import IMAGE_SIZE, build_model

try:
    import fcntl
except ImportError:  # Windows: there, two runs of one name are not kept apart
    fcntl = None

FORMAT = "gated multi-convolution checkpoint 2"


def write_checkpoint(path, config, weights, **more):
    """Save a model's weights (its state_dict), its config and what else is given.
    OSError as the disk says; what was at `path` then stays."""
    checkpoint = {"format": FORMAT, "config": config, "weights": weights} | more
    checkpoint["digest"] = compute_digest(checkpoint)
    try:
        write_atomically(path, lambda file: torch.save(checkpoint, file))
    except RuntimeError as error:  # so torch.save says that the file could not be written
        reason = str(error.__context__ or error).partition("\n")[0]
        raise OSError(f"{path}: {reason}") from error


def load_checkpoint(path):
    """What write_checkpoint saved at `path`, a dict with `config`, `weights` and the rest. Its
    digest has to match, and no code in it is run. OSError or ValueError say what is wrong."""
    path = Path(path)
    path.open("rb").close()  # missing or unreadable is told as that
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"its format is {checkpoint['format']!r}")
        tensors = checkpoint["weights"].values()
        if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > path.stat().st_size:
            raise ValueError("its weights are larger than the file")
        if checkpoint.pop("digest", None) != compute_digest(checkpoint):
            raise ValueError("it is damaged: its digest does not match")
    except Exception as error:  # a damaged file can make the readers raise nearly anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{path} is not a whole checkpoint of train.py ({reason})") from error
    return checkpoint


def compute_digest(value, sha=None):
    """The SHA-256 of nested dicts, lists and tensors, a hexadecimal string."""
    sha = sha or hashlib.sha256()
    if isinstance(value, torch.Tensor):
        sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for part in chain(*value.items()):
            compute_digest(part, sha)
    elif isinstance(value, (list, tuple)):
        sha.update(f"{len(value)} entries".encode())
        for part in value:
            compute_digest(part, sha)
    else:
        sha.update(repr(value).encode())
    return sha.hexdigest()


def load_model(path):
    """The trained network in a checkpoint, in evaluation mode on the CPU."""
    return rebuild(load_checkpoint(path), path)


def rebuild(checkpoint, path):
    """The model of a loaded checkpoint, in evaluation mode; ValueError where the two do not fit."""
    try:
        config, weights = checkpoint["config"], checkpoint["weights"]
        if 4 * len(config["arch"]) + 2 * config["fc"] > len(weights):  # tensors
            raise ValueError("it has more layers than weights")
        with torch.device("meta"):  # without memory, whatever the config says
            model = build_model(config)
        model.load_state_dict(weights, assign=True)
        model.requires_grad_(False).eval()(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    except Exception as error:  # a config can hold anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{path}: its weights do not fit its options ({reason})") from error
    return model


@contextlib.contextmanager
def claim(out, name):
    """Keep other processes from training a run of this name in this folder: ValueError if one does.
    The claim ends with the process, however that ends; its file .NAME.lock stays."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f".{name}.lock", "w") as lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is training {out / name}") from error
        for suffix in (".pt", ".state.pt"):  # what a killed run was writing
            for part in out.glob(f"{glob.escape(name + suffix)}.*.part"):
                part.unlink()
        yield


def find_run(out, config):
    """The history and the saved state that a run of this config goes on from; None for either.
    ValueError if the name is taken, without `resume` or by other options, or files are missing."""
    paths = [out / (config["name"] + suffix) for suffix in (".json", ".pt", ".state.pt")]
    history_path, weights, state = paths
    if config["overwrite"] or not any(path.exists() for path in paths):
        return None, None
    if not config["resume"]:
        raise ValueError(f"{out / config['name']} exists: go on with it by --resume, replace it by "
                         "--overwrite, or give another --name")  # fmt: skip
    history = read_history(history_path) if history_path.exists() else None
    if history:
        refuse_other_options(history["config"], config, history_path)
    complete = history and history["finished"] and len(history["epochs"]) == config["epochs"]
    if complete and weights.exists():
        return history, None
    if not state.exists():
        if history and not history["finished"]:  # interrupted before anything was saved
            return history, None
        missing = weights if complete else state if history else history_path
        raise ValueError(f"{missing} is gone: --overwrite trains the run from its beginning")
    saved = load_checkpoint(state)
    refuse_other_options(saved["config"], config, state)
    return history, saved
