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
WHITENING = 2  # pixels of a side of its kernels
GRID = 8  # the classifier pools to (AdaptiveAvgPool2d) or by (AvgPool2d) 8x8

GATES = {  # of (N, k)
    "softmax": lambda a: a.softmax(dim=1),  # over the k coefficients of one image
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "none": lambda a: a,
    "mean": lambda a: 0 * a + 1 / a.shape[1],  # a control: all weigh the same
}

# What build_model takes; train.py's options have these names and, as defaults, these values.
DEFAULTS = {
    "arch": [64, 128, 256, 512],
    "k": 3,
    "gate": "softmax",
    "block_relu": True,
    "norm": "none",
    "downsample": [],
    "pool": "adaptive",
    "fc": 3,
    "hidden": 4096,
    "dropout": 0.5,
    "logit_scale": 1.0,
    "init": "he",
    "whiten": False,
}


class Block(nn.Module):
    """k gated 3x3 convolutions (stride 1, padding 1) of one input, summed, then ReLU if `relu`:
    (N, in_channels, H, W) -> (N, out_channels, H, W). With k = 1 and a softmax, its coefficient is
    1: a plain convolution. `norm` "batch" normalises the sum before the ReLU (Ioffe and Szegedy
    2015), `downsample` halves H and W before that by max pooling."""

    def __init__(
        self, in_channels, out_channels, k, gate="softmax", relu=True, norm="none", downsample=False
    ):
        super().__init__()
        # One convolution holds all k: initialisations depend on the fan-in, which is that of each.
        self.convs = nn.Conv2d(in_channels, k * out_channels, 3, padding=1)
        self.gate_linear = nn.Linear(in_channels, k)
        self.gate = GATES[gate]
        self.gated = k > 1 or gate not in ("softmax", "mean")
        self.gate_linear.requires_grad_(self.gated)
        self.downsample = downsample
        self.pool = Pool(F.max_pool2d, 2) if downsample else nn.Identity()
        self.norm = nn.Identity()
        if norm == "batch":  # its scales learned nothing of use, as in airbench (Jordan 2024)
            self.norm = nn.BatchNorm2d(out_channels)
            self.norm.weight.requires_grad_(False)
        self.activation = nn.ReLU() if relu else nn.Identity()

    def coefficients(self, x):
        """Return the coefficients a of each image, float32: (N, in_channels, H, W) -> (N, k); None
        if a single one is always 1."""
        if not self.gated:
            return None
        pooled = x.mean(dim=(2, 3))
        with torch.autocast(x.device.type, enabled=False):  # float32, so that it sums to one
            return self.gate(self.gate_linear(pooled.to(self.gate_linear.weight.dtype)))

    def forward(self, x):
        a = self.coefficients(x)
        y = gated_conv(x, a, self.convs)  # sum_i a_i conv(x, W_i)
        return self.activation(self.norm(self.pool(y)))


class Whitening(nn.Sequential):
    """Kernels of 2x2 pixels that decorrelate the images' patches, and the same with the other sign,
    then ReLU: (N, 3, 32, 32) -> (N, 24, 31, 31). They stay fixed, as in airbench (Jordan 2024)."""

    def __init__(self):
        patch = 3 * WHITENING**2
        super().__init__(nn.Conv2d(3, 2 * patch, WHITENING, bias=False), nn.ReLU())
        self.requires_grad_(False)

    @torch.no_grad()
    def fit(self, x):
        """Set the kernels to those of the images x (N, 3, H, W): the principal components of their
        patches, each over its standard deviation, that of largest variance first."""
        patches = F.unfold(x, WHITENING).transpose(1, 2).flatten(0, 1)  # (patches, 12)
        variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
        # airbench's 5e-4 keeps components of hardly any variance, noise, from being blown up.
        kernels = (components / (variances + 5e-4).sqrt()).T.flip(0)
        kernels = kernels.unflatten(1, self[0].weight.shape[1:])
        self[0].weight.copy_(torch.cat([kernels, -kernels]))


