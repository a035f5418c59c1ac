"""Where a run computes: its device, the precision of its forward pass, the memory it keeps."""

import ctypes
import os
import platform

import torch

import parallel

PRECISIONS = ("auto", "float32", "bfloat16")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def choose_device(name="auto"):
    """The torch.device of that name; "auto" is CUDA where there is one, else the CPU.

    ValueError if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        keep_memory()
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", parallel.LOCAL_RANK)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--device {name}: not to be had here ({reason}); try --device cpu"
        ) from error
    return device


def describe(device):
    """What a device is, for people: "cuda (NVIDIA H200)" or "cpu (x86_64, 2 threads)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def keep_memory():
    """Let this process keep the memory that tensors free, in huge pages, for the next ones.

    By default glibc gives every tensor above 32 MiB back to Linux, which then clears it anew page
    by page: 40 % of a training step of the report's final model on two cores. It costs at most a
    fifth more memory. Without glibc nothing changes.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it at its first tensor
    if platform.libc_ver()[0] == "glibc":
        malloc = ctypes.CDLL(None)
        malloc.mallopt(M_MMAP_MAX, 0)
        malloc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def has_bfloat16():
    """Whether this CPU has instructions for bfloat16 products and PyTorch's oneDNN may use them.

    They are AVX512_BF16 (every CPU with AMX has it, too) or Arm's BF16. Without them convolutions
    in bfloat16 are up to 16 times slower than in float32 (pytorch issues 118499, 183815).
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # ATEN_CPU_CAPABILITY says so
        return False
    if platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported():
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def precision_on(device, precision="auto"):
    """What a precision of PRECISIONS means there.

    "auto" is bfloat16 on CUDA and on a CPU with instructions for it, else float32.
    """
    if precision == "auto":
        fast = device.type == "cuda" or (device.type == "cpu" and has_bfloat16())
        return "bfloat16" if fast else "float32"
    return precision


def autocast(device, precision="auto"):
    """The context of a forward pass in that precision; weights and their gradients stay float32."""
    enabled = precision_on(device, precision) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
