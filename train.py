"""Train one network of gated multi-convolution blocks: options in, weights and history out.

python train.py --arch 64 128 256 512 --k 3 --epochs 15       # the report's final model
python train.py --arch 16 8 4 --fc 1 --name small             # a small one
python train.py --arch 16 8 4 --fc 1 --name small --resume    # go on where that was interrupted
python train.py --dataset shapes --arch 16 32 --hidden 256    # needs no data set
python train.py --holdout 5000                                # leaves the test images unseen

The weights go to runs/NAME.pt at the end, the history to runs/NAME.json after every epoch. About
every minute, and when the run is stopped, its state is saved in runs/NAME.state.pt, which --resume
goes on from: kill -9 loses what came after it. The metrics of a run are its last epoch's.
"""

import contextlib
import math
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import data
import fast
from checkpoint import claim
from device import (
    PRECISIONS,
    RANK,
    WORLD_SIZE,
    autocast,
    choose_device,
    distribute,
    environment,
    precision_on,
)
from history import hyperparameters, make_parser, number
from model import DEFAULTS, GATES, build_model, count_macs, predict
from run import Run, Stop, first_process_first, say

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
SHARE = slice(RANK, None, WORLD_SIZE)  # this process's images of every batch
MOST_HALVINGS = 4  # 32x32 to 2x2: batch statistics of a single image need more than one pixel
RESERVED = (".state", "-test", "-gates", "-wrong", "-predictions")  # endings of its other files


def train(args):
    """Train the run of these options to its last epoch, from where it was saved.
    Raises Stop if it ends early; OSError and ValueError say why it cannot begin."""
    run = Run(args)
    device = choose_device(args.device)
    precision, fast.FORM = precision_on(device, run.precision), args.mix
    with first_process_first():  # it may have to download
        both = data.load_both(args.dataset, args.data_dir, args.holdout, args.limit, device)
    train_set, validation_set = both
    model = make_model(args, device, precision)
    optimizer = make_optimizer(model, args)
    scheduler = make_scheduler(optimizer, args, math.ceil(len(train_set) / args.batch_size))
    ema = make_ema(model, args)
    in_precision = autocast(device, precision)
    criterion = nn.CrossEntropyLoss(reduction="sum", label_smoothing=args.label_smoothing)
    network = torch.compile(distribute(model)) if args.compile else distribute(model)
    parts = {"weights": model, "optimizer": optimizer, "scheduler": scheduler, "ema": ema}
    run.start(parts, describe_run(model, device, precision), len(train_set), device)
    while run.epoch < args.epochs:
        model.train()
        for images, labels in data.batches(
            train_set, args.dataset, args.batch_size, device, args.seed, run.epoch, run.step,
            args.augment, SHARE,
        ):  # fmt: skip
            lr = scheduler.get_last_lr()[0]
            torch.manual_seed(data.derive_seed(args.seed, run.epoch, run.step, RANK))  # dropout
            with in_precision:
                logits = network(images)
                loss = criterion(logits, labels) / run.sizes[run.step]
            optimizer.zero_grad()
            (loss * WORLD_SIZE).backward()  # the processes average their gradients
            optimizer.step()
            if args.schedule == "onecycle":
                scheduler.step()  # the learning rate changes with every batch
            if ema:
                ema.update_parameters(model)
            correct = (logits.argmax(1) == labels).sum()
            run.after_batch(loss, correct, lr)  # saves the state if it is time to; may stop
        batches = data.batches(validation_set, args.dataset, device=device, share=SHARE)
        logits, labels = predict(ema or network, run.save_between(batches), in_precision)
        if args.schedule != "onecycle":
            scheduler.step()  # or with every epoch; a state saved in validation has not stepped
        run.after_epoch(logits, labels)
    run.finish(ema.module if ema else model)


def make_model(args, device, precision):
    """The network of the options, initialised from the seed alone, on the device."""
    torch.manual_seed(args.seed)
    try:
        model = build_model(vars(args)).to(device)
    except (RuntimeError, OverflowError, TypeError) as error:  # too large for memory, or numbers
        reason = str(error).partition("\n")[0]
        raise ValueError(f"no model with --arch {args.arch} here: {reason}") from error
    return model.to(memory_format=fast.memory_format(device, precision))


