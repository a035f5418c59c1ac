"""Test metrics of checkpoints, or what a network takes photos for.

    python evaluate.py runs/final.pt                  # prints them and adds them to runs/final.json
    python evaluate.py runs/final.pt --tta            # ... and those with test-time augmentation
    python evaluate.py runs/final.pt --image cat.jpg dog.png     # the likeliest classes of photos
    python evaluate.py runs/final.pt --export weights/final.pt   # the weights alone, half as large
    python evaluate.py /input/final.pt --out runs     # all files to runs/, /input is left as it is

The model is rebuilt from the checkpoint alone. A test also writes runs/final-wrong.png, the most
confidently misclassified images; plot.py draws the other metrics. Photos need no data set: they
are cropped to a square and shrunk, and drawn with the predictions in runs/final-predictions.png,
those after the first 20 in runs/final-predictions-2.png and so on.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageOps

import fast
import gallery
from checkpoint import load_checkpoint, load_model, write_checkpoint
from data import Dataset, load
from device import PRECISIONS, autocast, explain_out_of_memory, set_up_device
from history import (
    expand_patterns,
    harden_output,
    hyperparameters,
    read_history,
    to_path,
    write_history,
)
from model import IMAGE_SIZE, predict
from photos import read_photo

BINS = 15  # of confidence
WRONG = 36  # misclassified images kept
PHOTO = 256  # pixels, the longer side of a photo as it is drawn
PAGE = 20  # photos in one picture
# Of test-time augmentation beside the image itself, which weighs 2: how many pixels it is moved to
# the lower right, whether it is mirrored, and the weight (as in airbench, Jordan 2024).
VIEWS = ((0, True, 2), (1, False, 1), (1, True, 1), (-1, False, 1), (-1, True, 1))


def evaluate(path, args):
    """Test a checkpoint: print its metrics, add them to its history, draw errors."""
    folder = args.out or path.parent
    history = find_history(path, folder)  # is refused now: a test can take minutes
    if args.once and history:
        if "test" in history or history["config"].get("holdout") or not history["finished"]:
            return
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)  # so is this
    model, device, amp = open_checkpoint(path, args)
    of_training = Path(model.config["data_dir"])
    data_dir = args.data_dir or (of_training if os.path.isdir(of_training) else "data")
    images = load(model.config["dataset"], data_dir, train=False)
    batches = list(images.to(device).batches())
    metrics = measure(model, batches, amp, images.classes, args.tta)
    print_metrics(metrics)
    with advise_out():
        add_to_history(metrics, model.config, path, folder)
        draw_errors(metrics["wrong"], images, folder / path.stem)


def find_history(path, folder):
    """Return the history beside a checkpoint, with the test that is in its copy in another folder;
    None if there is none. ValueError if the folder has another training's under that name."""
    beside = path.with_suffix(".json")
    copy = folder / beside.name
    if not beside.exists():
        return None
    history = read_history(beside)
    if copy == beside or not copy.exists():
        return history
    copied = read_history(copy)
    if copied | {"test": None} != history | {"test": None}:
        raise ValueError(f"{copy} is of another training than {beside}: give another --out")
    return history | copied


def print_metrics(metrics):
    """Print test metrics, the report's line last."""
    for name, accuracy in metrics["per_class"].items():
        print(f"{name:>12} {accuracy:6.2f}%")
    print(f"{'loss':>12} {metrics['loss']:7.4f}")
    if "tta" in metrics:
        print(f"With test-time augmentation, six views: {metrics['tta']['accuracy']:.2f}%")
    print(f"Final Model Test Accuracy: {metrics['accuracy']:.2f}%")


def add_to_history(metrics, config, path, folder):
    """Write the history of a checkpoint with these test metrics to a folder. If it is not finished,
    or was meanwhile trained with options other than config, say so instead."""
    history = find_history(path, folder) or {"finished": False}
    if history["finished"] and hyperparameters(history["config"]) == hyperparameters(config):
        history["test"] = history.get("test", {}) | metrics
        write_history(folder / f"{path.stem}.json", history)
    else:
        reason = "is not there, not finished or of other weights: it does not get these metrics"
        print(f"{path.with_suffix('.json')} {reason}", file=sys.stderr)


def draw_errors(wrong, images, target):
    """Draw the misclassified images in a picture, target-wrong.png."""
    shown = images.images[[one["index"] for one in wrong]].permute(0, 2, 3, 1).numpy()
    figure = gallery.draw_wrong(shown, wrong, target.name)
    gallery.save(figure, target.with_name(f"{target.name}-wrong.png"))


