"""The gated sum of k convolutions in the form that is fastest here, and what makes a CPU fast.

    y = gated_conv(x, coefficients, convs)      # sum_i a_i conv(x, W_i): (N, O, H, W)

A convolution is linear in its kernels and in its input, so the same sum can be had by one
convolution of each image with a mix of kernels, or by one of weighted inputs. FORM says which form
is used; "auto" is the fastest one, as bench.py measures them. train.py --mix sets it.
"""

import contextlib
import ctypes
import itertools
import os
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

MKLDNN = torch.backends.mkldnn.is_available()  # oneDNN's old name
ONEDNN_HAS_BFLOAT16 = MKLDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()

QUOTA_FILES = ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]  # of cgroups v2 and v1

FORM = "auto"


def gated_conv(x, coefficients, convs):
    """sum_i a_i conv(x, W_i) + a_i b_i of every image.
    x (N, C, H, W), coefficients a (N, k), None for a single 1; convs, an nn.Conv2d from C to k * O
    channels, holds the k kernels W_i and biases b_i one after the other. Returns (N, O, H, W), in
    memory as it was computed."""
    form = "outputs"
    if coefficients is not None:
        form = choose_form(x, coefficients, convs) if FORM == "auto" else FORM
    # On a CPU, whole convolutions are fastest with the channels of a pixel together in memory, and
    # so are pooling and batch normalisation after them: networks with k = 1 by 1.1 to 2.2 times
    # (Zen 4; AVX2 and AVX512, float32 and bfloat16). Where memory_format wants it, all are so.
    whole = x.is_cpu and form == "outputs"
    together = whole or is_channels_last(convs.weight)
    x = x.contiguous(memory_format=torch.channels_last if together else torch.contiguous_format)
    return convs(x) if coefficients is None else FORMS[form](x, coefficients, convs)


def weight_outputs(x, coefficients, convs):
    """The sum as the report writes it, the k convolutions in one call."""
    return WeightedSum.apply(convs(x).unflatten(1, (coefficients.shape[1], -1)), coefficients)


def weight_inputs(x, coefficients, convs):
    """conv([a_1 x, ..., a_k x], [W_1, ..., W_k]): one convolution of k * C channels, whose own sum
    is the sum. As much work, but no k outputs in memory."""
    dtype, k = compute_dtype(x), coefficients.shape[1]
    weighted = [x.to(dtype) * a[:, None, None, None] for a in coefficients.to(dtype).unbind(1)]
    kernels = convs.weight.unflatten(0, (k, -1)).transpose(0, 1).flatten(1, 2)
    biases = (coefficients @ convs.bias.view(k, -1)).to(dtype)
    return F.conv2d(torch.cat(weighted, 1), kernels, padding=1).add_(biases[:, :, None, None])


def mix_kernels(x, coefficients, convs):
    """conv(x, sum_i a_i W_i): one convolution of each image by kernels of its own, in 1/k of the
    work (as in CondConv, Yang et al. 2019, and dynamic convolution, Chen et al. 2020)."""
    if not len(x):
        return weight_outputs(x, coefficients, convs)  # grouped convolutions need a group
    k = coefficients.shape[1]
    together = x.is_cuda or is_channels_last(convs.weight)  # there grouped convolutions are slow
    if together and x.is_cpu and len(x) > 128:  # the patches of more would take gigabytes
        parts = zip(x.split(128), coefficients.split(128))
        return torch.cat([mix_kernels(*part, convs) for part in parts])
    kernels, biases = convs.weight.unflatten(0, (k, -1)), convs.bias.view(k, -1)
    mixed = MixedProduct if together else MixedConvolution
    return mixed.apply(x, coefficients, kernels, biases)


FORMS = {"outputs": weight_outputs, "inputs": weight_inputs, "kernels": mix_kernels}


