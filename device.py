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

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on this machine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

PRECISIONS = ("auto", "float32", "bfloat16")


def choose_device(name="auto"):
    """The torch.device of that name, PyTorch set up for it and the other processes joined.
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


def describe(device):
    """What a device is, for people: "cuda (NVIDIA H200)" or "cpu (x86_64, 2 threads)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def precision_on(device, precision="auto"):
    """What "auto" means there: bfloat16 on CUDA and on a CPU with instructions for it."""
    if precision != "auto":
        return precision
    fast_here = device.type == "cuda" or (device.type == "cpu" and fast.has_bfloat16())
    return "bfloat16" if fast_here else "float32"


def autocast(device, precision="auto"):
    """The context of a forward pass in that precision; weights and their gradients stay float32."""
    enabled = precision_on(device, precision) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def environment(device, precision):
    """What a run is made with, as its history keeps it."""
    describe_commit = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(describe_commit, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = None
    return {"python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "device": describe(device),
            "precision": precision_on(device, precision), "commit": commit or None}  # fmt: skip


def wait():
    """Go on when all processes are here."""
    if WORLD_SIZE > 1:
        dist.barrier()


def leave():
    """Wait for the other processes, then part from them."""
    wait()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def add_up(tensor):
    """The tensor, replaced by its sum over the processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def agree(number, device):
    """The largest of the processes' numbers, an int."""
    if WORLD_SIZE == 1:
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def distribute(model):
    """The model as one of several processes trains it: gradients are averaged over them.
    The batch norms of the model itself take the statistics of all processes from now on."""
    if WORLD_SIZE == 1:
        return model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SharedBatchNorm2d
    return DistributedDataParallel(model)


class SharedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with the statistics of all processes; nn.SyncBatchNorm is for GPUs alone."""

    def forward(self, images):
        if not self.training:
            return super().forward(images)
        pixels = images.float()
        count = add_up(torch.full((), pixels.numel() / self.num_features, device=pixels.device))
        mean = AddUp.apply(pixels.sum((0, 2, 3))) / count
        centred = pixels - mean.view(-1, 1, 1)
        variance = AddUp.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        outputs = centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        return outputs.to(images.dtype)


class AddUp(torch.autograd.Function):
    """The sum of a tensor over the processes; each of them has its part in the gradient."""

    @staticmethod
    def forward(ctx, tensor):
        return add_up(tensor.clone())

    backward = forward  # each process's gradient is added up, too
