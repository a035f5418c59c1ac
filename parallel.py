"""Several processes as one run, as torchrun starts them: which one this is, and sums over all."""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on this machine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Become one of WORLD_SIZE processes: nccl connects CUDA devices, gloo all others."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def wait():
    """Go on when all processes are here."""
    if WORLD_SIZE > 1:
        dist.barrier()


def leave():
    """Wait for the other processes, then part from them."""
    wait()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first():
    """What the first process does here, the others do after it."""
    if RANK > 0:
        wait()
    yield
    if RANK == 0:
        wait()


def averaging(model):
    """The model, its gradients averaged over the processes."""
    return DistributedDataParallel(model) if WORLD_SIZE > 1 else model


def summed(tensor):
    """The tensor, replaced by its sum over the processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def share(images, labels):
    """This process's images and labels of a batch.

    Where there are none for it, an image whose label cross_entropy ignores: it has to take part.
    """
    if RANK >= len(labels):
        return images[:1], labels[:1].fill_(-100)
    return images[RANK::WORLD_SIZE], labels[RANK::WORLD_SIZE]