# Forward and backward of a block, ms, by python bench.py --only form. Zen 5 in bfloat16, two cores:
#                                    outputs  kernels
#   64 to 128, 32x32, k = 3, batch 32      63       26
#  256 to 512, 32x32, k = 3, batch 32     785      325
#  128 to 384, 15x15, k = 2, batch 128    186      158
#  256 to 256,   8x8, k = 2, batch 512    259      510
# Intel Xeon without AMX in float32, two cores (outputs with channels apart, by einsum):
#    8 to 4,   32x32, k = 3, batch 32     3.1      3.4
#   16 to 8,   32x32, k = 3, batch 32     5.5      3.7
#  256 to 512, 32x32, k = 3, batch 32    2155      858
#  128 to 128, 16x16, k = 2, batch 128    184      147
#  256 to 256,   8x8, k = 2, batch 512    690     1147
# Intel Xeon with AMX in bfloat16, two cores:
#                                    outputs   inputs  kernels
#   64 to 128, 32x32, k = 3, batch 32      53       42       40
#  256 to 512, 32x32, k = 3, batch 32     445      425      345
#   16 to 8,   32x32, k = 3, batch 32     5.8      8.0      6.2
#   64 to 128, 32x32, k = 2, batch 32      35       32       42
#   24 to 128, 31x31, k = 2, batch 32      21       16       32
#  128 to 384, 15x15, k = 2, batch 128    126      110      181
#  256 to 256,   8x8, k = 2, batch 512    251      265      543
# H200, bfloat16: training steps with kernels in so many of their blocks, those of most work first:
#                      0     1     2     3     4
#   final           15.0  12.1  11.0  10.8  10.2
#   row 2            5.1   5.5   6.3
#   best             8.6        10.3  11.5
def choose_form(x, coefficients, convs):
    """Return the form that is fastest for such tensors, by name."""
    k, inputs, size = coefficients.shape[1], x.shape[1], x.shape[-1]
    outputs = convs.out_channels // k
    if x.is_cuda:  # smaller sums wait for Python, so what takes fewer calls is faster
        enough = len(x) * size**2 * convs.weight.numel() > 100_000_000_000
    elif is_channels_last(convs.weight):  # a CPU with AMX
        if k == 2 and outputs > inputs:
            return "inputs"
        enough = size >= 32 and outputs >= 16 and k >= 3
    else:
        enough = outputs >= 8 or compute_dtype(x) == torch.bfloat16
    return "kernels" if size >= 15 and enough else "outputs"


