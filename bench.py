"""Time the forms of a block's sum, and training steps against their textbook forms.

python bench.py                                # a quarter of an hour on two CPU cores
python bench.py --only step                    # a part of it
python bench.py --json results/bench/cpu.json  # keep the seconds

Blocks are timed forward and backward, beside a matrix product of as many operations as one
convolution has. Steps are of training: ours in the precision that `auto` means here, those of
textbook.py in float32, too. What is compared has a process each and takes turns: printed are
medians, and ratios to the first, taken turn by turn.
"""

import argparse
import contextlib
import multiprocessing
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

import fast
import textbook
import train
from data import Dataset
from device import autocast, choose_precision, explain_out_of_memory, set_up_device
from history import harden_output, to_path, write_history
from model import Block
from run import describe_environment

TURNS = 5
SHAPES = (  # of a block: channels in and out, pixels of a side, k
    *((3, 64, 32, 3), (64, 128, 32, 3), (128, 256, 32, 3), (256, 512, 32, 3)),  # of final
    *((8, 4, 32, 3), (16, 8, 32, 3)),  # of row 4
    *((64, 128, 32, 2), (128, 128, 16, 2), (256, 256, 8, 2)),
    *((24, 128, 31, 2), (128, 384, 15, 2), (384, 384, 7, 2)),  # behind --whiten
)
ROWS = {  # of ablations.sh and recipe.sh: options of train.py, less those of the optimiser
    "row 4": "--arch 16 8 4 --fc 1 --init default",
    "row 2": "--arch 64 128 256 --k 2 --fc 1 --init default",
    "the final model": "",
    "best": "--arch 128 128 384 384 384 384 --downsample 1 3 5 --k 2 --fc 1 --norm batch "
    "--whiten --init dirac --batch-size 1024 --pool max --logit-scale 0.111",
}


class BestBlock(textbook.Block):
    """A block of `best` with the textbook's sum. What the report's blocks have not, max pooling and
    batch norm, is that of a block of ours."""

    def __init__(self, block):
        k, outputs = block.gate_linear.out_features, block.norm.num_features
        super().__init__(block.convs.in_channels, outputs, k, relu=False)
        self.pool, self.norm = block.pool, block.norm

    def forward(self, x):
        return F.relu(self.norm(self.pool(super().forward(x))))


def compare(what, forms, workers):
    """Time forms in turn and print them; return a row of the results, the seconds of each turn.
    `forms` are, by name, functions that build the function to time, each in a worker of its own."""
    workers = workers[: len(forms)]
    for worker, build in zip(workers, forms.values(), strict=True):
        worker.submit(prepare, build).result()
    turns = [[worker.submit(time_step).result() for worker in workers] for _ in range(TURNS)]
    print(what)
    seconds = dict(zip(forms, zip(*turns)))
    for place, (name, values) in enumerate(seconds.items()):
        ratios = sorted(turn[place] / turn[0] for turn in turns)
        line = f"    {name:<34} {1000 * median(values):>10.2f} ms"
        spread = f"{median(ratios):>8.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(line + (spread if place else ""), flush=True)
    return {"what": what, "seconds": seconds}


def prepare(build):
    """Build the function that time_step times, and warm it up: five calls, or ten seconds."""
    global step
    step = None  # the memory of the last one is free
    fast.limit_threads()  # of all that is compared, whatever builds it
    step, began = build(), time.perf_counter()
    for _ in range(5):  # in the first ones the memory of the process still grows
        if time.perf_counter() - began < 10:
            step()


def time_step():
    """Return the wall-clock seconds of a call, the device's work included: the mean of as many as
    fill a fifth of a second. As in training, a GPU works through them without being waited for."""
    began, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - began < 0.2:
        step()
        calls += 1
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def make_block(inputs, outputs, size, k, batch, device, precision):
    """Return a block as train.py has it, and what it gets: images, or what a block gives."""
    layout = fast.memory_format(device, precision)
    block = Block(inputs, outputs, k).to(device, memory_format=layout)
    x = torch.randn(batch, inputs, size, size, device=device).to(memory_format=layout)
    return block, x.bfloat16() if precision == "bfloat16" and inputs > 3 else x


def build_block(form, shape, batch, device, precision):
    """Return a function that runs a block forward and backward, its sum in that form."""
    set_up_device(str(device))  # keeps memory
    fast.FORM = form
    block, x = make_block(*shape, batch, device, precision)
    x.requires_grad_(x.shape[1] > 3)

    def step():
        block.zero_grad()
        x.grad = None
        with autocast(device, precision):
            y = block(x)
        y.backward(y.detach())

    return step


