"""Time the blocks and the training step against their textbook forms.

python bench.py                                # a quarter of an hour on two CPU cores
python bench.py --only block                   # a part of it
python bench.py --json results/bench/cpu.json  # keep the seconds and ratios

The textbook forms are what a good student writes from the report's text. Ours compute in the
precision that `auto` means on the machine; the textbook in float32, and in bfloat16 where that is
what ours do. Each form has a process of its own and takes turns with the other: seconds are medians
over the turns, ratios are taken turn by turn.
"""

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from device import autocast, choose_device, environment, precision_on
from history import make_parser, write_history
from model import Block, build_model

ROWS = {  # of ablations.sh: options of the network, batch size
    "row 4": ({"arch": [16, 8, 4], "fc": 1}, 128),
    "row 2": ({"arch": [64, 128, 256], "k": 2, "fc": 1}, 128),
    "the final model": ({}, 128),
    "best": ({"arch": [64, 64, 128, 128, 256, 256, 512, 512], "fc": 1, "pool": "avg",
              "norm": "batch", "downsample": True, "residual": True}, 256),
}  # fmt: skip

WIDTHS = ((3, 64), (64, 128), (128, 256), (256, 512))  # of the final model's blocks
PARTS = ("block", "step", "mix", "rate")


class TextbookBlock(nn.Module):
    """A block as the report writes it: k convolutions, their outputs weighted and added."""

    def __init__(self, block):
        super().__init__()
        inputs, outputs = block.convs.in_channels, block.out_channels
        self.convs = nn.ModuleList(nn.Conv2d(inputs, outputs, 3, padding=1) for _ in range(block.k))
        self.gate_linear = nn.Linear(inputs, block.k)
        self.norm, self.residual = block.norm, block.residual

    def forward(self, images):
        coefficients = self.gate_linear(images.mean(dim=(2, 3))).softmax(dim=1)
        outputs = [conv(images) for conv in self.convs]
        weighted = [a[:, None, None, None] * o for a, o in zip(coefficients.unbind(1), outputs)]
        outputs = F.relu(self.norm(sum(weighted)))
        return images + outputs if self.residual else outputs


def compare(what, ours, other, name, turns=5):
    """Time two forms in turn; a row of the results. Each form is (a function that builds a function
    to time, its arguments ...); `name` is that of the other."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as left, ProcessPoolExecutor(1, context) as right:
        left.submit(prepare, *ours).result()
        right.submit(prepare, *other).result()
        both = [[form.submit(time_step).result() for form in (left, right)] for _ in range(turns)]
    seconds, other_seconds = map(median, zip(*both))
    ratios = [theirs / ours for ours, theirs in both]
    ratio, low, high = median(ratios), min(ratios), max(ratios)
    print(f"{what:<46} {1000 * seconds:>9.1f} {1000 * other_seconds:>9.1f}"
          f"  {ratio:>6.2f} ({low:.2f} to {high:.2f})  {name}", flush=True)  # fmt: skip
    return {"what": what, "against": name, "seconds": seconds, "other_seconds": other_seconds,
            "ratio": ratio, "ratio_min": low, "ratio_max": high}  # fmt: skip


def prepare(build, *arguments):
    """Build the function that time_step times, and warm it up: five calls, or ten seconds."""
    global step
    step, seconds = build(*arguments), 0
    for _ in range(5):  # in the first ones the memory of the process still grows
        seconds += time_step() if seconds < 10 else 0


def time_step():
    """Wall-clock seconds of a call, the device's work included."""
    began = time.perf_counter()
    step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def place(tensor_or_module, device):
    """A module, or images (N, C, H, W), in the memory format that train.py uses on the device."""
    kind = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return tensor_or_module.to(device, memory_format=kind)


def build_block(inputs, outputs, size, batch, device, precision, textbook=False, mix="auto"):
    """A function that runs a block with k = 3 forward and backward."""
    if not textbook:
        choose_device(str(device))  # keeps memory
    block = Block(inputs, outputs, 3, mix=mix, size=size)
    block = place(TextbookBlock(block) if textbook else block, device)
    images = place(torch.randn(batch, inputs, size, size), device)
    if precision == "bfloat16" and inputs > 3:
        images = images.bfloat16()  # as the block before gives them
    images.requires_grad_(inputs > 3)

    def step():
        block.zero_grad()
        images.grad = None
        with autocast(device, precision):
            output = block(images)
        output.backward(output.detach())

    return step


def build_backbone(batch, device, precision):
    """A function that runs the blocks of the final model, each alone, forward and backward."""
    steps = [build_block(*widths, 32, batch, device, precision) for widths in WIDTHS]
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
    if not textbook:
        choose_device(str(device))
    torch.manual_seed(0)
    model = build_model(options)
    if textbook:
        layers = [TextbookBlock(b) if isinstance(b, Block) else b for b in model.backbone]
        model.backbone = nn.Sequential(*layers)  # its pools stay ours, which are the faster
    model = place(model, device)
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
    precisions = ["float32"] if precision == "float32" else ["float32", precision]
    batch = 128 if device.type == "cuda" else 32
    forms = {}
    if "block" in only:
        for inputs, outputs in WIDTHS:
            block = (build_block, inputs, outputs, 32, batch, device)
            forms[f"block {inputs} to {outputs}, k = 3"] = block
    if "step" in only:
        for row, (_, images) in ROWS.items():
            forms[f"training step of {row}, batch {images}"] = (build_training, row, device)
    for what, form in forms.items():
        for other in precisions:
            yield compare(what, (*form, precision), (*form, other, True), f"textbook, {other}")
    if "mix" in only:
        for size in (32, 16, 8, 4):
            for inputs, outputs in ((8, 4), (16, 16), (64, 64), (128, 256)):
                block = (build_block, inputs, outputs, size, 2 * batch, device, precision, False)
                what = f"mixed kernels, {inputs} to {outputs}, {size}x{size}"
                yield compare(what, (*block, "kernels"), (*block, "outputs"), "weighted outputs")
    if "rate" in only:
        where = (4 * batch, device, precision)
        ours, products = (build_backbone, *where), (build_products, *where)
        yield compare("the final model's blocks", ours, products, f"matrix products, {precision}")


def parse_args(argv=None):
    """The options, checked; usage errors exit with 2."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of it")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to time")
    add("--json", type=Path, metavar="FILE", help="write the results here as well")
    return parser.parse_args(argv)


def main(argv=None):
    """Time what is asked for, and keep the results; failures exit with 1 and a line."""
    args = parse_args(argv)
    try:
        device = choose_device(args.device)
        os.environ.pop("THP_MEM_ALLOC_ENABLE", None)  # of keep_memory: not for textbook forms
        report = environment(device, "auto")
        print(f"{report['device']}, PyTorch {report['torch']}, ours in {report['precision']}")
        print(f"{'':<46} {'ours, ms':>9} {'other':>9}   other / ours")
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
