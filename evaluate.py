"""Test metrics of checkpoints, or what a network takes photos for.

    python evaluate.py runs/final.pt                  # prints them and adds them to runs/final.json
    python evaluate.py runs/final.pt --tta            # ... and those with test-time augmentation
    python evaluate.py runs/final.pt --image cat.jpg dog.png     # the likeliest classes of photos

The model is rebuilt from the checkpoint alone. A test also writes runs/final-wrong.png, the most
confidently misclassified images; plot.py draws the other metrics. Photos need no data set: they
are cropped to a square and shrunk, and drawn with the predictions in runs/final-predictions.png.
"""

import argparse
import contextlib
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import gallery
from data import CLASSES, load, normalise
from device import PRECISIONS, WORLD_SIZE, autocast, choose_device
from history import hyperparameters, read_history, to_path, write_history
from model import IMAGE_SIZE, predict
from run import load_checkpoint, rebuild

BINS = 15  # of confidence
QUANTILES = (0, 0.25, 0.5, 0.75, 1)
WRONG = 36  # misclassified images kept
DRAWN = 50  # photos in one picture
PHOTO = 256  # pixels, the longer side of a photo as it is drawn
ORIENTATION = 0x0112  # EXIF's tag for how the camera was held, and what undoes it
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def evaluate(path, args):
    """Test a checkpoint: print its metrics, add them to the history beside it, draw errors."""
    history_path = path.with_suffix(".json")
    history = read_history(history_path) if history_path.exists() else None
    if args.once and history:
        if "test" in history or history["config"].get("holdout") or not history["finished"]:
            return
    config, model, device, amp = open_checkpoint(path, args)
    images = load(config["dataset"], find_data(config, args), train=False)
    batches = list(images.to(device).batches())
    metrics = measure(model, batches, amp, images.classes, args.tta)

    for name, accuracy in metrics["per_class"].items():
        print(f"{name:>12} {accuracy:6.2f}%")
    print(f"{'loss':>12} {metrics['loss']:7.4f}")
    if args.tta:
        print(f"With flip test-time augmentation: {metrics['tta']['accuracy']:.2f}%")
    print(f"Final Model Test Accuracy: {metrics['accuracy']:.2f}%")
    history = history and read_history(history_path)  # again: a training may have changed it
    options = history and history["finished"] and hyperparameters(history["config"])
    if options == hyperparameters(config):
        history["test"] = history.get("test", {}) | metrics
        write_history(history_path, history)
    else:
        print(f"{history_path} is not there, or of other weights: only printed", file=sys.stderr)
    indices = [one["index"] for one in metrics["wrong"]]
    shown = images.images[indices].permute(0, 2, 3, 1).numpy()
    figure = gallery.draw_wrong(shown, metrics["wrong"], path.stem)
    gallery.save(figure, path.with_name(f"{path.stem}-wrong.png"))


def find_data(config, args):
    """Return the folder of CIFAR-10: the one that is given, or that of training if it is there."""
    of_training = Path(str(config.get("data_dir")))
    return args.data_dir or (of_training if of_training.is_dir() else "data")


def open_checkpoint(path, args):
    """Return (config, model, device, autocast context), the model on the device."""
    checkpoint = load_checkpoint(path)
    config, model = checkpoint["config"], rebuild(checkpoint, path)
    try:
        device = choose_device(args.device or config.get("device", "auto"))
    except ValueError:
        if args.device:
            raise
        device = choose_device()  # it was trained on another machine
    precision = checkpoint.get("precision") if args.precision == "auto" else args.precision
    if precision not in PRECISIONS:
        raise ValueError(f"{path} is of an unknown precision, {precision!r}")
    return config, model.to(device), device, autocast(device, precision)


