"""Several processes as one run, as torchrun starts them: which one this is, and sums over all."""

import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn
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
    """The model, its gradients and batch statistics averaged over the processes."""
    if WORLD_SIZE == 1:
        return model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = BatchNorm2d
    return DistributedDataParallel(model)


def summed(tensor):
    """The tensor, replaced by its sum over the processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


class SumWithGradient(torch.autograd.Function):
    """The sum of a tensor over the processes; each of them has its part in the gradient."""

    @staticmethod
    def forward(ctx, tensor):
        return summed(tensor.clone())

    @staticmethod
    def backward(ctx, grad):
        return summed(grad.contiguous().clone())


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with the statistics of all processes; nn.SyncBatchNorm is for GPUs alone."""

    def forward(self, images):
        if not self.training:
            return super().forward(images)
        pixels = images.float()
        count = summed(torch.full((), pixels.numel() / self.num_features, device=pixels.device))
        mean = SumWithGradient.apply(pixels.sum((0, 2, 3))) / count
        centred = pixels - mean.view(-1, 1, 1)
        variance = SumWithGradient.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        outputs = centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        return outputs.to(images.dtype)


def share(images, labels):
    """This process's images and labels of a batch; there may be none."""
    return images[RANK::WORLD_SIZE], labels[RANK::WORLD_SIZE]
