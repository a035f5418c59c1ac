"""The network of the report: a Backbone of Blocks, then a Classifier.

    model = build_model({"arch": [64, 128, 256, 512], "k": 3})     # the report's final model
    logits = model(images)                                         # (N, 3, 32, 32) -> (N, 10)

A Block's output is a_1 o_1 + ... + a_k o_k: k convolutions o_i of the same input, weighted by k
coefficients a = g(SpatialAveragePool(input) V) of that input. The convolutions are linear in their
kernels, so sum_i a_i conv(x, W_i) = conv(x, sum_i a_i W_i): mixing each image's k kernels first and
convolving once gives the same result from 1/k of the multiplications (as in CondConv, Yang et al.
2019, and dynamic convolution, Chen et al. 2020).
"""

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

IMAGE_SIZE = 32  # pixels
CLASS_COUNT = 10
GRID = 8  # the classifier pools to (AdaptiveAvgPool2d) or by (AvgPool2d) 8x8
MKLDNN = torch.backends.mkldnn.is_available()  # oneDNN's old name
ONEDNN_HAS_BFLOAT16 = MKLDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()

MIXES = ("auto", "outputs", "kernels")
GATES = {
    "softmax": lambda: nn.Softmax(dim=1),  # over the k coefficients of one image
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "none": nn.Identity,
}

# What build_model takes; train.py's options have these names and, as defaults, these values.
DEFAULTS = {
    "arch": [64, 128, 256, 512], "k": 3, "gate": "softmax", "block_relu": True, "norm": "none",
    "downsample": False, "residual": False, "pool": "adaptive", "fc": 3, "hidden": 4096,
    "dropout": 0.5, "init": "he", "mix": "auto",
}  # fmt: skip


class Block(nn.Module):
    """k gated 3x3 convolutions (stride 1, padding 1) of one input, summed, then ReLU if `relu`.
    (N, in_channels, H, W) -> (N, out_channels, H, W). `mix` says how the sum is formed: "outputs"
    convolves k times and weights the outputs, as the report writes it; "kernels" weights an image's
    kernels and convolves it once, which gives the same; "auto" is the faster one for images of
    `size` x `size`. `norm` "batch" normalises the sum before the ReLU (Ioffe and Szegedy 2015);
    `residual` adds the input to the output where the channels are as many (He et al. 2016)."""

    def __init__(self, in_channels, out_channels, k, gate="softmax", relu=True, mix="auto",
                 norm="none", residual=False, size=IMAGE_SIZE):  # fmt: skip
        super().__init__()
        if mix not in MIXES:
            raise ValueError(f"mix is {mix!r}, none of {', '.join(MIXES)}")
        self.k, self.out_channels, self.mix, self.size = k, out_channels, mix, size
        # One convolution holds all k: initialisations depend on the fan-in, which stays the same.
        self.convs = nn.Conv2d(in_channels, k * out_channels, 3, padding=1)
        self.gate_linear = nn.Linear(in_channels, k)
        self.gate = GATES[gate]()
        self.norm = nn.BatchNorm2d(out_channels) if norm == "batch" else nn.Identity()
        self.activation = nn.ReLU() if relu else nn.Identity()
        self.residual = residual and in_channels == out_channels

    def coefficients(self, images):
        """The gate's coefficients a of each image, float32: (N, in_channels, H, W) -> (N, k)."""
        pooled = images.mean(dim=(2, 3))
        with torch.autocast(images.device.type, enabled=False):  # softmax is to sum to one
            return self.gate(self.gate_linear(pooled.to(self.gate_linear.weight.dtype)))

    def forward(self, images):
        mix = self.mix_kernels if self.mix_on(images.device) == "kernels" else self.mix_outputs
        outputs = self.activation(self.norm(mix(images, self.coefficients(images))))
        return images + outputs if self.residual else outputs

    def mix_on(self, device):
        """The form that `mix` means on this device, in autocast or not: "outputs" or "kernels"."""
        if self.mix != "auto":
            return self.mix
        # Mixed kernels are 1.5 to 2.7 times as fast with 32x32 or 16x16 pixels (in float32, with 4
        # channels, 0.8 to 1.4), no faster with 8x8 in wide blocks, half as fast with 4x4.
        narrow = self.out_channels < 8 and not torch.is_autocast_enabled(device.type)
        worthwhile = device.type == "cpu" and self.size >= 16 and not narrow
        return "kernels" if worthwhile else "outputs"

    def mix_outputs(self, images, coefficients):
        """sum_i a_i conv(x, W_i), the k convolutions in one call; in bfloat16 on a CPU one by one,
        which is faster, since the gradient of all k kernels may not fit into the cache."""
        if torch.is_autocast_enabled("cpu"):
            kernels, biases = (tensor.chunk(self.k) for tensor in self.convs.parameters())
            parts = zip(coefficients.bfloat16().T, kernels, biases)
            return sum(a.view(-1, 1, 1, 1) * F.conv2d(images, w, b, padding=1) for a, w, b in parts)
        outputs = self.convs(images).unflatten(1, (self.k, self.out_channels))
        return torch.einsum("nk,nkchw->nchw", coefficients, outputs)

    def mix_kernels(self, images, coefficients):
        """conv(x, sum_i a_i W_i): one convolution of each image, by kernels of its own."""
        if not len(images):
            return self.mix_outputs(images, coefficients)  # grouped convolutions need a group
        kernels = self.convs.weight.unflatten(0, (self.k, self.out_channels))
        biases = self.convs.bias.view(self.k, self.out_channels)
        return MixedConvolution.apply(images, coefficients, kernels, biases)

    def macs(self, mix):
        """Multiply-accumulates per image (forward) of the gated sum, by either of its forms."""
        kernels, gate = self.convs.weight.numel(), self.gate_linear.weight.numel()
        if mix == "outputs":
            return self.size**2 * (kernels + self.k * self.out_channels) + gate
        return self.size**2 * kernels // self.k + kernels + gate