def measure(model, batches, amp, classes, tta=False):
    """Return all test metrics that a history keeps of a model on a list of batches, with `tta` also
    the accuracy and the loss that test-time augmentation gives."""
    with keep_coefficients(model) as kept:
        logits, labels = (tensor.cpu() for tensor in predict(model, batches, amp))
    metrics = measure_predictions(logits, labels, classes)
    metrics["gates"] = [
        {"block": name} | measure_gate(torch.cat(parts).cpu(), labels, classes)
        for name, parts in kept.items()
    ]
    block = model.backbone[0]
    kernels = block.convs.weight.unflatten(0, (block.gate_linear.out_features, -1)).cpu()
    metrics["kernels"] = kernels.double().round(decimals=4).tolist()
    if tta:
        logits = add_mirrored(logits, model, batches, amp)
        augmented = measure_predictions(logits, labels, classes)
        metrics["tta"] = {name: augmented[name] for name in ("accuracy", "loss")}
    return metrics


def measure_predictions(logits, labels, classes):
    """Return metrics of logits (N, classes) against labels (N,), as a history keeps them:
    percentages, but for the confusion matrix, which counts; its rows are the true classes."""
    percentages = compute_percentages(logits)
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
        "calibration": measure_calibration(percentages, labels),
        "wrong": find_most_wrong(percentages, labels, classes),
    }


def measure_calibration(percentages, labels):
    """Return the expected calibration error ("ece") of probabilities (N, classes), and its bins.
    Each bin has the mean confidence and the accuracy of its images, None if it has no image: all in
    per cent. A confidence between two bins belongs to the lower one."""
    confidence, predicted = percentages.max(1)
    correct = 100.0 * (predicted == labels)
    places = (confidence * BINS / 100).ceil().clamp(1, BINS) - 1
    bins = []
    for inside in places == torch.arange(BINS, device=places.device)[:, None]:
        means = [v[inside].mean().item() if inside.any() else None for v in (confidence, correct)]
        bins.append(dict(zip(("confidence", "accuracy"), means)) | {"count": inside.sum().item()})
    gaps = [b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins if b["count"]]
    return {"bins": bins, "ece": sum(gaps) / len(labels)}


def find_most_wrong(percentages, labels, classes):
    """Return the misclassified images of percentages (N, classes), the most confident first."""
    confidence, predicted = percentages.max(1)
    wrong = (predicted != labels).nonzero().flatten()
    order = confidence[wrong].argsort(descending=True, stable=True)[:WRONG]
    return [
        {
            "index": i,
            "true": classes[labels[i]],
            "predicted": classes[predicted[i]],
            "confidence": confidence[i].item(),
        }
        for i in wrong[order].tolist()
    ]


def measure_gate(coefficients, labels, classes):
    """Return means (classes, k) and quantiles (k, 5) of a block's coefficients (N, k)."""
    members = F.one_hot(labels, len(classes)).T.float()
    means = members @ coefficients / members.sum(1, keepdim=True).clamp(min=1)
    levels = torch.tensor(QUANTILES, device=coefficients.device)
    quantiles = coefficients.quantile(levels, dim=0).T
    return {"mean_per_class": means.tolist(), "quantiles": quantiles.tolist()}


@contextlib.contextmanager
def keep_coefficients(model):
    """Give, for each block by name, a list of its coefficients (N, k) of every batch."""
    kept = {}
    with contextlib.ExitStack() as hooks:
        for name, block in model.backbone.blocks().items():
            keep = kept[name] = []

            def note(layer, inputs, output, keep=keep, gate=block.gate):
                keep.append(gate(output))

            hooks.enter_context(block.gate_linear.register_forward_hook(note))
        yield kept


def compute_percentages(logits):
    """Return probabilities (N, classes) in per cent; ValueError where logits have none."""
    if not logits.isfinite().all():
        raise ValueError("the network's outputs are NaN or infinite: train it with a lower --lr")
    return 100 * logits.softmax(1)


def add_mirrored(logits, model, batches, amp):
    """Return the mean of logits (N, classes), on the CPU, and those of the mirrored images."""
    mirrored = ((x.flip(3), labels) for x, labels in batches)
    return (logits + predict(model, mirrored, amp)[0].cpu()) / 2