@contextlib.contextmanager
def advise_out():
    """Let an error of the disk say what helps."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{error}: --out FOLDER writes elsewhere") from error


def open_checkpoint(path, args):
    """Return (model, device, autocast context), the model on the device, in its memory format."""
    model, device = load_model(path), set_up_device(args.device)
    precision = model.precision if args.precision == "auto" else args.precision
    model.to(device, memory_format=fast.memory_format(device, precision))
    return model, device, autocast(device, precision)


def measure(model, batches, amp, classes, tta):
    """Return all test metrics that a history keeps of a model on a list of batches, with `tta` also
    the accuracy and the loss that test-time augmentation gives."""
    gated = {name: block for name, block in model.backbone.named_children() if block.gated}
    kept = {block.gate_linear: [] for block in gated.values()}

    def keep(layer, inputs, output):
        kept[layer].append(output)

    hooks = [layer.register_forward_hook(keep) for layer in kept]
    logits, labels = (tensor.cpu() for tensor in predict(model, batches, amp))
    for hook in hooks:
        hook.remove()
    metrics = measure_predictions(logits, labels, classes)
    metrics["gates"] = [
        {"block": name, "similarity": measure_similarity(block)}
        | measure_gate(block.gate(torch.cat(kept[block.gate_linear])).cpu(), labels, classes)
        for name, block in gated.items()
    ]
    if tta:
        logits = add_views(logits, model, batches, amp)
        augmented = measure_predictions(logits, labels, classes)
        metrics["tta"] = {name: augmented[name] for name in ("accuracy", "loss")}
        metrics["tta"]["views"] = 1 + len(VIEWS)
    return metrics


def measure_predictions(logits, labels, classes):
    """Return metrics of logits (N, classes) against labels (N,), as a history keeps them:
    percentages, but for the confusion matrix, which counts; its rows are the true classes."""
    percentages = 100 * logits.softmax(1)
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
    for inside in places == torch.arange(BINS)[:, None]:
        means = [v[inside].mean().item() if inside.any() else None for v in (confidence, correct)]
        bins.append(dict(zip(("confidence", "accuracy"), means)) | {"count": inside.sum().item()})
    gaps = [b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins if b["count"]]
    return {"bins": bins, "ece": sum(gaps) / len(labels)}


def find_most_wrong(percentages, labels, classes):
    """Return the misclassified images of percentages (N, classes), the most confident first."""
    confidence, predicted = percentages.max(1)
    wrong = (predicted != labels).nonzero().flatten()
    order = confidence[wrong].argsort(descending=True, stable=True)[:WRONG]
    keys = ("index", "true", "predicted", "confidence")
    return [
        dict(zip(keys, (i, classes[labels[i]], classes[predicted[i]], confidence[i].item())))
        for i in wrong[order].tolist()
    ]


def measure_gate(coefficients, labels, classes):
    """Return means (classes, k) and quartiles (k, 5) of a block's coefficients (N, k)."""
    members = F.one_hot(labels, len(classes)).T.float()
    means = members @ coefficients / members.sum(1, keepdim=True).clamp(min=1)
    quantiles = coefficients.quantile(torch.linspace(0, 1, 5), dim=0).T
    return {"mean_per_class": means.tolist(), "quantiles": quantiles.tolist()}


def measure_similarity(block):
    """Return the mean cosine between a block's k sets of kernels, each as one long vector: at 1 its
    sum is one convolution, whatever the coefficients. None of k = 1."""
    k = block.gate_linear.out_features
    kernels = F.normalize(block.convs.weight.cpu().reshape(k, -1), dim=1)
    cosines = (kernels @ kernels.T)[~torch.eye(k, dtype=torch.bool)]
    return cosines.mean().item() if k > 1 else None


def add_views(logits, model, batches, amp):
    """Return the mean of logits (N, classes), on the CPU, and those of the other VIEWS."""
    total, weights = 2 * logits, 2
    for pixels, mirrored, weight in VIEWS:
        seen = ((move(x, pixels, mirrored), labels) for x, labels in batches)
        total += weight * predict(model, seen, amp)[0].cpu()
        weights += weight
    return total / weights


def move(x, pixels, mirrored):
    """Move images (N, C, H, W) right and down by 1, 0 or -1 pixels, over a mirror image of what is
    inside, then mirror them."""
    _, _, height, width = x.shape
    padded, start = F.pad(x, (1, 1, 1, 1), mode="reflect"), 1 - pixels
    x = padded[:, :, start : start + height, start : start + width]
    return x.flip(3) if mirrored else x


