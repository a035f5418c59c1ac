"""The command line of train.py: every option with its default and its check."""

import argparse
import math
from itertools import pairwise
from pathlib import Path

from data import AUGMENTATIONS, CLASSES
from device import PRECISIONS
from history import hyperparameters
from model import DEFAULTS, GATES, IMAGE_SIZE
from optimisation import OPTIMIZERS

MOST_HALVINGS = 4  # to 2x2: batch statistics of a single image need more than one pixel


def parse_args(description, argv=None):
    """The options of one run as a namespace. Wrong ones end in a line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0],
        epilog=description.partition("\n")[2],
        formatter_class=HelpFormatter,
    )
    positive = number(int, 1)

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=CLASSES, default="cifar10", help="shapes is drawn, not read")
    add("--data-dir", default="data", help="where CIFAR-10 is, or is downloaded to")
    add("--batch-size", type=positive, default=128, help="images per optimiser step")
    add("--holdout", type=number(int, 0), default=0, metavar="N",
        help="validate on N held-out training images, not on the test images")  # fmt: skip
    add("--limit", type=positive, metavar="N", help="train on the first N images only")
    add("--augment", nargs="+", action="extend", choices=AUGMENTATIONS, default=[],
        help="random changes of the training images")  # fmt: skip

    add = parser.add_argument_group("model").add_argument
    add("--arch", type=positive, nargs="+", default=DEFAULTS["arch"], metavar="C",
        help="output channels of each block")  # fmt: skip
    add("--k", type=positive, default=DEFAULTS["k"], help="convolutions per block")
    add("--gate", choices=GATES, default=DEFAULTS["gate"], help="activation of the coefficients")
    add("--no-block-relu", dest="block_relu", action="store_false",
        help="no ReLU on the outputs of blocks")  # fmt: skip
    add("--norm", choices=("none", "batch"), default=DEFAULTS["norm"],
        help="batch normalisation of the blocks' sums")  # fmt: skip
    add("--downsample", action="store_true",
        help="halve the images between two blocks of different width, by max pooling")  # fmt: skip
    add("--residual", action="store_true",
        help="add its input to the output of a block that keeps the width")  # fmt: skip
    add("--pool", choices=("adaptive", "avg"), default=DEFAULTS["pool"],
        help="of the classifier: AdaptiveAvgPool2d(8) or AvgPool2d(8)")  # fmt: skip
    add("--fc", type=positive, default=DEFAULTS["fc"], help="fully connected layers")
    add("--hidden", type=positive, default=DEFAULTS["hidden"], help="size of the hidden ones")
    add("--dropout", type=number(float, 0, 1), default=DEFAULTS["dropout"],
        help="probability, after each hidden layer")  # fmt: skip
    add("--init", choices=("he", "default"), default=DEFAULTS["init"],
        help="initialisation: He's or PyTorch's default")  # fmt: skip

    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="PyTorch's own")
    add("--lr", type=number(float, 0, above=True), default=0.001, help="learning rate")
    add("--weight-decay", type=number(float, 0), help="None: the optimiser's own default")
    add("--no-bias-decay", dest="bias_decay", action="store_false",
        help="weight decay on weights only, not on biases and normalisation")  # fmt: skip
    add("--momentum", type=number(float, 0, 1), help="of sgd; None: PyTorch's default, 0")
    add("--nesterov", action="store_true", help="Nesterov's momentum")
    add("--schedule", choices=("cosine", "onecycle", "none"), default="cosine",
        help="of the learning rate over the whole run: cosine, stepped every epoch, or up to --lr "
        "and down again, stepped every batch")  # fmt: skip
    add("--label-smoothing", type=number(float, 0, 1), default=0.0,
        help="probability shared out among all classes, in training")  # fmt: skip
    add("--ema", type=number(float, 0, 0.9999), metavar="DECAY",
        help="of an average of the weights, which is then validated and kept")  # fmt: skip
    add("--epochs", type=positive, default=15, help="passes over the training images")

    add = parser.add_argument_group("run").add_argument
    add("--name", help="of the files it writes; None: made from the options")
    add("--out", type=Path, default=Path("runs"), help="folder for them")
    add("--seed", type=number(int, 0), default=0, help="of everything random")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps ...; auto: cuda if there is one")
    add("--precision", choices=PRECISIONS, default="auto",
        help="of the forward pass; auto: bfloat16 on cuda and on CPUs with instructions for it, "
        "else float32")  # fmt: skip
    add("--mix", choices=("auto", "outputs", "kernels"), default=DEFAULTS["mix"],
        help="how a block forms its sum: weighted outputs, or kernels mixed first")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the network")
    add("--resume", action="store_true", help="go on with NAME where it stopped, if it was begun")
    add("--overwrite", action="store_true", help="replace NAME")
    add("--reported", type=number(float, 0, 100), metavar="PERCENT",
        help="a published accuracy to compare with, kept in the history")  # fmt: skip

    args = parser.parse_args(argv)
    _check(args, parser)
    args.augment = [name for name in AUGMENTATIONS if name in args.augment]
    args.name = args.name or _default_name(args, parser)
    return args


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default, and the examples as they are written."""


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite int or float of at least low (`above`: more) and at most high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf or (above and value == low):
            least = f"more than {low}" if above else f"at least {low}"
            most = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {least}{most}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it where kind(text) fails
    return parse


def _check(args, parser):
    """What no single option can see."""
    if args.name is not None and (args.name != Path(args.name).name or args.name in ("", "..")):
        parser.error(f"--name {args.name!r} is to be part of file names; the folder goes to --out")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite replaces it: give one of them")
    if args.momentum is not None and args.optimizer != "sgd":
        parser.error(f"--momentum {args.momentum} is for --optimizer sgd, not {args.optimizer}")
    if args.nesterov and not args.momentum:
        parser.error("--nesterov is for --optimizer sgd with a --momentum above 0: give that")
    halvings = sum(before != after for before, after in pairwise(args.arch))
    if args.downsample and halvings > MOST_HALVINGS:
        parser.error(
            f"--downsample halves {IMAGE_SIZE}x{IMAGE_SIZE} images at most {MOST_HALVINGS} times; "
            f"the widths of --arch {' '.join(map(str, args.arch))} change {halvings} times"
        )


def _default_name(args, parser):
    """Data set, arch, k, and what else is not the default: shapes-16-32-k3-epochs-2."""
    parts = [args.dataset, *args.arch, f"k{args.k}"]
    for option, value in hyperparameters(vars(args)).items():
        if option not in ("dataset", "arch", "k") and value != parser.get_default(option):
            words = value if isinstance(value, list) else [value]
            parts.append("-".join([option.replace("_", "-"), *map(str, words)]))
    return "-".join(map(str, parts))
