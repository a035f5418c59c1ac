"""Images, labels and the name of their data set, and batches of them on the device.

    train, test = load("cifar10", "data"), load("cifar10", "data", train=False)
    for x, labels in train.to("cuda").batches(128, seed=0, epoch=3):
        ...  # float32 (N, 3, 32, 32), normalised; int64 (N,)

Images stay uint8 until their batch is on the device; there the whole batch is augmented and
normalised at once. There is no per-image Python work and there are no worker processes.
"""

import contextlib
import random
import warnings
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torchvision.datasets.utils import check_integrity

from history import lock

CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "shapes": "circle ring square frame triangle cross star bar crescent hourglass".split(),
}

# Mean and standard deviation of each colour channel over the training images, pixels from 0 to 1.
NORMALISATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "shapes": ((0.5003, 0.5023, 0.5000), (0.2720, 0.2706, 0.2725)),
}

CROP_PADDING = 2  # pixels
# torchvision reads CIFAR-10 in a way that some versions of NumPy warn of; it does no harm.
warnings.filterwarnings("ignore", message=".*align should be passed as Python or NumPy boolean")


@dataclass
class Dataset:
    """Images, uint8 (N, 3, 32, 32), their labels, int64 (N,), and the name of their data set."""

    images: torch.Tensor
    labels: torch.Tensor
    name: str

    def __len__(self):
        return len(self.images)

    def __getitem__(self, which):
        """The images of a slice or of a mask (N,), as a Dataset."""
        return Dataset(self.images[which], self.labels[which], self.name)

    @property
    def classes(self):
        """The names of the classes, in the order of their labels."""
        return CLASSES[self.name]

    def to(self, device):
        """The same on a device."""
        return Dataset(self.images.to(device), self.labels.to(device), self.name)

    def batches(self, size=250, seed=None, epoch=0, start=0, augment=(), share=slice(None)):
        """Yield (x, labels), normalised float32 (N, 3, 32, 32) and int64 (N,), from batch number
        `start` on; the last batch may be smaller. With a seed every epoch has a shuffle of its own,
        without one the order is the data set's. `augment`: names in AUGMENTATIONS; `share`, a
        slice: one process's part of every batch."""
        order, device = torch.arange(len(self)), self.images.device
        if seed is not None:
            shuffle = torch.Generator().manual_seed(derive_seed(seed, epoch))
            order = torch.randperm(len(self), generator=shuffle)
        order = order.to(device)  # once: to move a batch's indices would wait for the GPU
        mean, std = torch.tensor(NORMALISATION[self.name], device=device)[..., None, None]
        scale, shift = 1 / (255 * std), -mean / std
        generator = torch.Generator(device)
        for step, indices in list(enumerate(order.split(size)))[start:]:
            images = self.images.index_select(0, indices)  # 20 times faster than images[indices]
            if augment:
                generator.manual_seed(derive_seed(seed, epoch, step, "augment"))
            for name in augment:
                images = AUGMENTATIONS[name](images, generator)
            x = images[share].float().mul_(scale).add_(shift)
            yield x, self.labels[indices[share]]


def load(name, data_dir="data", train=True):
    """Return the training or test images of a data set. "shapes" is drawn. CIFAR-10 is downloaded
    into data_dir where it is missing; OSError says what is wrong if that fails."""
    if name not in CLASSES:
        raise ValueError(f"no data set is called {name!r}, only {', '.join(CLASSES)}")
    if name == "shapes":
        return draw_shapes(10_000, seed=0) if train else draw_shapes(1_000, seed=1)
    loaded = load_cifar10(Path(data_dir), train)
    images = torch.from_numpy(loaded.data).permute(0, 3, 1, 2).contiguous()
    return Dataset(images, torch.tensor(loaded.targets), name)


def load_cifar10(data_dir, train):
    """Return torchvision's CIFAR10, verified by its md5 sums. Where it is missing or damaged it is
    unpacked or downloaded, by one process at a time; OSError says what is wrong if that fails."""
    cifar10 = torchvision.datasets.CIFAR10
    try:
        with contextlib.suppress(RuntimeError):  # download=True from the start sums md5 twice
            return cifar10(data_dir, train=train)
        data_dir.mkdir(parents=True, exist_ok=True)
        with open(data_dir / ".cifar10.lock", "w") as file:
            lock(file, f"waiting for another process that puts CIFAR-10 into {data_dir}")
            return cifar10(data_dir, train=train, download=True)
    except (RuntimeError, OSError, EOFError, HTTPException) as error:
        archive = data_dir / cifar10.filename
        what = f"{data_dir / cifar10.base_folder} is missing or damaged"
        advice = f"put {archive.name} from {cifar10.url} into {data_dir}"
        if archive.is_file() and not check_integrity(archive, cifar10.tgz_md5):
            what, advice = f"{archive} is damaged", f"replace it by {cifar10.url}"
        raise OSError(
            f"{what}, and a download failed ({error}); {advice}, or use --dataset shapes, without "
            "files"
        ) from error