def compute_dtype(x):
    """What convolutions of x compute in: the type of autocast, where that is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def is_channels_last(x):
    """Whether the channels of a pixel of x (N, C, H, W) are together in memory."""
    return x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)


class WeightedSum(torch.autograd.Function):
    """sum_i a[n, i] outputs[n, i]: outputs (N, k, O, H, W) and coefficients a (N, k) give (N, O, H,
    W), in memory as the outputs are. PyTorch's einsum does this by products of tiny matrices, and
    in bfloat16 that is a fifth of a training step of `best`."""

    @staticmethod
    def forward(ctx, outputs, coefficients):
        a = coefficients.to(outputs.dtype)[:, :, None, None, None]
        ctx.save_for_backward(outputs, a)
        y = outputs[:, 0] * a[:, 0]
        for i in range(1, a.shape[1]):
            y.addcmul_(outputs[:, i], a[:, i])
        return y

    @staticmethod
    def backward(ctx, grad):
        outputs, a = ctx.saved_tensors
        grad_outputs = torch.mul(grad[:, None], a, out=torch.empty_like(outputs))
        # All at once, PyTorch would turn bfloat16 into float32 first.
        grad_a = [(grad * outputs[:, i]).sum((1, 2, 3)) for i in range(a.shape[1])]
        return grad_outputs, torch.stack(grad_a, 1)


class MixedConvolution(torch.autograd.Function):
    """conv(x[n], sum_i a[n, i] kernels[i]) + sum_i a[n, i] biases[i] of every image n.
    x (N, C, H, W), coefficients a (N, k), kernels (k, O, C, 3, 3) and biases (k, O) give (N, O, H,
    W). A few images are done at a time, and their mixed kernels not kept for the backward pass:
    those of all images would be larger than the images."""

    @staticmethod
    def forward(ctx, x, coefficients, kernels, biases):
        ctx.save_for_backward(x, coefficients, kernels, biases)
        ctx.dtype = compute_dtype(x)
        x, a, w, b = (tensor.to(ctx.dtype) for tensor in (x, coefficients, kernels, biases))
        return torch.cat([_convolve_each(x, a, w, a @ b) for x, a in _in_chunks(w, x, a)])

    @staticmethod
    def backward(ctx, grad):
        """The four gradients. That of x is a convolution by kernels turned round: at this oneDNN
        reaches 88 % of its peak rate, in its own backward 69 % (256 to 512 channels)."""
        x, coefficients, w, b = (tensor.to(ctx.dtype) for tensor in ctx.saved_tensors)
        grad_sums = grad.sum((2, 3))
        grad_x, grad_coefficients = [], []
        grad_kernels = torch.zeros_like(ctx.saved_tensors[2]).flatten(1)
        # oneDNN is slow at this gradient of fewer than 16 channels in bfloat16.
        slow_dtype = torch.float32 if ctx.dtype == torch.bfloat16 and w.shape[1] < 16 else ctx.dtype
        turned = w.transpose(1, 2).flip(3, 4).contiguous()
        for part, a, dy in _in_chunks(w, x, coefficients, grad):
            if ctx.needs_input_grad[0]:  # images of the data set need none
                grad_x.append(_convolve_each(dy, a, turned))
            size = (len(part) * w.shape[1], *w.shape[2:])
            part, dy = (_as_groups(tensor).to(slow_dtype) for tensor in (part, dy))
            grad_mixed = nn.grad.conv2d_weight(part, size, dy, padding=1, groups=len(a))
            grad_mixed = grad_mixed.reshape(len(a), -1).to(ctx.dtype)
            grad_kernels += a.T @ grad_mixed
            grad_coefficients.append(grad_mixed @ w.flatten(1).T)
        grad_x = torch.cat(grad_x) if grad_x else None
        grad_coefficients = torch.cat(grad_coefficients) + grad_sums @ b.T
        return grad_x, grad_coefficients, grad_kernels.view_as(w), coefficients.T @ grad_sums


def _in_chunks(kernels, *tensors):
    """The tensors (N, ...) in chunks of images that stay in the cache with kernels and outputs.
    In float32 that is 20 MB (12 to 36 MB are about as fast), in bfloat16 40 MB (30 to 90 MB)."""
    _, outputs, inputs, *_ = kernels.shape
    numbers = kernels[0].numel() + (inputs + outputs) * tensors[0][0, 0].numel()
    limit = 40_000_000 if kernels.dtype == torch.bfloat16 else 20_000_000  # bytes
    size = max(1, limit // (numbers * kernels.element_size()))
    return zip(*(tensor.split(size) for tensor in tensors))


def _as_groups(x):
    """(N, C, H, W) -> (1, N * C, H, W), for a convolution with N groups."""
    return x.reshape(1, -1, *x.shape[2:])


def _convolve_each(x, coefficients, kernels, biases=None):
    """Convolve each image (N, C, H, W) by its mix of kernels (k, O, C, 3, 3), add biases (N, O)."""
    weight = (coefficients @ kernels.flatten(1)).view(-1, *kernels.shape[2:])
    bias = None if biases is None else biases.flatten()
    y = F.conv2d(_as_groups(x), weight, bias, padding=1, groups=len(x))
    return y.view(len(x), -1, *x.shape[2:])


class MixedProduct(torch.autograd.Function):
    """The same where the channels of a pixel are together, on GPUs and CPUs with AMX, on which
    grouped convolutions are slow: each image's 3x3 patches, as rows of a matrix, times its mixed
    kernels, as columns of another."""

    @staticmethod
    def forward(ctx, x, coefficients, kernels, biases):
        ctx.save_for_backward(x, coefficients, kernels, biases)
        ctx.dtype = compute_dtype(x)
        x, a, w, b = (tensor.to(ctx.dtype) for tensor in (x, coefficients, kernels, biases))
        return _multiply_each(x, a, w).add_((a @ b)[:, :, None, None])

    @staticmethod
    def backward(ctx, grad):
        """The four gradients; that of x is a convolution by kernels turned round."""
        x, a, w, b = (tensor.to(ctx.dtype) for tensor in ctx.saved_tensors)
        grad_x, grad_sums = None, grad.sum((2, 3))
        if ctx.needs_input_grad[0]:  # images of the data set need none
            grad_x = _multiply_each(grad, a, w.transpose(1, 2).flip(3, 4))
        grad_rows = grad.permute(0, 2, 3, 1).flatten(1, 2)
        grad_mixed = (_patches(x).mT @ grad_rows).flatten(1)
        columns = _columns(w)
        grad_coefficients = grad_mixed @ columns.flatten(1).T + grad_sums @ b.T
        grad_kernels = (a.T @ grad_mixed).view_as(columns).permute(0, 4, 3, 1, 2)
        return grad_x, grad_coefficients, grad_kernels, a.T @ grad_sums


def _multiply_each(x, coefficients, kernels):
    """Convolve each image (N, C, H, W) by its mix of kernels (k, O, C, 3, 3)."""
    columns = _columns(kernels)
    mixed = (coefficients @ columns.flatten(1)).view(len(x), -1, columns.shape[4])
    return (_patches(x) @ mixed).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def _columns(kernels):
    """(k, O, C, 3, 3) -> (k, 3, 3, C, O), a view; the order of _patches."""
    return kernels.permute(0, 3, 4, 2, 1)


def _patches(x):
    """Return the 3x3 neighbours of each pixel: (N, C, H, W) -> (N, H * W, 3 * 3 * C)."""
    pixels, dtype = x.permute(0, 2, 3, 1).contiguous(), x.dtype
    if pixels.shape[3] * pixels.element_size() % 16 == 0:
        pixels = pixels.view(torch.complex128)  # 16 bytes, or PyTorch would copy 2 at a time
    padded = F.pad(pixels, (0, 0, 1, 1, 1, 1))
    windows = padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)
    return windows.flatten(3).flatten(1, 2).view(dtype)


class Pool(nn.Module):
    """F.avg_pool2d or F.max_pool2d by size x size: (N, C, H, W) -> (N, C, H/size, W/size). oneDNN
    pools bfloat16 on a CPU to the same numbers, gradients too, in 0.2 to 0.6 of the time; PyTorch
    itself is fast where the channels of a pixel are together."""

    def __init__(self, function, size):
        super().__init__()
        self.function, self.size = function, size

    def forward(self, x):
        whole = x.shape[-1] % self.size == 0
        if x.is_cuda and whole and self.function is F.avg_pool2d:  # in half the time (H200)
            return F.adaptive_avg_pool2d(x, x.shape[-1] // self.size)
        slow = x.is_cpu and x.dtype == torch.bfloat16 and not is_channels_last(x)
        if slow and ONEDNN_HAS_BFLOAT16 and not torch.compiler.is_compiling():
            return self.function(x.to_mkldnn(), self.size, self.size).to_dense(x.dtype)
        return self.function(x, self.size)


def memory_format(device, precision):
    """The memory format that a network is put into: on GPUs, and in bfloat16 on CPUs with AMX, the
    channels of a pixel together; elsewhere the pixels of a channel, and gated_conv says where its
    input is better the other way."""
    amx = device.type == "cpu" and precision == "bfloat16" and torch.cpu._is_amx_tile_supported()
    return torch.channels_last if device.type == "cuda" or amx else torch.contiguous_format


def has_bfloat16():
    """Whether this CPU has instructions for bfloat16 products and PyTorch's oneDNN may use them.
    They are AVX512_BF16 (every CPU with AMX has it, too) or Arm's BF16. Without them convolutions
    in bfloat16 are up to 16 times slower than in float32 (pytorch issues 118499, 183815)."""
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # ATEN_CPU_CAPABILITY says so
        return False
    if platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported():
        return False
    return ONEDNN_HAS_BFLOAT16


def keep_memory():
    """Let this process keep the memory that tensors free for the next ones.
    By default glibc gives every tensor above 32 MiB back to Linux, which then clears it anew page
    by page, which takes a large part of a training step of the report's final model."""
    if platform.libc_ver()[0] == "glibc":
        malloc = ctypes.CDLL(None)
        malloc.mallopt(-4, 0)  # M_MMAP_MAX: the heap holds large tensors, too
        malloc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and never shrinks


def limit_threads():
    """Use no more threads than a container's CPU quota has cores, unless OMP_NUM_THREADS says how
    many: each of them waits for the others, and the quota stops them in turn."""
    cores = read_cpu_quota()
    if cores and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), int(cores))))


def read_cpu_quota(root="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """Return how many cores the control groups of this process, v1 or v2, let it use: the least of
    its own and those around it, None if there is no limit."""
    quotas, lines = [], []
    with contextlib.suppress(OSError):  # there are none but on Linux
        lines = Path(own).read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)  # v2 names no controllers
        folder = Path(root, controllers, path.lstrip("/"))
        # In a container its own group is the root, whatever its path is outside.
        for place, names in itertools.product((folder, *folder.parents), QUOTA_FILES):
            with contextlib.suppress(OSError, ValueError):  # not there; "max"
                text = " ".join((place / name).read_text() for name in names)
                quota, period = map(int, text.split())
                quotas += [quota / period] if quota > 0 else []
    return min(quotas, default=None)