def build_product(macs, device, precision):
    """Return a function that multiplies two matrices in so many multiply-accumulates."""
    size = 8192 if device.type == "cuda" else 2048
    options = {"device": device, "dtype": getattr(torch, precision)}
    left = torch.randn(size, size, **options)
    right = torch.randn(size, macs // size**2 + 1, **options)
    return lambda: left @ right


def build_step(args, device, precision):
    """Return a function that does a training step of train.py's options, ours; it returns the
    loss."""
    set_up_device(str(device))  # keeps memory
    train_set = make_images(args)
    model = train.make_model(args, train_set, device, precision)
    optimizer = train.make_optimizer(model, args)
    x, labels = next(train_set.to(device).batches(args.batch_size))

    def step():
        optimizer.zero_grad()
        with autocast(device, precision):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def build_textbook_step(args, device, precision):
    """Return a function that does the same as textbook.py does it."""
    train_set = make_images(args)
    if args.norm == "batch":  # best
        model = train.make_model(args, train_set, torch.device("cpu"), "float32")
        model.backbone = nn.Sequential(*map(BestBlock, model.backbone))
    else:
        model = textbook.build_model(args)
    model.to(device)
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.AdamW(model.parameters(), lr=args.lr)
    batch = next(train_set.to(device).batches(args.batch_size))

    def step():
        with autocast(device, precision):
            loss, _ = textbook.run_epoch(model, [batch], criterion, device, optimizer)
        return loss

    return step


def make_images(args):
    """Return random images with random labels, and make what is random from here on repeatable."""
    torch.manual_seed(args.seed)
    images = torch.randint(256, (1_000, 3, 32, 32), dtype=torch.uint8)
    return Dataset(images, torch.randint(10, (1_000,)), args.dataset)


def list_forms(device, precision):
    """Yield each shape of a block, and functions that build its forms, the chosen one first."""
    for shape in SHAPES:
        inputs, outputs, size, k = shape
        batch = (128 if device.type == "cuda" else 32) * min(16, (32 // size) ** 2)
        block, x = make_block(*shape, batch, device, precision)
        with autocast(device, precision):
            chosen = fast.choose_form(x, block.coefficients(x), block.convs)
        names = sorted(fast.FORMS, key=lambda form: form != chosen)
        forms = {
            form: partial(build_block, form, shape, batch, device, precision) for form in names
        }
        plain = (*shape[:3], 1)
        forms["k = 1, a plain convolution"] = partial(
            build_block, "auto", plain, batch, device, precision
        )
        # Forward, backward of the kernels and, but for images, of the input.
        macs = (3 if inputs > 3 else 2) * batch * size**2 * 9 * inputs * outputs
        forms["one convolution's as a product"] = partial(build_product, macs, device, precision)
        yield f"{inputs} to {outputs}, {size}x{size}, k = {k}, batch {batch}", forms


def list_steps(device, precision):
    """Yield each row, and functions that build its training step, ours and then the textbook's."""
    for row, options in ROWS.items():
        args = train.parse_args(options.split())
        forms = {f"ours, {precision}": partial(build_step, args, device, precision)}
        for other in sorted({precision, "float32"}):
            forms[f"textbook, {other}"] = partial(build_textbook_step, args, device, other)
        yield f"training step of {row}, batch {args.batch_size}", forms


PARTS = {"form": list_forms, "step": list_steps}


def parse_args(argv=None):
    """Return the options. Wrong ones end in a line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: both)")
    where = "where to time (default: auto)"
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=where)
    add("--json", type=to_path, metavar="FILE", help="write the results here as well")
    return parser.parse_args(argv)


def main(argv=None):
    """Time what is asked for, and keep the results; failures exit with 1 and a line."""
    args = parse_args(argv)
    train.WORLD_SIZE = 1  # whatever a cluster's environment says
    try:
        device = set_up_device(args.device)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
        precision = choose_precision(device)
        report = describe_environment(device, precision)
        print(f"{report['device']}, PyTorch {report['torch']}")
        report["results"], context = [], multiprocessing.get_context("spawn")
        for part in args.only:
            with contextlib.ExitStack() as stack:  # only workers that run ours keep memory
                most = range(len(fast.FORMS) + 2)  # beside them k = 1 and a product are timed
                quietly = signal.signal, (signal.SIGINT, signal.SIG_DFL)  # they end by Ctrl-C
                pools = [ProcessPoolExecutor(1, context, *quietly) for _ in most]
                workers = [stack.enter_context(pool) for pool in pools]
                for what, forms in PARTS[part](device, precision):
                    report["results"].append(compare(what, forms, workers))
                    if args.json:
                        write_history(args.json, report)
    except (OSError, ValueError, BrokenProcessPool) as error:  # the last where Linux ends a worker
        sys.exit(f"bench.py: error: {error}")
    except (RuntimeError, MemoryError) as error:
        if reason := explain_out_of_memory(error):
            sys.exit(f"bench.py: error: {reason}: free some memory")
        raise
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    harden_output()
    main()