def make_optimizer(model, args):
    """PyTorch's optimiser with the options that are given, its step fused where that exists.
    Without args.bias_decay, weights decay, but not biases and the scales of normalisation."""
    parameters = list(model.parameters())
    given = [(name, getattr(args, name)) for name in ("weight_decay", "momentum", "nesterov")]
    options = {name: value for name, value in given if value is not None and value is not False}
    groups = [{"params": parameters}]
    if not args.bias_decay:
        weights = [tensor for tensor in parameters if tensor.dim() > 1]
        others = [tensor for tensor in parameters if tensor.dim() <= 1]
        groups = [{"params": weights}, {"params": others, "weight_decay": 0}]
    fused = parameters[0].device.type in ("cpu", "cuda")
    return OPTIMIZERS[args.optimizer](groups, lr=args.lr, fused=fused, **options)


def make_scheduler(optimizer, args, steps):
    """PyTorch's scheduler of args.epochs epochs, stepped with each; "onecycle" with each step: up
    to args.lr in the first 30 % of the run, then down to nearly nothing (Smith and Topin 2017)."""
    if args.schedule == "onecycle":
        return OneCycleLR(optimizer, args.lr, args.epochs * steps, cycle_momentum=False)
    if args.schedule == "cosine":
        return CosineAnnealingLR(optimizer, args.epochs)
    return ConstantLR(optimizer, factor=1)


def make_ema(model, args):
    """The exponential moving average of a model's weights and batch statistics, or None."""
    if args.ema is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)


def describe_run(model, device, precision):
    """What a history says of the model and where it trains; the first process prints it, too."""
    where = environment(device, precision)
    parameters, macs = sum(weights.numel() for weights in model.parameters()), count_macs(model)
    say(f"{parameters:,} parameters, {macs:,} multiply-accumulates an image, "
        f"on {where['device']}, {where['precision']}")  # fmt: skip
    return {"environment": where, "parameters": parameters, "macs": macs}


def parse_args(argv=None):
    """The options of one run as a namespace. Wrong ones end in a line on stderr and exit code 2."""
    parser = make_parser(__doc__)
    natural, positive, fraction = number(int, 0), number(int, 1), number(float, 0, 1)

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=data.CLASSES, default="cifar10", help="shapes is drawn, not read")
    add("--data-dir", default="data", help="where CIFAR-10 is, or is downloaded to")
    add("--batch-size", type=positive, default=128, help="images per optimiser step")
    add("--holdout", type=natural, default=0, metavar="N", help="validate on N training images")
    add("--limit", type=positive, metavar="N", help="train on the first N images; None: all")
    add("--augment", nargs="+", action="extend", choices=data.AUGMENTATIONS, default=[],
        help="random changes of the training images")  # fmt: skip

    add = parser.add_argument_group("model").add_argument
    add("--arch", type=positive, nargs="+", metavar="C", help="output channels of each block")
    add("--k", type=positive, help="convolutions per block")
    add("--gate", choices=GATES, help="activation of the coefficients")
    add("--no-block-relu", dest="block_relu", action="store_false",
        help="no ReLU after a block (with it: %(default)s)")  # fmt: skip
    add("--norm", choices=("none", "batch"), help="batch normalisation of the blocks' sums")
    add("--downsample", action="store_true", help="max pooling where the width of blocks changes")
    add("--residual", action="store_true", help="add a block's input where it keeps the width")
    add("--pool", choices=("adaptive", "avg"), help="AdaptiveAvgPool2d(8) or AvgPool2d(8)")
    add("--fc", type=positive, help="number of fully connected layers")
    add("--hidden", type=positive, help="units of each hidden one")
    add("--dropout", type=fraction, help="probability, after each hidden layer")
    add("--init", choices=("he", "default"), help="initialisation: He's or PyTorch's default")

    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="PyTorch's own")
    add("--lr", type=number(float, 0, above=True), default=0.001, help="learning rate")
    add("--weight-decay", type=number(float, 0), help="None: the optimiser's own default")
    add("--no-bias-decay", dest="bias_decay", action="store_false",
        help="no weight decay of biases and norms (with it: %(default)s)")  # fmt: skip
    add("--momentum", type=fraction, help="of sgd; None: PyTorch's default, 0")
    add("--nesterov", action="store_true", help="Nesterov's momentum")
    add("--schedule", choices=("cosine", "onecycle", "none"), default="cosine",
        help="cosine: down, epoch by epoch; onecycle: up to --lr and down, by batches")  # fmt: skip
    add("--label-smoothing", type=fraction, default=0.0, help="probability shared by all classes")
    add("--ema", type=number(float, 0, 0.9999), metavar="DECAY",
        help="decay of the weights' moving average, which is then validated and kept")  # fmt: skip
    add("--epochs", type=positive, default=15, help="passes over the training images")

    add = parser.add_argument_group("run").add_argument
    add("--name", help="name of its files; None: made from the options")
    add("--out", type=Path, default=Path("runs"), help="folder for them")
    add("--seed", type=natural, default=0, help="seed of everything random")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps ...; auto: cuda if there is one")
    add("--precision", choices=PRECISIONS, default="auto", help="of the forward pass; auto: "
        "bfloat16 on cuda and on CPUs with instructions for it, else float32")  # fmt: skip
    add("--mix", choices=fast.MIXES, default="auto", help="form of the gated sum; auto: fastest")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--resume", action="store_true", help="go on with NAME where it stopped, if it was begun")
    add("--overwrite", action="store_true", help="replace NAME")
    add("--reported", type=number(float, 0, 100), metavar="PERCENT", help="a published accuracy")
    parser.set_defaults(**DEFAULTS)
    args = parser.parse_args(argv)
    refuse_contradictions(args, parser)
    args.augment = [name for name in data.AUGMENTATIONS if name in args.augment]
    args.name = args.name or make_name(args, parser)
    return args


