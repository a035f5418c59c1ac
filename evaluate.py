"""Test figures of a checkpoint, or what it takes photos for.

    python evaluate.py runs/final.pt                  # prints them and adds them to runs/final.json
    python evaluate.py runs/final.pt --tta            # ... and those with test-time augmentation
    python evaluate.py runs/final.pt --image cat.jpg dog.png     # the likeliest classes of photos

The model is rebuilt from the checkpoint alone. A test also writes runs/final-wrong.png, the most
confidently misclassified images; plot.py draws the other figures. Photos need no data set: they
are cropped to a square and shrunk, and drawn with the predictions in runs/final-predictions.png.
What test-time augmentation (--tta) gives is always named so; of a test, beside the plain figures.
"""

import argparse
import contextlib
import pickle
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from data import CLASSES, EVALUATION_BATCH, batches, load, normalised
from device import PRECISIONS, autocast, choose_device
from figures import gate_figures, prediction_figures
from history import read_history, write_atomically, write_history
from model import IMAGE_SIZE, build_model
from options import HelpFormatter

CHECKPOINT_FORMAT = "gated multi-convolution checkpoint 1"
DRAWN = 50  # photos in one picture
PHOTO = 256  # pixels, the longer side of a photo as it is drawn


def parse_args(argv=None):
    """The options, checked; usage errors exit with 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n")[2],
        formatter_class=HelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="runs/NAME.pt; figures go to runs/NAME.json")
    parser.add_argument("--image", type=Path, nargs="+", metavar="FILE",
        help="classify these photos; None: test on the test images")  # fmt: skip
    parser.add_argument("--tta", action="store_true",
        help="test-time augmentation: mean logits of an image and its mirror image")  # fmt: skip
    parser.add_argument("--data-dir", help="where CIFAR-10 is; None: where it was for training")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the forward pass; auto: that of training",
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
        config = checkpoint["config"]
        model = build_model(config)
        model.load_state_dict(checkpoint["weights"])
        CLASSES[config["dataset"]], Path(config["data_dir"])  # what a test needs beside the model
    except Exception as error:  # a config can hold anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
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


def mean_with_mirrored(logits, model, loader, precision):
    """Test-time augmentation: the mean of logits (N, 10) and those of the mirrored images."""
    mirrored = ((images.flip(3), targets) for images, targets in loader)
    logits = (logits + predict(model, mirrored, precision)[0]) / 2
    refuse_infinite(logits)
    return logits


@contextlib.contextmanager
def coefficients_kept(model):
    """Lists, one of each block, that the (N, k) coefficients of every batch are added to."""
    kept, hooks = [], []
    for block in model.backbone.blocks().values():
        kept.append([])

        # The gate itself is shared between blocks, its linear layer is not.
        def keep(module, inputs, output, gate=block.gate, coefficients=kept[-1]):
            coefficients.append(gate(output).float())

        hooks.append(block.gate_linear.register_forward_hook(keep))
    yield kept
    for hook in hooks:
        hook.remove()


def refuse_infinite(logits):
    """ValueError if there are no probabilities of these logits."""
    if not logits.isfinite().all():
        raise ValueError("the network's outputs are NaN or infinite: train it with a lower --lr")


def first_kernels(model):
    """The first block's kernels, nested lists (k, out, 3, 3, 3), rounded to 4 digits."""
    block = model.backbone[0]
    kernels = block.convs.weight.detach().unflatten(0, (block.k, block.out_channels))
    return kernels.double().round(decimals=4).tolist()


def figures_of(model, loader, precision, classes, tta=False):
    """All figures that a history keeps of a model on a list of batches.

    They are prediction_figures', gates and kernels; with `tta` also the accuracy and the loss that
    test-time augmentation gives.
    """
    with coefficients_kept(model) as kept:
        logits, labels = predict(model, loader, precision)
    refuse_infinite(logits)
    gates = [gate_figures(torch.cat(batches), labels, classes) for batches in kept]
    figures = prediction_figures(logits, labels, classes) | {
        "gates": [{"block": name} | gate for name, gate in zip(model.backbone.blocks(), gates)],
        "kernels": first_kernels(model),
    }
    if tta:
        logits = mean_with_mirrored(logits, model, loader, precision)
        augmented = prediction_figures(logits, labels, classes)
        figures["tta"] = {name: augmented[name] for name in ("accuracy", "loss")}
    return figures


