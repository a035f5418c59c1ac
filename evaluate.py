"""Test metrics of a checkpoint, or what it takes photos for.

    python evaluate.py runs/final.pt                  # prints them and adds them to runs/final.json
    python evaluate.py runs/final.pt --tta            # ... and those with test-time augmentation
    python evaluate.py runs/final.pt --image cat.jpg dog.png     # the likeliest classes of photos

The model is rebuilt from the checkpoint alone. A test also writes runs/final-wrong.png, the most
confidently misclassified images; plot.py draws the other metrics. Photos need no data set: they
are cropped to a square and shrunk, and drawn with the predictions in runs/final-predictions.png.
"""

import contextlib
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import gallery
from checkpoint import load_checkpoint, rebuild
from data import CLASSES, batches, load, normalise
from device import PRECISIONS, WORLD_SIZE, autocast, choose_device
from history import hyperparameters, make_parser, read_history, write_history
from model import IMAGE_SIZE, predict

BINS = 15  # of confidence
QUANTILES = (0, 0.25, 0.5, 0.75, 1)
WRONG = 36  # misclassified images kept
DRAWN = 50  # photos in one picture
PHOTO = 256  # pixels, the longer side of a photo as it is drawn


def evaluate(args):
    """Test args.checkpoint: print its metrics, add them to the history beside it, draw errors."""
    history_path = args.checkpoint.with_suffix(".json")
    history = read_history(history_path) if history_path.exists() else None
    if args.once and history and ("test" in history or history["config"].get("holdout")):
        return
    config, model, device, in_precision = open_checkpoint(args)
    dataset = config["dataset"]
    images = load(dataset, args.data_dir or str(config.get("data_dir")), train=False)
    loader = list(batches(images, dataset, device=device))
    metrics = measure(model, loader, in_precision, CLASSES[dataset], args.tta)

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
    shown = images.tensors[0][indices].permute(0, 2, 3, 1).numpy()
    figure = gallery.draw_wrong(shown, metrics["wrong"], args.checkpoint.stem)
    gallery.save(figure, args.checkpoint.with_name(f"{args.checkpoint.stem}-wrong.png"))


def open_checkpoint(args):
    """(config, model, device, autocast context) of the options, the model on the device."""
    device = choose_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    model = rebuild(checkpoint, args.checkpoint)
    config = checkpoint["config"]
    precision = checkpoint.get("precision", config.get("precision"))  # of training
    if config.get("dataset") not in list(CLASSES) or precision not in PRECISIONS:
        raise ValueError(f"{args.checkpoint} is of an unknown data set or precision")
    precision = precision if args.precision == "auto" else args.precision
    return config, model.to(device), device, autocast(device, precision)


def measure(model, loader, in_precision, classes, tta=False):
    """All test metrics that a history keeps of a model on a list of batches.
    With `tta` also the accuracy and the loss that test-time augmentation gives."""
    with keep_coefficients(model) as kept:
        logits, labels = predict(model, loader, in_precision)
    metrics = measure_predictions(logits, labels, classes)
    gates = {name: measure_gate(torch.cat(parts), labels, classes) for name, parts in kept.items()}
    metrics["gates"] = [{"block": name} | gate for name, gate in gates.items()]
    block = model.backbone[0]
    kernels = block.convs.weight.unflatten(0, (block.gate_linear.out_features, -1))
    metrics["kernels"] = kernels.double().round(decimals=4).tolist()
    if tta:
        logits = add_mirrored(logits, model, loader, in_precision)
        augmented = measure_predictions(logits, labels, classes)
        metrics["tta"] = {name: augmented[name] for name in ("accuracy", "loss")}
    return metrics


def measure_predictions(logits, labels, classes):
    """Metrics of logits (N, 10) against labels (N,), as train.py's history keeps them: percentages,
    but for the confusion matrix, which counts; its rows are the true classes."""
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
    """The expected calibration error ("ece") of probabilities (N, 10), and the bins it is from.
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
    """The misclassified images of probabilities (N, 10), in per cent, the most confident first."""
    confidence, predicted = percentages.max(1)
    wrong = (predicted != labels).nonzero().flatten()
    order = confidence[wrong].argsort(descending=True, stable=True)[:WRONG]
    return [{"index": i, "true": classes[labels[i]], "predicted": classes[predicted[i]],
             "confidence": confidence[i].item()} for i in wrong[order].tolist()]  # fmt: skip


def measure_gate(coefficients, labels, classes):
    """Metrics of a block's coefficients (N, k): means of each class (10, k), quantiles (k, 5)."""
    members = F.one_hot(labels, len(classes)).T.float()
    means = members @ coefficients / members.sum(1, keepdim=True).clamp(min=1)
    levels = torch.tensor(QUANTILES, device=coefficients.device)
    quantiles = coefficients.quantile(levels, dim=0).T
    return {"mean_per_class": means.tolist(), "quantiles": quantiles.tolist()}


