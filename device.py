"""Where a run computes: its device, the precision of its forward pass, one or several processes.

torchrun starts several processes with an environment of their own: RANK is the number of this one,
WORLD_SIZE how many there are. One process alone is number 0 of 1. Only train.py joins the others.
"""

import os
import sys
import threading

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fast


def _read_number(name, default):
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default  # join_processes refuses others


WORLD_SIZE = _read_number("WORLD_SIZE", 1) or 1
RANK = _read_number("RANK", 0) if WORLD_SIZE > 1 else 0
LOCAL_RANK = _read_number("LOCAL_RANK", 0) if WORLD_SIZE > 1 else 0  # on this machine
SHARE = slice(RANK, None, WORLD_SIZE)  # this process's images of every batch
PATIENCE = 10  # seconds until a process says that it waits for others

PRECISIONS = ("auto", "float32", "bfloat16")


def set_up_device(name, index=0):
    """Return the torch.device of that name, PyTorch set up for it: its memory, its threads, its
    choice of convolutions. "auto" is CUDA where there is one, else the CPU; "cuda" is the GPU
    number `index`. ValueError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == "cpu":
        fast.keep_memory()
        fast.limit_threads()
    try:
        device = torch.device("cuda", index) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device).item()  # fails on "meta", which is a device, too
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = first_line(error)
        raise ValueError(f"--device {name} does not work here ({reason}); try cpu") from error
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_device(device)
    return device


def join_processes(device):
    """Meet the other processes of this run, if there are any; say so if that takes long.
    ValueError if the environment is wrong or they do not come."""
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        text = os.environ.get(name, str(least))
        if not text.isdecimal() or int(text) < least:
            what = f"{name}={text!r} in the environment is not a number from {least} on"
            raise ValueError(f"{what}: unset it")
    if WORLD_SIZE == 1:
        return
    place = ":".join(os.environ.get(f"MASTER_{part}", "?") for part in ("ADDR", "PORT"))
    what = (
        f"process {RANK} of {WORLD_SIZE} waits for the others at {place}; to train with one alone, "
        "unset WORLD_SIZE"
    )
    waiting = threading.Timer(PATIENCE, print, [f"train.py: {what}"], {"file": sys.stderr})
    waiting.daemon = True
    waiting.start()
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(f"the processes of this run do not meet at {place} ({reason})") from error
    finally:
        waiting.cancel()


def choose_precision(device, precision="auto"):
    """Return the precision that is asked for. "auto" is bfloat16 on GPUs and CPUs that have
    instructions for it, else float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        with torch.cuda.device(device):  # older ones emulate it, slowly
            quick = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        quick = device.type == "cpu" and fast.has_bfloat16()
    return "bfloat16" if quick else "float32"


def autocast(device, precision):
    """Return the context of a forward pass in that precision. Weights and their gradients stay
    float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def first_line(error):
    """Return the first line of what an error says, if it is not too long: PyTorch's have many."""
    return str(error).partition("\n")[0][:200]


def explain_out_of_memory(error):
    """Return the first line of an error of too little memory, on any device; "" of others."""
    reason = first_line(error)
    if isinstance(error, MemoryError):
        return reason or "out of memory"
    # The third is oneDNN's, the last of sizes that no memory has.
    words = ("alloc", "out of memory", "could not create a primitive", "storage size")
    return reason if any(word in reason.lower() for word in words) else ""


def barrier():
    """Go on when all processes are here."""
    if WORLD_SIZE > 1:
        dist.barrier()


def leave():
    """Wait for the other processes, then part from them."""
    barrier()
    if WORLD_SIZE > 1:
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


def distribute_loss(criterion):
    """Return a mean loss as one of several processes computes it. DistributedDataParallel averages
    the gradients of the processes, so each weights the mean of its share by how large the share is:
    the average is the mean of the batch. In the last batch of an epoch shares may differ by an
    image, and one may be empty."""
    if WORLD_SIZE == 1:
        return criterion

    def mean_of_share(logits, labels):
        images = all_reduce(torch.tensor(len(labels), device=labels.device))
        if not len(labels):
            return 0 * logits.float().sum()  # a mean of nothing is NaN; losses are float32
        return criterion(logits, labels) * (len(labels) * WORLD_SIZE / images)

    return mean_of_share
