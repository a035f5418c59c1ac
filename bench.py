"""Time the blocks, the training step and the loader against their textbook forms.

python bench.py                                # under four minutes on two CPU cores
python bench.py --only loader                  # a part of it
python bench.py --json results/bench/cpu.json  # keep the figures

Both forms run in this one process, in turn, on the same data: seconds are medians over the turns,
ratios are taken turn by turn. The textbook forms are what a good student writes from the report's
text; on CUDA they get what ours get: channels_last, autocast, a fused optimiser.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import data
import train
from device import autocast, choose_device, describe
from history import read_history, write_text
from model import Block, build_model

ROWS = {  # those of the report that are timed, and the batch size on the CPU
    "row 4": ({"arch": [16, 8, 4], "fc": 1}, 128),
    "row 2": ({"arch": [64, 128, 256], "k": 2, "fc": 1}, 32),
    "the final model": ({}, 32),
}
REPORTED = 82.84  # test accuracy of the report's final model, in per cent


class TextbookBlock(nn.Module):
    """A block as the report writes it: k convolutions, their outputs weighted and added."""

    def __init__(self, in_channels, out_channels, k):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, 3, padding=1) for _ in range(k)
        )
        self.gate_linear = nn.Linear(in_channels, k)

    def forward(self, images):
        coefficients = self.gate_linear(images.mean(dim=(2, 3))).softmax(dim=1)
        outputs = [conv(images) for conv in self.convs]
        weighted = [a[:, None, None, None] * o for a, o in zip(coefficients.unbind(1), outputs)]
        return F.relu(sum(weighted))


class PerImage(Dataset):
    """A data set as torchvision's are: one PIL image at a time, transformed."""

    def __init__(self, dataset, augment):
        self.images = dataset.tensors[0].permute(0, 2, 3, 1).numpy()
        self.labels = dataset.tensors[1].tolist()
        random = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        last = [transforms.ToTensor(), transforms.Normalize(*data.NORMALISATION["shapes"])]
        self.transform = transforms.Compose([*(random if augment else []), *last])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def compare(what, ours, textbook, device, turns=3):
    """Time two functions in turn, after one turn to warm up; a row of the results."""
    seconds = []
    for _ in range(turns + 1):
        seconds.append([timed(textbook, device), timed(ours, device)])
    textbook_seconds, ours_seconds = (statistics.median(column) for column in zip(*seconds[1:]))
    ratios = [slow / fast for slow, fast in seconds[1:]]
    result = {
        "what": what,
        "ours_seconds": ours_seconds,
        "textbook_seconds": textbook_seconds,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    print(
        f"{what:<52} {1000 * ours_seconds:>9.1f} {1000 * textbook_seconds:>9.1f}"
        f"   {result['ratio']:>6.2f}  ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )
    return result


def timed(function, device):
    """Wall-clock seconds of a call, the device's work included."""
    synchronise(device)
    began = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - began


def synchronise(device):
    """Wait for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_device(tensor_or_module, device):
    """A module, or images (N, C, H, W), in the memory format that train.py uses on the device."""
    kind = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return tensor_or_module.to(device, memory_format=kind)


def block_step(block, images):
    """A function that runs a block forward and backward."""

    def step():
        block.zero_grad()
        images.grad = None
        with autocast(images.device):
            output = block(images)
        output.backward(output.detach())

    return step


def final_blocks(device, batch):
    """(name, block, images) of each block of the final model; the first passes no gradient on."""
    for block in build_model({"fc": 1}).backbone:
        inputs = block.convs.in_channels
        images = on_device(torch.randn(batch, inputs, 32, 32), device).requires_grad_(inputs > 3)
        name = f"block {inputs} to {block.out_channels}, k = {block.k}"
        yield name, on_device(block, device), images


def bench_blocks(device):
    """Each block of the final model, forward and backward."""
    for name, block, images in final_blocks(device, 128 if device.type == "cuda" else 32):
        textbook = TextbookBlock(block.convs.in_channels, block.out_channels, block.k)
        textbook = block_step(on_device(textbook, device), images)
        yield compare(name, block_step(block, images), textbook, device, turns=5)


def bench_mix(device):
    """Mixed kernels (as ours) against weighted outputs (as textbook), by width and image size."""
    batch = 512 if device.type == "cuda" else 64
    for size in (32, 16, 8, 4):
        for inputs, outputs in ((16, 16), (64, 64), (128, 256)):
            images = on_device(torch.randn(batch, inputs, size, size), device).requires_grad_()
            forms = {mix: Block(inputs, outputs, 3, mix=mix) for mix in ("kernels", "outputs")}
            steps = [block_step(on_device(block, device), images) for block in forms.values()]
            what = f"kernels against outputs, {inputs} to {outputs}, {size}x{size}"
            yield compare(what, *steps, device)


def bench_rate(device):
    """The final model's mixed convolutions against matrix products of as many operations."""
    blocks = list(final_blocks(device, 128 if device.type == "cuda" else 32))
    steps, macs = [], 0
    for _, block, images in blocks:
        coefficients = block.coefficients(images).detach().requires_grad_()
        steps.append(convolution_step(block, images, coefficients))
        passes = 3 if images.requires_grad else 2  # forward; backward of kernels, of images
        macs += passes * len(images) * block.macs("kernels")
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    products = max(1, round(macs / size**3))
    yield compare(
        f"final model's convolutions, against {products} products",
        lambda: [step() for step in steps],
        lambda: [left @ right for _ in range(products)],
        device,
        turns=5,
    )


def convolution_step(block, images, coefficients):
    """A function that runs a block's mixed convolution alone forward and backward."""

    def step():
        block.zero_grad()
        images.grad = coefficients.grad = None
        with autocast(images.device):
            output = block.mix_kernels(images, coefficients)
        output.backward(output.detach())

    return step


def textbook_model(options):
    """build_model's network with textbook blocks."""
    model = build_model(options)
    blocks = [TextbookBlock(b.convs.in_channels, b.out_channels, b.k) for b in model.backbone]
    model.backbone = nn.Sequential(*blocks)
    return model


def training_step(options, device, textbook):
    """A function of (images, labels) that trains the network of these options by one step."""
    torch.manual_seed(0)
    model = on_device(textbook_model(options) if textbook else build_model(options), device)
    fused = device.type == "cuda" or not textbook
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, fused=fused)

    def step(images, labels):
        optimizer.zero_grad()
        with autocast(device):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item() if textbook else loss.detach()

    return step


def bench_steps(device):
    """Whole training steps of rows of the report, on random images."""
    for row, (options, batch) in ROWS.items():
        batch = 128 if device.type == "cuda" else batch
        images = torch.randn(batch, 3, 32, 32, device=device)
        labels = torch.randint(10, (batch,), device=device)
        ours, textbook = (training_step(options, device, textbook) for textbook in (False, True))
        what = f"training step of {row}, batch {batch}"
        yield compare(
            what, partial(ours, images, labels), partial(textbook, images, labels), device
        )


def bench_loader(device):
    """An epoch of 10,000 images against torchvision's pipeline, with and without workers."""
    dataset = data.load("shapes")

    def through(loader):
        for images, labels in loader:
            images.to(device), labels.to(device)

    for augment in (False, True):
        for workers in (0, 2):
            textbook = DataLoader(
                PerImage(dataset, augment), 128, shuffle=True, num_workers=workers,
                persistent_workers=workers > 0,
            )  # fmt: skip
            names = data.AUGMENTATIONS if augment else ()
            yield compare(
                f"loader, {'crop and flip' if augment else 'plain'}, {workers} workers there",
                lambda: through(data.batches(dataset, "shapes", 128, device, 0, augment=names)),  # noqa: B023
                lambda: through(textbook),  # noqa: B023
                device,
            )


def bench_epoch(device):
    """A training epoch, loader and all: of the final model on CIFAR-10 on CUDA, else of row 4."""
    name, row = ("cifar10", "the final model") if device.type == "cuda" else ("shapes", "row 4")
    dataset = data.load(name)
    textbook_loader = DataLoader(PerImage(dataset, False), 128, shuffle=True, num_workers=2)
    ours, textbook = (training_step(ROWS[row][0], device, kind) for kind in (False, True))

    def epoch(loader, step):
        for images, labels in loader:
            step(images.to(device), labels.to(device))

    yield compare(
        f"epoch of {row} on {name}",
        lambda: epoch(data.batches(dataset, name, 128, device, seed=0), ours),
        lambda: epoch(textbook_loader, textbook),
        device,
        turns=1,
    )


def peak_memory(textbook, device):
    """Peak bytes, of CUDA's memory or of the process, in training steps of the final model."""
    options, batch = ROWS["the final model"]
    step = training_step(options, device, textbook)
    for _ in range(2):
        step(torch.randn(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % 10)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def bench_memory(device):
    """Peak memory of the final model's training step, each form in a process of its own."""
    forms = {}
    for name, textbook in (("ours", False), ("textbook", True)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            forms[f"{name}_bytes"] = pool.apply(peak_memory, (textbook, device))
    print("peak memory of the final model's step: ", end="")
    print(", ".join(f"{name[:-6]} {size / 2**30:.2f} GiB" for name, size in forms.items()))
    return forms


def bench_run(device):
    """The final model's run by train.py: its seconds, and those until the report's accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        train.main(["--device", str(device), "--out", folder, "--name", "run"])
        epochs = read_history(Path(folder) / "run.json")["epochs"]
    seconds = list(accumulate(epoch["seconds"] for epoch in epochs))
    reached = [s for s, epoch in zip(seconds, epochs) if epoch["val_accuracy"] >= REPORTED]
    return {"seconds": seconds[-1], "seconds_to_reported": reached[0] if reached else None}


PARTS = {
    "block": bench_blocks,
    "mix": bench_mix,
    "rate": bench_rate,
    "step": bench_steps,
    "loader": bench_loader,
    "epoch": bench_epoch,
}


def parse_args(argv=None):
    """The options, checked; usage errors exit with 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = [*PARTS, "memory", "run"]
    parser.add_argument(
        "--only", nargs="+", choices=parts, help="default: all, but `run` only on CUDA"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser.parse_args(argv)


def main(argv=None):
    """Time what is asked for, and keep the figures; failures exit with 1 and a line."""
    args = parse_args(argv)
    try:
        report = bench(args)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.json, json.dumps(report, indent=1) + "\n")
    except (OSError, ValueError) as error:
        sys.exit(f"bench.py: error: {error}")


def bench(args):
    """Run the parts that are asked for; the figures as --json writes them."""
    device = choose_device(args.device)
    name = describe(device)
    only = args.only or [*PARTS, "memory", *(["run"] if device.type == "cuda" else [])]
    report = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(f"{name}, PyTorch {torch.__version__}")
    print(f"{'':<52} {'ours, ms':>9} {'textbook':>9}   textbook / ours")
    report["results"] = [row for part in PARTS if part in only for row in PARTS[part](device)]
    if "memory" in only:
        report["memory"] = bench_memory(device)
    if "run" in only:
        report["run"] = bench_run(device)
    return report


if __name__ == "__main__":
    main()