@contextlib.contextmanager
def keep_coefficients(model):
    """For each block, by name, a list of its coefficients (N, k) of every batch."""
    kept = {}
    with contextlib.ExitStack() as hooks:
        for name, block in model.backbone.blocks().items():
            keep = kept[name] = []
            hook = block.gate.register_forward_hook(lambda *call, keep=keep: keep.append(call[-1]))
            hooks.enter_context(hook)
        yield kept


def compute_percentages(logits):
    """Probabilities (N, 10) in per cent; ValueError where logits (N, 10) have none."""
    if not logits.isfinite().all():
        raise ValueError("the network's outputs are NaN or infinite: train it with a lower --lr")
    return 100 * logits.softmax(1)


def add_mirrored(logits, model, loader, in_precision):
    """Test-time augmentation: the mean of logits (N, 10) and those of the mirrored images."""
    mirrored = ((images.flip(3), labels) for images, labels in loader)
    return (logits + predict(model, mirrored, in_precision)[0]) / 2


def classify(args):
    """Print the likeliest classes of the photos args.image, draw them, return whether all were."""
    config, model, device, in_precision = open_checkpoint(args)
    dataset = config["dataset"]
    note = " (flip test-time augmentation)" if args.tta else ""
    predictions = []
    for path in args.image:
        try:
            photo = read_photo(path)
        except ValueError as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            continue
        small = np.array(ImageOps.fit(photo, (IMAGE_SIZE, IMAGE_SIZE)))  # the middle, bicubic
        images = normalise(torch.from_numpy(small).permute(2, 0, 1)[None].to(device), dataset)
        batch = [(images, torch.zeros(1))]
        logits, _ = predict(model, batch, in_precision)
        if args.tta:
            logits = add_mirrored(logits, model, batch, in_precision)
        percentages = compute_percentages(logits)[0].tolist()
        likeliest = sorted(zip(percentages, CLASSES[dataset]), reverse=True)[:3]
        print(f"{path}: " + ", ".join(f"{name} {value:.1f} %" for value, name in likeliest) + note)
        photo.thumbnail((PHOTO, PHOTO))
        name = path.name.encode(errors="replace").decode()  # which may not be UTF-8
        predictions.append((name, np.array(photo), small, percentages))
    if predictions:
        if len(predictions) > DRAWN:
            print(f"the picture shows the first {DRAWN} of them", file=sys.stderr)
        stem = args.checkpoint.stem
        figure = gallery.draw_predictions(predictions[:DRAWN], CLASSES[dataset], stem + note)
        gallery.save(figure, args.checkpoint.with_name(f"{stem}-predictions.png"))
    return len(predictions) == len(args.image)


def read_photo(path):
    """The image in a file, upright and over white: a PIL image of mode RGB.
    Of an animation it is the first frame. ValueError says why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if not path.is_file():
                raise OSError("no file")
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16 bits a pixel, which PIL would clip
                    image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except Exception as error:  # a damaged file can make PIL's decoders raise nearly anything
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not there, or not a whole image ({reason})") from error


def parse_args(argv=None):
    """The options, checked; usage errors exit with 2."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="runs/NAME.pt; metrics go to runs/NAME.json")
    add("--image", type=Path, nargs="+", metavar="FILE", help="photos to classify; None: test")
    add("--tta", action="store_true", help="test-time augmentation, by mirror images, as well")
    add("--once", action="store_true", help="no test if it was tested, or images held out")
    add("--data-dir", help="where CIFAR-10 is; None: where it was for training")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    add("--precision", choices=PRECISIONS, default="auto", help="auto: that of training")
    args = parser.parse_args(argv)
    if WORLD_SIZE > 1:
        parser.error(f"one process tests, not {WORLD_SIZE}: start it without torchrun")
    return args


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
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
