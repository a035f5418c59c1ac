"""Time the forms of a block's sum, and training steps against their textbook forms.

python bench.py                                # a quarter of an hour on two CPU cores
python bench.py --only step                    # a part of it
python bench.py --json results/bench/cpu.json  # keep the seconds and ratios

The textbook forms are what a good student writes from the report's text. Ours compute in the
precision that `auto` means on the machine; the textbook in float32, and in bfloat16 where that is
what ours do. Ours and the textbook have a process each and take turns: seconds are medians over the
turns, ratios are taken turn by turn. All are of forward and backward pass; steps add the optimiser.
"""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

import fast
from device import autocast, choose_device, environment, precision_on
from history import to_path, write_history
from model import Block, build_model

ROWS = {  # of ablations.sh: options of the network, batch size
    "row 4": ({"arch": [16, 8, 4], "fc": 1}, 128),
    "row 2": ({"arch": [64, 128, 256], "k": 2, "fc": 1}, 128),
    "the final model": ({}, 128),
    "best": ({"arch": [64, 64, 128, 128, 256, 256, 512, 512], "fc": 1, "pool": "avg",
              "norm": "batch", "downsample": True, "residual": True}, 256),
}  # fmt: skip

WIDTHS = ((3, 64), (64, 128), (128, 256), (256, 512))  # of the final model's blocks
SHAPES = (  # of a block: channels in and out, pixels of a side, k
    *((inputs, outputs, 32, 3) for inputs, outputs in WIDTHS),
    (8, 4, 32, 3), (16, 8, 32, 3), (64, 64, 32, 2), (64, 128, 16, 2), (128, 128, 16, 2),
    (128, 256, 8, 2), (256, 256, 8, 2), (256, 512, 4, 2), (512, 512, 4, 2),
)  # fmt: skip
PARTS = ("form", "step", "rate")


class TextbookBlock(nn.Module):
    """A block as the report writes it: k convolutions, their outputs weighted and added."""

    def __init__(self, block):
        super().__init__()
        inputs, k = block.convs.in_channels, block.gate_linear.out_features
        outputs = block.convs.out_channels // k
        self.convs = nn.ModuleList(nn.Conv2d(inputs, outputs, 3, padding=1) for _ in range(k))
        self.gate_linear = nn.Linear(inputs, k)
        self.norm, self.residual = block.norm, block.residual

    def forward(self, x):
        coefficients = self.gate_linear(x.mean(dim=(2, 3))).softmax(dim=1)
        outputs = [conv(x) for conv in self.convs]
        weighted = [a[:, None, None, None] * o for a, o in zip(coefficients.unbind(1), outputs)]
        y = F.relu(self.norm(sum(weighted)))
        return x + y if self.residual else y


def compare(what, ours, other, name, workers, turns=5):
    """Time two forms in turn; a row of the results. Each form is (a function that builds a function
    to time, its arguments ...); `name` is that of the other; `workers` are a process for each."""
    for worker, form in zip(workers, (ours, other)):
        worker.submit(prepare, *form).result()
    both = [[worker.submit(time_step).result() for worker in workers] for _ in range(turns)]
    seconds, other_seconds = map(median, zip(*both))
    ratios = [theirs / ours for ours, theirs in both]
    ratio, low, high = median(ratios), min(ratios), max(ratios)
    print(f"{what:<42} {1000 * seconds:>9.1f} {1000 * other_seconds:>9.1f}"
          f"  {ratio:>6.2f} ({low:.2f} to {high:.2f})  {name}", flush=True)  # fmt: skip
    return {"what": what, "against": name, "seconds": seconds, "other_seconds": other_seconds,
            "ratio": ratio, "ratio_min": low, "ratio_max": high}  # fmt: skip


def prepare(build, *arguments):
    """Build the function that time_step times, and warm it up: five calls, or ten seconds."""
    global step
    step, seconds = None, 0  # the memory of the last one is free
    step = build(*arguments)
    for _ in range(5):  # in the first ones the memory of the process still grows
        seconds += time_step() if seconds < 10 else 0


def time_step():
    """Wall-clock seconds of a call, the device's work included."""
    began = time.perf_counter()
    step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare_forms(shape, batch, device, precision, worker, turns=5):
    """Time a block of a shape in every form; a row of the results."""
    inputs, outputs, size, k = shape
    seconds = {}
    for form in fast.FORMS:
        worker.submit(prepare, build_block, *shape, batch, device, precision, form).result()
        seconds[form] = median(worker.submit(time_step).result() for _ in range(turns))
    chosen = worker.submit(choose_form, *shape, device, precision).result()
    cells = [
        f"{1000 * value:.2f}{'*' if form == chosen else ' '}" for form, value in seconds.items()
    ]
    what = f"{inputs} to {outputs}, {size}x{size}, k = {k}"
    print(f"{what:<28}" + "".join(f"{cell:>11}" for cell in cells), flush=True)
    return {"what": what, "batch": batch, "chosen": chosen, "seconds": seconds}


