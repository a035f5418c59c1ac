"""Test figures of a checkpoint: per-class accuracies, loss, confusion matrix.

    python evaluate.py runs/final.pt                  # prints them and adds them to runs/final.json
    python evaluate.py runs/final.pt --device cpu

The model is rebuilt from the checkpoint alone.
"""

import argparse
import pickle
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

from data import CLASSES, EVALUATION_BATCH, batches, choose_device, load
from history import read_history, write_atomically, write_history
from model import PRECISIONS, autocast, build_model

CHECKPOINT_FORMAT = "gated multi-convolution checkpoint 1"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Test a checkpoint that train.py wrote.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="runs/NAME.pt; figures go to runs/NAME.json")
    parser.add_argument("--data-dir", help="where CIFAR-10 is; None: where it was for training")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: bfloat16 on CUDA, float32 elsewhere",
    )
    return parser.parse_args(argv)


def load_checkpoint(path):
    """What train.py saved at `path`: a dict with `config`, `weights` and what else it put there.

    Every byte is checked against the file's own checksums and no code in it is run. OSError or
    ValueError say what is wrong with it.
    """
    path = Path(path)
    if not zipfile.is_zipfile(path):
        path.open("rb").close()  # missing or unreadable is told as that
        raise ValueError(f"{path} is not a checkpoint, or only the beginning of one")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{path} is damaged: the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a checkpoint that train.py wrote ({reason})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} is a PyTorch file, but not a checkpoint that train.py wrote")
    return checkpoint


def write_checkpoint(path, config, model, **more):
    """Save the weights of a model, its config and what else is given, for load_checkpoint.

    OSError as the disk says; what was at `path` then stays.
    """
    checkpoint = {"format": CHECKPOINT_FORMAT, "config": config, "weights": model.state_dict()}
    try:
        write_atomically(path, lambda file: torch.save(checkpoint | more, file))
    except RuntimeError as error:  # so torch.save says that the file could not be written
        reason = str(error.__context__ or error).partition("\n")[0]
        raise OSError(f"{path}: {reason}") from error


def rebuild(checkpoint, path):
    """The model of a checkpoint with its weights; ValueError where the two do not fit."""
    try:
        model = build_model(checkpoint["config"])
        model.load_state_dict(checkpoint["weights"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: its weights do not fit its options ({reason})") from error
    return model


@torch.inference_mode()
def predict(model, loader, precision, after_batch=lambda: None):
    """(logits, labels) of all batches of a loader: float32 (N, 10) and int64 (N,)."""
    model.eval()
    logits, labels = [], []
    for images, targets in loader:
        with autocast(images.device, precision):
            logits.append(model(images).float())
        labels.append(targets)
        after_batch()
    return torch.cat(logits), torch.cat(labels)


def test_figures(logits, labels, classes):
    """Figures of logits (N, 10) against labels (N,), as train.py's history keeps them.

    Accuracies are percentages; the confusion matrix counts, its rows are the true classes.
    """
    pairs = labels * len(classes) + logits.argmax(1)
    confusion = pairs.bincount(minlength=len(classes) ** 2).view(len(classes), len(classes))
    correct = confusion.diagonal()
    per_class = 100 * correct / confusion.sum(1).clamp(min=1)
    return {
        "accuracy": 100 * correct.sum().item() / len(labels),
        "loss": F.cross_entropy(logits, labels).item(),
        "images": len(labels),
        "per_class": dict(zip(classes, per_class.tolist())),
        "confusion": confusion.tolist(),
    }


def evaluate(args):
    """Test args.checkpoint, print its figures and add them to the history beside it."""
    device = choose_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    model = rebuild(checkpoint, args.checkpoint).to(device)
    history_path = args.checkpoint.with_suffix(".json")
    history = read_history(history_path) if history_path.exists() else None

    dataset = checkpoint["config"]["dataset"]
    images = load(dataset, args.data_dir or checkpoint["config"]["data_dir"], train=False)
    loader = batches(images, dataset, EVALUATION_BATCH, device)
    figures = test_figures(*predict(model, loader, args.precision), CLASSES[dataset])

    if history is None:
        print(f"{history_path} is not there: the figures are only printed", file=sys.stderr)
    else:
        write_history(history_path, history | {"test": figures})
    for name, accuracy in figures["per_class"].items():
        print(f"{name:>12} {accuracy:6.2f}%")
    print(f"{'loss':>12} {figures['loss']:7.4f}")
    print(f"Final Model Test Accuracy: {figures['accuracy']:.2f}%")


def main(argv=None):
    args = parse_args(argv)
    try:
        evaluate(args)
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate.py: error: {error}")


if __name__ == "__main__":
    main()