class Backbone(nn.Sequential):
    """One Block per entry of `arch`, its output channels; they are the next block's input channels:
    (N, channels, in_size, in_size) -> (N, arch[-1], size, size). The blocks whose numbers, from 1
    on, are in `downsample` halve the images."""

    def __init__(self, arch, downsample, channels=3, size=IMAGE_SIZE, **block_options):
        super().__init__()
        self.in_size = self.size = size
        for number, (inputs, outputs) in enumerate(zip([channels, *arch], arch), start=1):
            block = Block(inputs, outputs, downsample=number in downsample, **block_options)
            self.add_module(f"block{number}", block)
            self.size //= 2 if block.downsample else 1


class Classifier(nn.Sequential):
    """Pool, then `fc` linear layers with ReLU and dropout after each hidden one; `logit_scale`
    times what comes out: (N, in_channels, size, size) -> logits (N, classes). `pool` is "adaptive",
    the means of cells of size // 8 pixels, of 32x32 as AdaptiveAvgPool2d(8) an 8x8 grid; "avg",
    AvgPool2d(8), a 4x4 grid of 32x32, where a size below 8 replaces the 8; or "max", the largest of
    the whole image."""

    def __init__(self, in_channels, size, classes, pool, fc, hidden, dropout, logit_scale):
        # AdaptiveAvgPool2d(8) averages cells, of 4x4 pixels of 32x32. Pool does so faster.
        cell = {"adaptive": max(1, size // GRID), "avg": min(GRID, size), "max": size}[pool]
        widths = [in_channels * (size // cell) ** 2, *[hidden] * (fc - 1)]
        layers = [Pool(F.max_pool2d if pool == "max" else F.avg_pool2d, cell), nn.Flatten()]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(*layers, nn.Linear(widths[-1], classes))
        self.logit_scale = logit_scale

    def forward(self, x):
        return self.logit_scale * super().forward(x)


def build_model(options, classes=10):
    """Return the network of a dict of options: those it lacks are DEFAULTS, others are ignored. It
    is an nn.Sequential of `whitening`, if that is wanted, `backbone` and `classifier`: (N, 3, 32,
    32) -> logits (N, classes). Its attribute `macs` is what count_macs says of it."""
    options, parts = DEFAULTS | options, OrderedDict()
    block = {name: options[name] for name in ("k", "gate", "norm", "downsample")}
    if options["whiten"]:
        parts["whitening"] = whitening = Whitening()
        block |= {"channels": whitening[0].out_channels, "size": IMAGE_SIZE - WHITENING + 1}
    backbone = Backbone(options["arch"], relu=options["block_relu"], **block)
    head = {name: options[name] for name in ("pool", "fc", "hidden", "dropout", "logit_scale")}
    classifier = Classifier(options["arch"][-1], backbone.size, classes, **head)
    model = nn.Sequential(parts | OrderedDict(backbone=backbone, classifier=classifier))
    model.macs = count_macs(model)
    if options["init"] == "he":
        backbone.apply(initialise_he)
        classifier.apply(initialise_he)
    if options["init"] == "dirac":
        backbone.apply(initialise_dirac)
    return model


def initialise_he(module):
    """Initialise a convolution or linear layer as He et al. (2015) do, its bias with zero."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


@torch.no_grad()
def initialise_dirac(module):
    """Add the identity to each set of a block's kernels, so that it passes on what it gets, as
    airbench's convolutions do (Jordan 2024). There it replaces kernels: k sets would be alike."""
    if isinstance(module, Block):
        weight = module.convs.weight
        weight += nn.init.dirac_(torch.empty_like(weight), module.gate_linear.out_features)


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


def count_macs(model):
    """Return the multiply-accumulates of an image's forward pass, all k convolutions and their
    weighting (as many as biases) included, without normalisation and pooling."""
    size, macs = model.backbone.in_size, 0
    if hasattr(model, "whitening"):
        macs += size**2 * model.whitening[0].weight.numel()
    for block in model.backbone:
        macs += size**2 * sum(weights.numel() for weights in block.convs.parameters())
        size //= 2 if block.downsample else 1
    linear_layers = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    return macs + sum(layer.weight.numel() for layer in linear_layers)