def place(tensor_or_module, device, precision):
    """A module, or images (N, C, H, W), in the memory format that train.py uses."""
    return tensor_or_module.to(device, memory_format=fast.memory_format(device, precision))


def build_block(inputs, outputs, size, k, batch, device, precision, form="auto"):
    """A function that runs a block forward and backward, its sum in that form."""
    choose_device(str(device))  # keeps memory
    fast.FORM = form
    block = place(Block(inputs, outputs, k), device, precision)
    x = make_input(inputs, size, batch, device, precision).requires_grad_(inputs > 3)

    def step():
        block.zero_grad()
        x.grad = None
        with autocast(device, precision):
            y = block(x)
        y.backward(y.detach())

    return step


def make_input(channels, size, batch, device, precision):
    """What a block gets: images, or what the block before it gives."""
    x = place(torch.randn(batch, channels, size, size), device, precision)
    return x.bfloat16() if precision == "bfloat16" and channels > 3 else x


def choose_form(inputs, outputs, size, k, device, precision):
    """The form that is chosen for such a block."""
    block = place(Block(inputs, outputs, k), device, precision)
    x = make_input(inputs, size, 1, device, precision)
    with autocast(device, precision):
        return fast.choose_form(x, block.coefficients(x), block.convs)


def build_backbone(batch, device, precision):
    """A function that runs the blocks of the final model, each alone, forward and backward."""
    steps = [build_block(*widths, 32, 3, batch, device, precision) for widths in WIDTHS]
    return lambda: [step() for step in steps]


def build_products(batch, device, precision):
    """A function that multiplies matrices: as many operations as build_backbone's convolutions."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    # Forward, backward of the kernels and, but for the first block, backward of the images.
    macs = sum((3 if i > 3 else 2) * batch * 32 * 32 * 9 * i * o for i, o in WIDTHS)
    return lambda: [left @ right for _ in range(max(1, round(macs / size**3)))]


def build_training(row, device, precision, textbook=False):
    """A function that trains the network of a row of ROWS by one step on random images."""
    options, batch = ROWS[row]
    torch.manual_seed(0)
    if textbook:
        model = build_model(options)
        layers = [TextbookBlock(b) if isinstance(b, Block) else b for b in model.backbone]
        model.backbone = nn.Sequential(*layers)  # its pools stay ours, which are the faster
        model = model.to(device)
    else:
        choose_device(str(device))  # keeps memory
        fast.FORM = "auto"
        model = place(build_model(options), device, precision)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda" or not textbook)
    images = torch.randn(batch, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch,), device=device)

    def step():
        optimizer.zero_grad()
        with autocast(device, precision):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def bench(only, device):
    """Yield a row of results for everything that is asked for."""
    precision = precision_on(device)
    batch = 128 if device.type == "cuda" else 32
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as ours, ProcessPoolExecutor(1, context) as textbook:
        if "form" in only:
            print(
                f"{'forms, ms; * is chosen':<28}" + "".join(f"{form:>10} " for form in fast.FORMS)
            )
            for shape in SHAPES:
                images = batch * min(16, (32 // shape[2]) ** 2)  # as much work for small ones
                yield compare_forms(shape, images, device, precision, ours)
        print(f"{'':<42} {'ours, ms':>9} {'other':>9}   other / ours")
        for row in ROWS if "step" in only else ():
            form = build_training, row, device
            for other in sorted({"float32", precision}, reverse=True):
                what = f"training step of {row}, batch {ROWS[row][1]}"
                forms = (*form, precision), (*form, other, True)
                yield compare(what, *forms, f"textbook, {other}", (ours, textbook))
        if "rate" in only:
            forms = (
                (build, 4 * batch, device, precision) for build in (build_backbone, build_products)
            )
            name = f"matrix products, {precision}"
            yield compare("the final model's blocks", *forms, name, (ours, textbook))


def parse_args(argv=None):
    """Return the options. Wrong ones end in a line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of it (default: all)")
    where = "where to time (default: auto)"
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=where)
    add("--json", type=to_path, metavar="FILE", help="write the results here as well")
    return parser.parse_args(argv)


def main(argv=None):
    """Time what is asked for, and keep the results; failures exit with 1 and a line."""
    args = parse_args(argv)
    try:
        device = choose_device(args.device)
        os.environ.pop("THP_MEM_ALLOC_ENABLE", None)  # of keep_memory: not for textbook forms
        report = environment(device, precision_on(device))
        print(f"{report['device']}, PyTorch {report['torch']}, ours in {report['precision']}")
        report["results"] = list(bench(args.only, device))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_history(args.json, report)
    except (OSError, ValueError) as error:
        sys.exit(f"bench.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
