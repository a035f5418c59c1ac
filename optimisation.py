"""What the options of optimisation mean: optimiser, learning-rate schedule, average of weights."""

import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def make_optimizer(model, args):
    """PyTorch's optimiser, its step fused where that exists.

    Without args.bias_decay, weight decay is for matrices and kernels alone, not for biases and the
    scales of normalisation.
    """
    parameters = list(model.parameters())
    options = {"weight_decay": args.weight_decay, "momentum": args.momentum}
    options = {name: value for name, value in options.items() if value is not None}
    if args.nesterov:
        options["nesterov"] = True
    groups = [{"params": parameters}]
    if not args.bias_decay:
        groups = [
            {"params": [weights for weights in parameters if weights.dim() > 1]},
            {"params": [rest for rest in parameters if rest.dim() <= 1], "weight_decay": 0},
        ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    return OPTIMIZERS[args.optimizer](groups, lr=args.lr, fused=fused, **options)


def make_scheduler(optimizer, args, steps):
    """PyTorch's scheduler of a run of args.epochs epochs of so many steps.

    "onecycle" is to be stepped with every batch: it warms up to args.lr over the first 30 % of the
    run and comes down to nearly nothing (Smith and Topin 2017). The others are for every epoch.
    """
    if args.schedule == "onecycle":
        total = args.epochs * steps
        return OneCycleLR(optimizer, args.lr, total_steps=total, cycle_momentum=False)
    if args.schedule == "cosine":
        return CosineAnnealingLR(optimizer, args.epochs)
    return ConstantLR(optimizer, factor=1)


def make_average(model, args):
    """The exponential moving average of a model's weights and batch statistics, or None."""
    if args.ema is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