def refuse_contradictions(args, parser):
    """Usage errors that no single option can see."""
    if args.name is not None:
        plain = args.name == Path(args.name).name and args.name.isprintable()
        if not plain or args.name in ("", ".."):
            parser.error(f"--name {args.name!r} becomes part of file names; --out takes the folder")
        if args.name.endswith(RESERVED) or args.name == "comparison":
            parser.error(f"--name {args.name!r}: another run's file or picture is called so")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite replaces it: give one of them")
    if args.momentum is not None and args.optimizer != "sgd":
        parser.error(f"--momentum {args.momentum} is for --optimizer sgd, not {args.optimizer}")
    if args.nesterov and not args.momentum:
        parser.error("--nesterov is for --optimizer sgd with a --momentum above 0: give that")
    halvings = sum(before != after for before, after in pairwise(args.arch))
    if args.downsample and halvings > MOST_HALVINGS:
        parser.error(f"--downsample halves at most {MOST_HALVINGS} times; the widths of --arch "
                     f"{' '.join(map(str, args.arch))} change {halvings} times")  # fmt: skip


def make_name(args, parser):
    """Data set, arch, k, and what else is not the default: shapes-16-32-k3-epochs-2."""
    parts = [args.dataset, *args.arch, f"k{args.k}"]
    for option, value in hyperparameters(vars(args)).items():
        if option not in ("dataset", "arch", "k") and value != parser.get_default(option):
            words = value if isinstance(value, list) else [value]
            parts.append("-".join([option.replace("_", "-"), *map(str, words)]))
    return "-".join(map(str, parts)).replace("-seed-", "-seed")  # as ablations.sh names seeds


def main(argv=None):
    """Train the run that the options say; it ends in a line and an exit code where it fails."""
    args = parse_args(argv)
    try:
        with claim(args.out, args.name) if RANK == 0 else contextlib.nullcontext():
            train(args)
    except Stop as stop:
        reason, code = stop.args
        print(f"train.py: {reason}", file=sys.stderr)
        sys.exit(code)
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: error: {error}")
    except RuntimeError as error:
        reason = str(error).partition("\n")[0][:200]
        if not args.compile and not any(word in reason for word in ("memory", "alloc")):
            raise
        advice = "without --compile" if args.compile else "a smaller --batch-size"
        sys.exit(f"train.py: error: {reason}: try {advice}")
    except KeyboardInterrupt:  # before the first batch
        sys.exit(130)


if __name__ == "__main__":
    main()