class Pool(nn.Module):
    """`pool`, F.avg_pool2d or F.max_pool2d, by size x size: (N, C, H, W) -> (N, C, H/size, W/size).
    oneDNN pools bfloat16 on a CPU to the same numbers, gradients too, in 0.2 to 0.6 of the time."""

    def __init__(self, pool, size):
        super().__init__()
        self.pool, self.size = pool, size

    def forward(self, images):
        if ONEDNN_HAS_BFLOAT16 and images.is_cpu and images.dtype == torch.bfloat16:
            return self.pool(images.to_mkldnn(), self.size, self.size).to_dense(images.dtype)
        return self.pool(images, self.size)


class Backbone(nn.Sequential):
    """One Block per entry of `arch`, its output channels; they are the next block's input channels.
    (N, 3, 32, 32) -> (N, arch[-1], size, size). `downsample` halves the images by max pooling
    between two blocks wherever the number of channels changes; else their size stays."""

    def __init__(self, arch, downsample=False, **block_options):
        super().__init__()
        self.size = IMAGE_SIZE
        for number, (inputs, outputs) in enumerate(zip([3, *arch], arch), start=1):
            if downsample and number > 1 and outputs != inputs:
                self.add_module(f"pool{number - 1}", Pool(F.max_pool2d, 2))
                self.size //= 2
            block = Block(inputs, outputs, **block_options, size=self.size)
            self.add_module(f"block{number}", block)

    def blocks(self):
        """The blocks by their names."""
        return {name: layer for name, layer in self.named_children() if isinstance(layer, Block)}


