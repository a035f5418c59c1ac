"""Train one network of gated multi-convolution blocks: options in, weights and history out.

python train.py --arch 64 128 256 512 --k 3 --epochs 15       # the report's final model
python train.py --arch 16 8 4 --fc 1 --name small             # a small one
python train.py --arch 16 8 4 --fc 1 --name small --resume    # go on where that was interrupted
python train.py --dataset shapes --arch 16 32 --hidden 256    # needs no data set
python train.py --holdout 5000 --name held-out                # leaves the test images unseen

The weights go to runs/NAME.pt, the history to runs/NAME.json after every epoch. About every minute,
and when the run is stopped, runs/NAME.pt also gets all that --resume needs: kill -9 loses what was
done after that. The metrics of a run are its last epoch's: no best epoch is picked.
"""

import argparse
import contextlib
import inspect
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fast
from data import AUGMENTATIONS, CLASSES, derive_seed, hold_out, load
from device import (
    LOCAL_RANK,
    PRECISIONS,
    RANK,
    SHARE,
    WORLD_SIZE,
    all_reduce,
    autocast,
    barrier,
    choose_precision,
    distribute,
    distribute_loss,
    explain_out_of_memory,
    first_line,
    join_processes,
    set_up_device,
)
from history import harden_output, to_path
from model import DEFAULTS, GATES, IMAGE_SIZE, WHITENING, build_model, predict
from run import (
    Run,
    claim,
    describe_run,
    find_checkpoint,
    is_finished,
    restore_history,
    restored_signals,
    stop,
)

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def train(args, command, saved):
    """Train the run of these options to its last epoch, from where it was saved, if it was.
    Ends the process if it is stopped; OSError and ValueError say why it cannot begin."""
    device = set_up_device(args.device, LOCAL_RANK)
    join_processes(device)
    # A run goes on in the precision that it began in, on whatever processor.
    precision = saved["precision"] if saved else choose_precision(device, args.precision)
    amp = autocast(device, precision)
    fast.FORM = args.mix  # of the blocks' sums
    train_set, validation_set = load_data(args, device)
    steps = math.ceil(len(train_set) / args.batch_size)  # of an epoch
    model = make_model(args, train_set, device, precision)
    optimizer = make_optimizer(model, args)
    criterion = distribute_loss(nn.CrossEntropyLoss(label_smoothing=args.label_smoothing))
    network = torch.compile(distribute(model)) if args.compile else distribute(model)
    info = describe_run(model, device, precision)
    # Restores what was saved, or writes the first files.
    run = Run(args, command, saved, len(train_set), info, model, optimizer)

    first, start = run.position  # epoch and step: (0, 0), or where the run was saved
    for epoch in range(first, args.epochs):
        model.train()
        batches = train_set.batches(args.batch_size, args.seed, epoch, start, args.augment, SHARE)
        for step, (x, labels) in enumerate(batches, start):
            lr = learning_rate(args, epoch, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(derive_seed(args.seed, epoch, step, RANK))  # for dropout
            with amp:
                logits = network(x)
                loss = criterion(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            correct = (logits.argmax(1) == labels).sum()
            run.log_batch(epoch, step, lr, loss, correct)  # saves if it is time to; may stop
        batches = run.watch(validation_set.batches(share=SHARE))  # may save or stop, too
        metrics = validate(network, batches, amp)
        run.log_epoch(epoch, **metrics)
        start = 0
    run.finish()


def validate(model, batches, amp):
    """Return a model's loss and accuracy (%) on the batches of all processes."""
    logits, labels = predict(model, batches, amp)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(1) == labels).sum()
    sums = torch.stack([loss, correct, torch.full_like(loss, len(labels))])
    loss, correct, images = all_reduce(sums).tolist()
    return {"val_loss": loss / images, "val_accuracy": 100 * correct / images}


def load_data(args, device):
    """Return the training and validation images of the options, on the device. Validation is on the
    test images or on those held out. ValueError if there are not as many as the options need."""
    if RANK > 0:
        barrier()  # the first process may have to download
    try:
        train_set = load(args.dataset, args.data_dir)
        if args.holdout:
            train_set, validation_set = hold_out(train_set, args.holdout)
        else:
            validation_set = load(args.dataset, args.data_dir, train=False)
    finally:
        if RANK == 0:
            barrier()  # if it failed, the others fail by the same
    if args.limit and args.limit > len(train_set):
        raise ValueError(f"--limit {args.limit}: there are {len(train_set)} training images")
    train_set = train_set[: args.limit]
    refuse_single_images(args, len(train_set), device)
    return train_set.to(device), validation_set.to(device)


def refuse_single_images(args, images, device):
    """ValueError if an epoch of so many images would leave batch normalisation a single number to
    normalise: one image, halved to one pixel. On CPUs each process normalises its own share."""
    least = 2 * WORLD_SIZE if device.type == "cpu" else 2
    last = images % args.batch_size or args.batch_size
    one_pixel = len(set(args.downsample)) == most_halvings(args)
    if args.norm == "batch" and one_pixel and last < least:
        raise ValueError(
            f"--batch-size {args.batch_size}: the last batch of {images} images has {last}, and "
            f"--norm batch needs {least} where --downsample leaves one pixel: give another"
        )


def most_halvings(args):
    """Return how often the images can be halved, to a single pixel."""
    size = IMAGE_SIZE - (WHITENING - 1 if args.whiten else 0)
    return size.bit_length() - 1


def make_model(args, train_set, device, precision):
    """Return the network of the options, initialised from the seed, on the device. --whiten is
    fitted to the first images."""
    torch.manual_seed(args.seed)
    model = build_model(vars(args), len(train_set.classes))
    if args.whiten:
        x, _ = next(train_set.batches(1_000))  # a million patches, for 12 x 12 covariances
        model.whitening.fit(x.cpu())
    return model.to(device, memory_format=fast.memory_format(device, precision))


def make_optimizer(model, args):
    """Return PyTorch's optimiser with the options given, its step fused where it can be."""
    kind, parameters = OPTIMIZERS[args.optimizer], list(model.parameters())
    options = {"weight_decay": args.weight_decay, "momentum": args.momentum}
    options = {name: value for name, value in options.items() if value is not None}
    if args.nesterov:
        options["nesterov"] = True
    if "fused" in inspect.signature(kind).parameters:
        options["fused"] = parameters[0].device.type in ("cpu", "cuda")
    return kind(parameters, lr=args.lr, **options)


def learning_rate(args, epoch, step, steps):
    """Return the learning rate of a step; an epoch has `steps`."""
    if args.schedule == "cosine":  # epoch by epoch, as the report is read
        return args.lr * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
    if args.schedule == "onecycle":  # step by step, up in a fifth of the run (Smith and Topin 2017)
        done, all_steps = epoch * steps + step, args.epochs * steps
        return args.lr * min((done + 1) / (0.2 * all_steps), (all_steps - done) / (0.8 * all_steps))
    return args.lr


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default, and the examples as they are written."""


def number(kind, low, high=2**31):
    """Return an argparse type: an int or float from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it where kind(text) fails
    return parse


def parse_args(argv=None):
    """Return the options of a run. Wrong ones end in a line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter
    )
    natural, positive, fraction = number(int, 0), number(int, 1), number(float, 0, 1)
    on_off = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=CLASSES, default="cifar10", help="shapes is drawn, not read")
    add("--data-dir", type=to_path, default="data", help="where CIFAR-10 is, or is downloaded to")
    add("--batch-size", type=positive, default=128, help="images per optimiser step")
    add("--holdout", type=natural, default=0, metavar="N", help="validate on N training images")
    add("--limit", type=positive, metavar="N", help="train on the first N images; None: all")
    names = {"nargs": "+", "action": "extend", "choices": AUGMENTATIONS, "default": []}
    add("--augment", **names, help="random changes of the training images, in this order")

    add = parser.add_argument_group("model").add_argument
    add("--arch", type=positive, nargs="+", metavar="C", help="output channels of each block")
    add("--k", type=positive, help="convolutions per block")
    add("--gate", choices=GATES, help="activation of the coefficients")
    add("--block-relu", action=on_off, help="ReLU after a block")
    add("--norm", choices=("none", "batch"), help="batch normalisation of the blocks' sums")
    halves = "max pooling in these blocks, counted from 1, before the norm"
    add("--downsample", type=positive, nargs="+", metavar="N", help=halves)
    pools = "AdaptiveAvgPool2d(8) (of 32x32 pixels), AvgPool2d(8), or the largest of the image"
    add("--pool", choices=("adaptive", "avg", "max"), help=pools)
    add("--fc", type=positive, help="number of fully connected layers")
    add("--hidden", type=positive, help="units of each hidden one")
    add("--dropout", type=fraction, help="probability, after each hidden layer")
    add("--logit-scale", type=number(float, 0), help="factor of the last layer's outputs")
    inits = "He's, PyTorch's default, or this with the identity added in the blocks (dirac)"
    add("--init", choices=("he", "default", "dirac"), help=inits)
    whitening = "a fixed layer before the first block that decorrelates the images' 2x2 patches"
    add("--whiten", action=on_off, help=whitening)
    parser.set_defaults(**DEFAULTS)

    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="PyTorch's own")
    add("--lr", type=number(float, 0), default=0.001, help="learning rate")
    add("--weight-decay", type=number(float, 0), help="None: the optimiser's own default")
    add("--momentum", type=fraction, help="None: the optimiser's own default, 0 of sgd")
    add("--nesterov", action=on_off, default=False, help="Nesterov's momentum")
    schedules = "cosine: down, epoch by epoch; onecycle: up to about --lr and down, by batches"
    add("--schedule", choices=("cosine", "onecycle", "none"), default="cosine", help=schedules)
    add("--label-smoothing", type=fraction, default=0.0, help="probability shared by all classes")
    add("--epochs", type=positive, default=15, help="passes over the training images")

    add = parser.add_argument_group("run").add_argument
    add("--name", help="of its files, with -seedN for a seed but 0; None: from data set, arch, k")
    add("--out", type=to_path, default="runs", help="folder for them")
    add("--seed", type=natural, default=0, help="seed of everything random")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps ...; auto: cuda if there is one")
    auto = "of convolutions; auto: bfloat16 on cuda and CPUs with instructions for it, else float32"
    add("--precision", choices=PRECISIONS, default="auto", help=auto)
    forms = ("auto", *fast.FORMS)
    add("--mix", choices=forms, default="auto", help="form of the gated sum; auto: fastest")
    add("--compile", action="store_true", help="torch.compile the network")
    resume = "continue NAME where it stopped; start it if there is none"
    add("--resume", action="store_true", help=resume)
    add("--overwrite", action="store_true", help="replace NAME")
    percent = {"type": number(float, 0, 100), "metavar": "PERCENT"}
    add("--reported", nargs="+", default=[], **percent, help="published accuracies")
    args = parser.parse_args(argv)
    args.augment = [name for name in AUGMENTATIONS if name in args.augment]  # each once, in order
    if args.name is None:
        args.name = "-".join(map(str, [args.dataset, *args.arch, f"k{args.k}"]))
    refuse_contradictions(args, parser)
    args.name += f"-seed{args.seed}" if args.seed else ""
    return args


def refuse_contradictions(args, parser):
    """Refuse options that contradict each other."""
    name = args.name
    if not name or name != Path(name).name or name == ".." or not name.isprintable():
        parser.error(f"--name {name!r} becomes part of file names; --out takes the folder")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite replaces it: give one of them")
    halving, blocks, most = set(args.downsample), len(args.arch), most_halvings(args)
    if len(halving) > most or max(halving, default=0) > blocks:
        numbers = " ".join(map(str, args.downsample))
        parser.error(
            f"--downsample {numbers}: --arch has blocks 1 to {blocks}, at most {most} of which "
            "can halve the images"
        )
    if args.batch_size % WORLD_SIZE:
        parser.error(
            f"--batch-size {args.batch_size}: {WORLD_SIZE} processes have equal shares of a batch: "
            "give a multiple"
        )
    try:
        make_optimizer(nn.Linear(1, 1), args)
    except (TypeError, ValueError) as error:  # such as a momentum that it does not take
        parser.error(f"--optimizer {args.optimizer}: {error}")


def main(argv=None):
    """Train the run that the options say; failures exit with a line and code 1."""
    command = sys.argv if argv is None else ["train.py", *argv]
    args = parse_args(command[1:])
    try:
        with (
            claim(args.out, args.name) if RANK == 0 else contextlib.nullcontext(),
            restored_signals(),
        ):
            saved = find_checkpoint(args)
            if saved and is_finished(saved, args):
                restore_history(saved, args)
                stop(f"{args.out / args.name}.json is finished: nothing to do", 0)
            train(args, command, saved)
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: error: {error}")
    except (RuntimeError, MemoryError) as error:
        if reason := explain_out_of_memory(error):
            advice = "a smaller network or --batch-size"
        elif args.compile:
            reason, advice = first_line(error), "without --compile"
        else:
            raise
        sys.exit(f"train.py: error: {reason}: try {advice}")
    except KeyboardInterrupt:  # before the first batch
        sys.exit(130)


if __name__ == "__main__":
    harden_output()
    main()