def hold_out(dataset, count):
    """Split off `count` images for validation: the last of each class, the same number of each.
    Return (the rest, the held-out). ValueError if that is not possible."""
    labels, classes = dataset.labels, len(dataset.classes)
    per_class, remainder = divmod(count, classes)
    if remainder or not 0 < per_class < labels.bincount(minlength=classes).min():
        raise ValueError(
            f"--holdout {count}: not a multiple of the {classes} classes that leaves each of them "
            f"images to train on ({len(labels)} training images)"
        )
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(classes):
        members = (labels == label).nonzero().flatten()
        held[members[-per_class:]] = True
    return dataset[~held], dataset[held]


def derive_seed(seed, *position):
    """Return a seed for the random numbers of one place in a run, such as (epoch, step).
    All randomness of a run is drawn from such seeds, so that to resume it needs no random state."""
    return random.Random(" ".join(map(str, (seed, *position)))).getrandbits(32)


# An augmentation takes uint8 images (N, 3, H, W) and returns as many; all chance is drawn from the
# generator, so that a run can be resumed.
def crop(images, generator):
    """Pad by 2 pixels, a mirror image of those inside, and cut H x W out at random."""
    (count, _, height, width), device = images.shape, images.device
    padded = F.pad(images.float(), (CROP_PADDING,) * 4, mode="reflect").to(images.dtype)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, 3, 5, 5, H, W), a view
    places = 2 * CROP_PADDING + 1
    top, left = torch.randint(places, (2, count), device=device, generator=generator)
    return windows[torch.arange(count, device=device), :, top, left]


def flip(images, generator):
    """Mirror each image, left to right, with a probability of 1/2."""
    chance = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator)
    return torch.where(chance < 0.5, images.flip(3), images)


AUGMENTATIONS = {"crop": crop, "flip": flip}  # in the order they are applied in


def draw_shapes(count, seed):
    """Draw `count` images of ten classes of shapes at random places, sizes, angles and colours: the
    same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    labels = torch.randint(10, (count,), generator=generator)
    axis = torch.linspace(-1, 1, 32)
    angle, size = uniform(-0.3, 0.3, 1, 1), uniform(0.6, 0.85, 1, 1)
    x = (axis.view(1, 1, 32) - uniform(-0.15, 0.15, 1, 1)) / size
    y = (axis.view(1, 32, 1) - uniform(-0.15, 0.15, 1, 1)) / size
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    inside = _fill_shapes(u, v)[labels, torch.arange(count)]

    start, end, colour = uniform(0, 1, 3, 3, 1, 1).unbind(1)  # background from start to end
    slope = 0.5 + 0.5 * u.unsqueeze(1).clamp(-1, 1)
    background = start + (end - start) * slope
    contrast = (colour - background.mean((2, 3), keepdim=True)).abs().amax(1, keepdim=True)
    colour = torch.where(contrast < 0.3, (colour + 0.5) % 1, colour)
    images = torch.where(inside.unsqueeze(1), colour, background)
    images = images + 0.05 * torch.randn(images.shape, generator=generator)
    return Dataset((255 * images.clamp(0, 1)).round().to(torch.uint8), labels, "shapes")


def _fill_shapes(u, v):
    """Return which points u, v, (N, 32, 32) each, lie inside each shape: (10, N, 32, 32)."""
    radius, square = torch.hypot(u, v), torch.maximum(u.abs(), v.abs())
    inside = {
        "circle": radius < 0.85,
        "ring": (radius < 0.95) & (radius > 0.55),
        "square": square < 0.75,
        "frame": (square < 0.85) & (square > 0.5),
        "triangle": (v < 0.5) & (0.866 * u - 0.5 * v < 0.5) & (-0.866 * u - 0.5 * v < 0.5),
        "cross": (torch.minimum(u.abs(), v.abs()) < 0.28) & (square < 0.95),
        "star": radius < 0.62 + 0.33 * torch.cos(5 * torch.atan2(v, u)),
        "bar": (u.abs() < 1) & (v.abs() < 0.3),
        "crescent": (radius < 0.95) & (torch.hypot(u - 0.45, v) > 0.75),
        "hourglass": (u * v > 0) & (square < 0.85),
    }
    return torch.stack([inside[name] for name in CLASSES["shapes"]])