class Classifier(nn.Sequential):
    """Average pool, then `fc` linear layers with ReLU and dropout after each hidden one.
    (N, in_channels, size, size) -> logits (N, 10). `pool` is "adaptive", AdaptiveAvgPool2d(8), an
    8x8 grid; or "avg", AvgPool2d(8), a 4x4 grid of 32x32. A size below 8 replaces the 8."""

    def __init__(self, in_channels, size=IMAGE_SIZE, pool="adaptive", fc=1, hidden=4096, dropout=0):
        cells = min(GRID, size)
        grid = cells if pool == "adaptive" else size // cells
        sizes = [in_channels * grid * grid, *[hidden] * (fc - 1), CLASS_COUNT]
        layers = [Pool(F.avg_pool2d, size // grid), nn.Flatten()]
        for inputs, outputs in pairwise(sizes[:-1]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(*layers, nn.Linear(sizes[-2], CLASS_COUNT))

    def macs(self, mix):
        """Multiply-accumulates per image (forward): `mix` is for blocks."""
        return sum(layer.weight.numel() for layer in self if isinstance(layer, nn.Linear))


def build_model(options):
    """The network of a dict of options, DEFAULTS for those it lacks; it may hold others.
    Returns an nn.Sequential of `backbone` and `classifier`: (N, 3, 32, 32) -> logits (N, 10)."""
    given = DEFAULTS | {name: options[name] for name in DEFAULTS.keys() & options.keys()}
    of_blocks = {name: given[name] for name in ("k", "gate", "norm", "residual", "mix")}
    backbone = Backbone(given["arch"], given["downsample"], relu=given["block_relu"], **of_blocks)
    of_classifier = {name: given[name] for name in ("pool", "fc", "hidden", "dropout")}
    classifier = Classifier(given["arch"][-1], backbone.size, **of_classifier)
    model = nn.Sequential(OrderedDict(backbone=backbone, classifier=classifier))
    if given["init"] == "he":
        model.apply(initialise_he)
    return model


def initialise_he(module):
    """He initialisation of a convolution or linear layer (He et al. 2015), its bias zero."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


@torch.inference_mode()
def predict(model, batches, in_precision):
    """(logits, labels) of all batches: float32 (N, 10), int64 (N,). `in_precision`: a context."""
    model.eval()
    logits, labels = [], []
    for images, targets in batches:
        with in_precision:
            logits.append(model(images).float())
        labels.append(targets)
    return torch.cat(logits), torch.cat(labels)


def costs(model):
    """(name, parameters, MACs, MACs if mixed) of each part of a network and of the whole: MACs are
    multiply-accumulates per image, forward, without normalisation and pooling."""
    rows = []
    for name, part in [*model.backbone.blocks().items(), ("classifier", model.classifier)]:
        parameters = sum(weights.numel() for weights in part.parameters())
        rows.append((name, parameters, part.macs("outputs"), part.macs("kernels")))
    return [*rows, ("total", *map(sum, list(zip(*rows))[1:]))]


def tabulate_costs(rows, mixes):
    """What `costs` returns as a table for people, with the form that each block computes in."""
    lines = ["              parameters   MACs/image, k convolutions   with mixed kernels   runs as"]
    for (name, parameters, textbook, mixed), mix in zip(rows, [*mixes, "", ""]):
        lines.append(f"{name:<10} {parameters:>13,} {textbook:>28,} {mixed:>20,}   {mix}".rstrip())
    return "\n".join(lines)


class MixedConvolution(torch.autograd.Function):
    """conv(images[n], sum_i a[n, i] kernels[i]) + sum_i a[n, i] biases[i] of every image n.
    images (N, C, H, W), coefficients a (N, k), kernels (k, O, C, 3, 3) and biases (k, O) give (N,
    O, H, W). A few images are done at a time, and their mixed kernels not kept for the backward
    pass: those of all images would be larger than the images."""

    @staticmethod
    def forward(ctx, images, coefficients, kernels, biases):
        ctx.save_for_backward(images, coefficients, kernels, biases)
        device = images.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if autocast else images.dtype
        x, a, w, b = (tensor.to(ctx.dtype) for tensor in (images, coefficients, kernels, biases))
        return torch.cat([_convolve_each(x, a, w, a @ b) for x, a in _in_chunks(w, x, a)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """The four gradients. That of the images is a convolution by kernels turned round: at this
        oneDNN reaches 88 % of its peak rate, in its own backward 69 % (256 to 512 channels)."""
        images, coefficients, w, b = (tensor.to(ctx.dtype) for tensor in ctx.saved_tensors)
        grad_sums = grad.sum((2, 3))
        grad_coefficients, grad_images = [], [] if ctx.needs_input_grad[0] else None
        grad_kernels = torch.zeros_like(ctx.saved_tensors[2]).flatten(1)
        # oneDNN is slow at this gradient of fewer than 16 channels in bfloat16.
        slow_dtype = torch.float32 if ctx.dtype == torch.bfloat16 and w.shape[1] < 16 else ctx.dtype
        turned = w.transpose(1, 2).flip(3, 4).contiguous()
        for x, a, dy in _in_chunks(w, images, coefficients, grad):
            if grad_images is not None:
                grad_images.append(_convolve_each(dy, a, turned))
            size = (len(x) * w.shape[1], *w.shape[2:])
            x, dy = (_as_groups(part).to(slow_dtype) for part in (x, dy))
            grad_mixed = nn.grad.conv2d_weight(x, size, dy, padding=1, groups=len(a))
            grad_mixed = grad_mixed.view(len(a), -1).to(ctx.dtype)
            grad_kernels += a.T @ grad_mixed
            grad_coefficients.append(grad_mixed @ w.flatten(1).T)
        grad_images = None if grad_images is None else torch.cat(grad_images)
        grad_coefficients = torch.cat(grad_coefficients) + grad_sums @ b.T
        return grad_images, grad_coefficients, grad_kernels.view_as(w), coefficients.T @ grad_sums


def _in_chunks(kernels, *tensors):
    """The tensors (N, ...) in chunks of images that stay in the cache with kernels and outputs.
    In float32 that is 20 MB (12 to 36 MB are about as fast), in bfloat16 40 MB (30 to 90 MB)."""
    _, outputs, inputs, *_ = kernels.shape
    numbers = kernels[0].numel() + (inputs + outputs) * tensors[0][0, 0].numel()
    limit = 40_000_000 if kernels.dtype == torch.bfloat16 else 20_000_000  # bytes
    size = max(1, limit // (numbers * kernels.element_size()))
    return zip(*(tensor.split(size) for tensor in tensors))


def _as_groups(images):
    """(N, C, H, W) -> (1, N * C, H, W), for a convolution with N groups."""
    return images.reshape(1, -1, *images.shape[2:])


def _convolve_each(images, coefficients, kernels, biases=None):
    """Convolve each image (N, C, H, W) by its mix of kernels (k, O, C, 3, 3), add biases (N, O)."""
    weight = (coefficients @ kernels.flatten(1)).view(-1, *kernels.shape[2:])
    bias = None if biases is None else biases.flatten()
    outputs = F.conv2d(_as_groups(images), weight, bias, padding=1, groups=len(images))
    return outputs.view(len(images), -1, *images.shape[2:])
