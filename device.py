"""Where a run computes: its device, the precision of its forward pass, one or several processes.

torchrun starts several processes with an environment of their own: RANK is the number of this one,
WORLD_SIZE how many there are. One process alone is number 0 of 1.
"""

import os
import platform
import subprocess
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fast

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0)) if WORLD_SIZE > 1 else 0  # on this machine
SHARE = slice(RANK, None, WORLD_SIZE)  # this process's images of every batch

PRECISIONS = ("auto", "float32", "bfloat16")


def choose_device(name):
    """Return the torch.device of that name, PyTorch set up for it and the other processes joined.
    "auto" is CUDA where there is one, else the CPU. ValueError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        fast.keep_memory()
    try:
        device = torch.device("cuda", LOCAL_RANK) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device).item()  # "meta", too, is a device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(f"--device {name} does not work here ({reason}); try cpu") from error
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def choose_precision(device, precision="auto"):
    """Return the precision that is asked for. "auto" is bfloat16 on CUDA and on CPUs that have
    instructions for it, else float32."""
    if precision != "auto":
        return precision
    quick = device.type == "cuda" or (device.type == "cpu" and fast.has_bfloat16())
    return "bfloat16" if quick else "float32"


def autocast(device, precision):
    """Return the context of a forward pass in that precision. Weights and their gradients stay
    float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def explain_out_of_memory(error):
    """Return the first line of an error of too little memory, on any device; "" of others."""
    reason = str(error).partition("\n")[0][:200]
    if isinstance(error, MemoryError):
        return reason or "out of memory"
    words = ("alloc", "out of memory", "could not create a primitive")  # the last is oneDNN's
    return reason if any(word in reason.lower() for word in words) else ""


def describe_environment(device, precision):
    """Return what a run is made with, as its history keeps it."""
    threads = torch.get_num_threads()
    kind = f"{platform.machine()}, {threads} threads"
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": f"{device} ({kind})",
        "precision": precision,
        "threads": threads,
        "commit": find_commit(),
    }


def find_commit():
    """Return the commit of these scripts as git describes it, or None."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    try:
        return subprocess.check_output(git, stderr=subprocess.DEVNULL).decode().strip()
    except (OSError, ValueError, subprocess.CalledProcessError):  # no git, no repository
        return None


def print0(text):
    """Print, if this is the first process."""
    if RANK == 0:
        print(text, flush=True)


def barrier():
    """Go on when all processes are here."""
    if WORLD_SIZE > 1:
        dist.barrier()


def leave():
    """Wait for the other processes, then part from them."""
    if WORLD_SIZE > 1:
        dist.barrier()
        dist.destroy_process_group()


def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    """Replace a tensor by its sum over the processes, or another reduction, and return it."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor, operation)
    return tensor


def distribute(model):
    """Return the model as one of several processes trains it: gradients are averaged over them, and
    batch norms on GPUs take the statistics of all shares of a batch, on a CPU of their own."""
    if WORLD_SIZE == 1:
        return model
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model)