def classify(path, args):
    """Print the likeliest classes of the photos args.image, draw them; return whether every photo
    was readable."""
    model, device, amp = open_checkpoint(path, args)
    dataset, note = model.config["dataset"], " (mean of six views)" if args.tta else ""
    classes, predictions = model.classes, []
    for file in args.image:
        try:
            photo = read_photo(file)
        except ValueError as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            continue
        small = np.array(ImageOps.fit(photo, (IMAGE_SIZE, IMAGE_SIZE)))  # the middle, bicubic
        image = torch.from_numpy(small).permute(2, 0, 1)[None]
        batches = list(Dataset(image, torch.zeros(1), dataset).to(device).batches())
        logits = predict(model, batches, amp)[0].cpu()
        if args.tta:
            logits = add_views(logits, model, batches, amp)
        percentages = (100 * logits[0].softmax(0)).tolist()
        likeliest = sorted(zip(percentages, classes), reverse=True)[:3]
        print(f"{file}: " + ", ".join(f"{name} {value:.1f} %" for value, name in likeliest) + note)
        photo.thumbnail((PHOTO, PHOTO))
        predictions.append((file.name, np.array(photo), small, percentages))
    with advise_out():
        draw_pages(predictions, classes, note, (args.out or path.parent) / path.stem)
    return len(predictions) == len(args.image)


def draw_pages(predictions, classes, note, target):
    """Draw predictions of photos in as many pictures as they need: target-predictions.png,
    target-predictions-2.png and so on."""
    pages = [predictions[start : start + PAGE] for start in range(0, len(predictions), PAGE)]
    for number, page in enumerate(pages, 1):
        place = f", {number} of {len(pages)}" if len(pages) > 1 else ""
        figure = gallery.draw_predictions(page, classes, target.name + note + place)
        suffix = f"-{number}" if number > 1 else ""
        gallery.save(figure, target.with_name(f"{target.name}-predictions{suffix}.png"))


def export(path, target):
    """Write the weights of a checkpoint alone, in half precision: a checkpoint for evaluate.py and
    load_model."""
    if target.exists():
        raise ValueError(f"{target} exists: give another file to --export")
    checkpoint = load_checkpoint(path)
    checkpoint.pop("state", None)  # what resuming needs
    checkpoint["config"] |= {"data_dir": "data", "out": "runs"}
    checkpoint["precision"] = "float32"  # which every machine has
    weights = checkpoint["weights"].items()
    halves = {name: w.half() if w.is_floating_point() else w for name, w in weights}
    checkpoint["weights"] = halves
    target.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(target, checkpoint)
    print(target, file=sys.stderr)


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
    photos = {"nargs": "+", "default": [], "metavar": "FILE"}
    add("--image", type=to_path, **photos, help="photos to classify, no test")
    out = "folder to write to, where NAME.json is copied (default: that of the checkpoint)"
    add("--out", type=to_path, metavar="FOLDER", help=out)
    add("--export", type=to_path, metavar="FILE", help="write the weights to FILE, no test")
    add("--tta", action="store_true", help="test-time augmentation, by six views, as well")
    once = "skip what was tested, is not finished or held images out"
    add("--once", action="store_true", help=once)
    add("--data-dir", type=to_path, help="where CIFAR-10 is (default: where it was for training)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps ... (default: auto)")
    precision = "of convolutions and linear layers (default: that of training)"
    add("--precision", choices=PRECISIONS, default="auto", help=precision)
    args = parser.parse_args(argv)
    args.checkpoints = expand_patterns(args.checkpoints)
    args.image = expand_patterns(args.image)
    if args.export and (args.image or args.tta or args.once or args.out):
        parser.error("--export writes weights: without --image, --tta, --once and --out")
    if args.image and args.once:
        parser.error("--once is of tests: without --image")
    if args.export and len(args.checkpoints) > 1:
        parser.error(f"--export writes one checkpoint, not {len(args.checkpoints)}")
    if args.out and len({path.stem for path in args.checkpoints}) < len(set(args.checkpoints)):
        parser.error("--out: two checkpoints have the same name: test one by one")
    return args


def main(argv=None):
    """Test checkpoints, or classify photos with them; failures exit with 1 and a line each."""
    args = parse_args(argv)
    failed = False
    for path in args.checkpoints:
        try:
            if args.export:
                export(path, args.export)
            elif args.image:
                failed |= not classify(path, args)
            else:
                evaluate(path, args)
        except (OSError, ValueError) as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            failed = True
        except (RuntimeError, MemoryError) as error:
            reason = explain_out_of_memory(error)
            if not reason:
                raise
            advice = "free some memory, or try --device cpu"
            print(f"evaluate.py: error: {path}: {reason}: {advice}", file=sys.stderr)
            failed = True
        except KeyboardInterrupt:
            sys.exit(130)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    harden_output()
    main()