def opened(args):
    """(config, model, device) of args.checkpoint, the model on the device of args.device."""
    device = choose_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    model = rebuild(checkpoint, args.checkpoint)  # which checks what is in the checkpoint
    if args.precision == "auto":
        args.precision = checkpoint["config"].get("precision", "auto")
    return checkpoint["config"], model.to(device), device


def evaluate(args):
    """Test args.checkpoint, print its figures and add them to the history beside it."""
    config, model, device = opened(args)
    history_path = args.checkpoint.with_suffix(".json")
    history = read_history(history_path) if history_path.exists() else None

    dataset = config["dataset"]
    images = load(dataset, args.data_dir or config["data_dir"], train=False)
    loader = list(batches(images, dataset, EVALUATION_BATCH, device))
    figures = figures_of(model, loader, args.precision, CLASSES[dataset], args.tta)

    if history is None:
        print(f"{history_path} is not there: the figures are only printed", file=sys.stderr)
    else:
        write_history(history_path, history | {"test": figures})
    for name, accuracy in figures["per_class"].items():
        print(f"{name:>12} {accuracy:6.2f}%")
    print(f"{'loss':>12} {figures['loss']:7.4f}")
    if args.tta:
        print(f"With flip test-time augmentation: {figures['tta']['accuracy']:.2f}%")
    print(f"Final Model Test Accuracy: {figures['accuracy']:.2f}%")

    import gallery  # here, since train.py imports this file and need not wait for matplotlib

    indices = [one["index"] for one in figures["wrong"]]
    shown = images.tensors[0][indices].permute(0, 2, 3, 1).numpy()
    figure = gallery.draw_wrong(shown, figures["wrong"], args.checkpoint.stem)
    gallery.save(figure, args.checkpoint.with_name(f"{args.checkpoint.stem}-wrong.png"))


def read_photo(path):
    """The image in a file, upright and over white: a PIL image of mode RGB.

    Of an animation it is the first frame. ValueError says why there is none.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                image = ImageOps.exif_transpose(image)
        return _as_rgb(image)
    except Exception as error:  # a damaged file can make PIL's decoders raise nearly anything
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not an image, or a damaged one ({reason})") from error


def _as_rgb(image):
    """A PIL image of any mode as RGB; what is transparent turns white."""
    if image.mode.startswith(("I", "F")):  # 16 bits a pixel, or unknown units: PIL would clip them
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float32))
        low, high = (0, 65535) if image.mode[0] == "I" else (pixels.min(), pixels.max())
        pixels = 255 * (pixels - low) / max(high - low, 1e-9)
        image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def classify(args):
    """Print the likeliest classes of the photos args.image, draw them, return whether all were."""
    config, model, device = opened(args)
    dataset = config["dataset"]
    named = " (flip test-time augmentation)" if args.tta else ""
    predictions = []
    for path in args.image:
        try:
            photo = read_photo(path)
        except ValueError as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            continue
        small = np.array(ImageOps.fit(photo, (IMAGE_SIZE, IMAGE_SIZE)))  # the middle, bicubic
        images = normalised(torch.from_numpy(small).permute(2, 0, 1)[None].to(device), dataset)
        batch = [(images, torch.zeros(1))]
        logits, _ = predict(model, batch, args.precision)
        refuse_infinite(logits)
        if args.tta:
            logits = mean_with_mirrored(logits, model, batch, args.precision)
        percentages = (100 * logits[0].softmax(0)).tolist()
        likeliest = sorted(zip(percentages, CLASSES[dataset]), reverse=True)[:3]
        print(f"{path}: " + ", ".join(f"{name} {value:.1f} %" for value, name in likeliest) + named)
        photo.thumbnail((PHOTO, PHOTO))
        predictions.append((path.name, np.array(photo), small, percentages))

    if predictions:
        import gallery  # see evaluate

        if len(predictions) > DRAWN:
            print(f"the picture shows the first {DRAWN} of them", file=sys.stderr)
        stem = args.checkpoint.stem
        figure = gallery.draw_predictions(predictions[:DRAWN], CLASSES[dataset], stem + named)
        gallery.save(figure, args.checkpoint.with_name(f"{stem}-predictions.png"))
    return len(predictions) == len(args.image)


def main(argv=None):
    """Test a checkpoint, or classify photos with it; failures exit with 1 and a line each."""
    args = parse_args(argv)
    try:
        if not args.image:
            evaluate(args)
        elif not classify(args):
            sys.exit(1)
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate.py: error: {error}")


if __name__ == "__main__":
    main()