def classify(path, args):
    """Print the likeliest classes of the photos args.image, draw them; return whether all were."""
    config, model, device, amp = open_checkpoint(path, args)
    dataset, note = config["dataset"], " (flip test-time augmentation)" if args.tta else ""
    classes, predictions = CLASSES[dataset], []
    for file in args.image:
        try:
            photo = read_photo(file)
        except ValueError as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            continue
        small = np.array(ImageOps.fit(photo, (IMAGE_SIZE, IMAGE_SIZE)))  # the middle, bicubic
        x = normalise(torch.from_numpy(small).permute(2, 0, 1)[None].to(device), dataset)
        batches = [(x, torch.zeros(1))]
        logits = predict(model, batches, amp)[0].cpu()
        if args.tta:
            logits = add_mirrored(logits, model, batches, amp)
        percentages = compute_percentages(logits)[0].tolist()
        likeliest = sorted(zip(percentages, classes), reverse=True)[:3]
        print(f"{file}: " + ", ".join(f"{name} {value:.1f} %" for value, name in likeliest) + note)
        photo.thumbnail((PHOTO, PHOTO))
        name = file.name.encode(errors="replace").decode()  # which may not be UTF-8
        predictions.append((name, np.array(photo), small, percentages))
    if predictions:
        if len(predictions) > DRAWN:
            print(f"the picture shows the first {DRAWN} of them", file=sys.stderr)
        figure = gallery.draw_predictions(predictions[:DRAWN], classes, path.stem + note)
        gallery.save(figure, path.with_name(f"{path.stem}-predictions.png"))
    return len(predictions) == len(args.image)


def read_photo(path):
    """Return the image in a file, upright and over white: a PIL image of mode RGB.
    Of an animation it is the first frame. ValueError says why there is none."""
    try:
        if not path.is_file():
            raise OSError("no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL refuses what is twice as large as it warns of
            with Image.open(path) as image:
                image.load()
                with contextlib.suppress(Exception):  # what cannot be read is used as it lies
                    image = image.transpose(TURNS[image.getexif()[ORIENTATION]])
        if image.mode.startswith(("I", "F")):  # more than 8 bits a pixel, which PIL would clip
            image = scale(np.asarray(image))
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except Image.DecompressionBombError as error:
        limit = f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
        raise ValueError(f"{path}: {limit} are too many: make it smaller") from error
    except Exception as error:  # a damaged file can make PIL's decoders raise nearly anything
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not there, or not a whole image ({reason})") from error


def scale(pixels):
    """Return grey pixels (H, W) of 16 or 32 bits as a PIL image of 8: scaled from the smallest of
    the usual ranges of their type that holds them, or from their own."""
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite(high - low):
        raise ValueError("a pixel is NaN or infinite")
    usual = {"u": (65535,), "i": (255, 65535), "f": (1, 255, 65535)}[pixels.dtype.kind]
    if low >= 0 and high <= usual[-1]:
        low, high = 0, min(top for top in usual if high <= top)
    share = (pixels.astype(float) - low) / (high - low or 1)
    return Image.fromarray((255 * share).astype(np.uint8))


def parse_args(argv=None):
    """Return the options. Wrong ones end in a line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    files = "runs/NAME.pt; metrics go to runs/NAME.json"
    add("checkpoints", type=to_path, nargs="+", metavar="checkpoint", help=files)
    add("--image", type=to_path, nargs="+", metavar="FILE", help="photos to classify, no test")
    add("--tta", action="store_true", help="test-time augmentation, by mirror images, as well")
    add(
        "--once",
        action="store_true",
        help="only what is finished, was not tested and held no images out",
    )
    add("--data-dir", type=to_path, help="where CIFAR-10 is (default: where it was for training)")
    add("--device", help="auto, cpu, cuda, cuda:1, mps ... (default: that of training)")
    precision = "of products (default: that of training)"
    add("--precision", choices=PRECISIONS, default="auto", help=precision)
    args = parser.parse_args(argv)
    if WORLD_SIZE > 1:
        parser.error(f"one process tests, not {WORLD_SIZE}: start it without torchrun")
    return args


def main(argv=None):
    """Test checkpoints, or classify photos with them; failures exit with 1 and a line each."""
    args = parse_args(argv)
    with contextlib.suppress(AttributeError):  # where stdout is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # names may have any characters
    failed = False
    for path in args.checkpoints:
        try:
            if args.image:
                failed |= not classify(path, args)
            else:
                evaluate(path, args)
        except (OSError, ValueError) as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            failed = True
        except KeyboardInterrupt:
            sys.exit(130)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
