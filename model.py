"""The network of the report: a Backbone of Blocks, then a Classifier.

    model = build_model({"arch": [64, 128, 256, 512], "k": 3})     # the report's final model
    logits = model(x)                                              # (N, 3, 32, 32) -> (N, 10)

A Block convolves its input x with k sets of 3x3 kernels W_1 ... W_k. A gate computes k coefficients
from x itself and weights the k outputs by them:

    a = softmax(mean(x) V)
    block(x) = ReLU(a_1 conv(x, W_1) + ... + a_k conv(x, W_k))

(Every convolution and linear layer has a bias, too.)
"""

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from fast import Pool, gated_conv

IMAGE_SIZE = 32  # pixels
GRID = 8  # the classifier pools to (AdaptiveAvgPool2d) or by (AvgPool2d) 8x8

GATES = {  # of (N, k)
    "softmax": lambda a: a.softmax(dim=1),  # over the k coefficients of one image
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "none": lambda a: a,
}

# What build_model takes; train.py's options have these names and, as defaults, these values.
DEFAULTS = {
    "arch": [64, 128, 256, 512],
    "k": 3,
    "gate": "softmax",
    "block_relu": True,
    "norm": "none",
    "downsample": False,
    "residual": False,
    "pool": "adaptive",
    "fc": 3,
    "hidden": 4096,
    "dropout": 0.5,
    "init": "he",
}


class Block(nn.Module):
    """k gated 3x3 convolutions (stride 1, padding 1) of one input, summed, then ReLU if `relu`:
    (N, in_channels, H, W) -> (N, out_channels, H, W). `norm` "batch" normalises the sum before the
    ReLU (Ioffe and Szegedy 2015); `residual` adds the input to the output where the channels are as
    many (He et al. 2016)."""

    def __init__(
        self, in_channels, out_channels, k, gate="softmax", relu=True, norm="none", residual=False
    ):
        super().__init__()
        # One convolution holds all k: initialisations depend on the fan-in, which stays the same.
        self.convs = nn.Conv2d(in_channels, k * out_channels, 3, padding=1)
        self.gate_linear = nn.Linear(in_channels, k)
        self.gate = GATES[gate]
        self.norm = nn.BatchNorm2d(out_channels) if norm == "batch" else nn.Identity()
        self.activation = nn.ReLU() if relu else nn.Identity()
        self.residual = residual and in_channels == out_channels

    def coefficients(self, x):
        """Return the coefficients a of each image, float32: (N, in_channels, H, W) -> (N, k)."""
        pooled = x.mean(dim=(2, 3))
        with torch.autocast(x.device.type, enabled=False):  # softmax is to sum to one
            return self.gate(self.gate_linear(pooled.to(self.gate_linear.weight.dtype)))

    def forward(self, x):
        a = self.coefficients(x)
        y = gated_conv(x, a, self.convs)  # sum_i a_i conv(x, W_i)
        y = self.activation(self.norm(y))
        return x + y if self.residual else y


class Backbone(nn.Sequential):
    """One Block per entry of `arch`, its output channels; they are the next block's input channels:
    (N, 3, 32, 32) -> (N, arch[-1], size, size). `downsample` halves the images by max pooling
    between two blocks wherever the number of channels changes; else their size stays."""

    def __init__(self, arch, downsample=False, **block_options):
        super().__init__()
        self.size = IMAGE_SIZE
        for number, (inputs, outputs) in enumerate(zip([3, *arch], arch), start=1):
            if downsample and number > 1 and outputs != inputs:
                self.add_module(f"pool{number - 1}", Pool(F.max_pool2d, 2))
                self.size //= 2
            self.add_module(f"block{number}", Block(inputs, outputs, **block_options))

    def blocks(self):
        """Return the blocks by their names."""
        return {name: layer for name, layer in self.named_children() if isinstance(layer, Block)}


class Classifier(nn.Sequential):
    """Average pool, then `fc` linear layers with ReLU and dropout after each hidden one:
    (N, in_channels, size, size) -> logits (N, classes). `pool` is "adaptive", AdaptiveAvgPool2d(8),
    an 8x8 grid; or "avg", AvgPool2d(8), a 4x4 grid of 32x32. A size below 8 replaces the 8."""

    def __init__(
        self, in_channels, classes, size=IMAGE_SIZE, pool="adaptive", fc=1, hidden=4096, dropout=0
    ):
        cells = min(GRID, size)
        grid = cells if pool == "adaptive" else size // cells
        widths = [in_channels * grid * grid, *[hidden] * (fc - 1)]
        layers = [Pool(F.avg_pool2d, size // grid), nn.Flatten()]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(*layers, nn.Linear(widths[-1], classes))


def build_model(options, classes=10):
    """Return the network of a dict of options, DEFAULTS for those it lacks; it may hold others. It
    is an nn.Sequential of `backbone` and `classifier`: (N, 3, 32, 32) -> logits (N, classes)."""
    options = DEFAULTS | {name: options[name] for name in DEFAULTS.keys() & options.keys()}
    block = {name: options[name] for name in ("k", "gate", "norm", "residual")}
    block["relu"] = options["block_relu"]
    backbone = Backbone(options["arch"], options["downsample"], **block)
    head = {name: options[name] for name in ("pool", "fc", "hidden", "dropout")}
    classifier = Classifier(options["arch"][-1], classes, backbone.size, **head)
    model = nn.Sequential(OrderedDict(backbone=backbone, classifier=classifier))
    if options["init"] == "he":
        model.apply(initialise_he)
    return model


def initialise_he(module):
    """Initialise a convolution or linear layer as He et al. (2015) do, its bias with zero."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


@torch.inference_mode()
def predict(model, batches, amp):
    """Return (logits, labels) of all batches, float32 (N, classes) and int64 (N,). `amp` is the
    context of the forward pass: device.autocast."""
    model.eval()
    logits, labels = [], []
    for x, targets in batches:
        with amp:
            logits.append(model(x).float())
        labels.append(targets)
    return torch.cat(logits), torch.cat(labels)


@torch.inference_mode()
def count_macs(model):
    """Return the multiply-accumulates of an image's forward pass, all k convolutions and their
    weighting included, without normalisation and pooling."""
    counts = []

    def count(layer, inputs, output):
        if isinstance(layer, Block):
            pixels = inputs[0][0, 0].numel()
            counts.append(pixels * sum(weights.numel() for weights in layer.convs.parameters()))
        elif isinstance(layer, nn.Linear):
            counts.append(layer.weight.numel())

    hooks = [layer.register_forward_hook(count) for layer in model.modules()]
    weight = next(model.parameters())
    model.eval()(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=weight.device))
    for hook in hooks:
        hook.remove()
    return sum(counts)
