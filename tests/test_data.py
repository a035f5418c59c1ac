import threading
from http.client import BadStatusLine

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import CIFAR10, needs_cifar10

import data
from history import lock


def numbered(count):
    """Images whose every pixel is the image's number, labelled by it modulo 10."""
    numbers = torch.arange(count, dtype=torch.uint8)
    images = numbers.view(-1, 1, 1, 1).expand(-1, 3, 32, 32).clone()
    return data.Dataset(images, numbers.long() % 10, "cifar10")


@needs_cifar10
def test_cifar10_is_split_by_its_train_flag():
    train, test = data.load("cifar10", CIFAR10), data.load("cifar10", CIFAR10, train=False)
    assert train.images.shape == (50_000, 3, 32, 32)
    assert test.images.shape == (10_000, 3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert train.labels.bincount().tolist() == [5_000] * 10


@pytest.mark.parametrize("dataset", ["shapes", pytest.param("cifar10", marks=needs_cifar10)])
def test_the_normalisation_is_that_of_the_training_images(dataset):
    colours = data.load(dataset, CIFAR10).images.transpose(0, 1).flatten(1)
    for statistic, expected in zip((torch.mean, torch.std), data.NORMALISATION[dataset]):
        values = [(statistic(colour.float()) / 255).item() for colour in colours]
        assert values == pytest.approx(expected, abs=1e-4, rel=0)


@pytest.fixture
def archive_alone(monkeypatch):
    """CIFAR10, of one image, that is there when it has been unpacked; what unpacked it, in turn."""
    unpacked = []

    class CIFAR10(torchvision.datasets.CIFAR10):
        def __init__(self, root, train, download=False):
            if download:
                unpacked.append(threading.current_thread().name)
            if not unpacked:
                raise RuntimeError("not found")
            self.data, self.targets = np.zeros((1, 32, 32, 3), np.uint8), [0]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    return unpacked


def test_of_two_processes_that_miss_cifar10_the_second_waits_and_says_so(
    archive_alone, tmp_path, capsys
):
    with open(tmp_path / ".cifar10.lock", "w") as first:
        lock(first)
        second = threading.Thread(target=data.load, args=("cifar10", tmp_path), name="second")
        second.start()
        second.join(0.5)
        assert second.is_alive() and archive_alone == []
    second.join(10)
    assert archive_alone == ["second"]
    assert capsys.readouterr().err == (
        f"waiting for another process that puts CIFAR-10 into {tmp_path}\n"
    )


def test_a_download_that_is_not_answered_in_http_is_a_line(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise BadStatusLine("garbage") if "download" in options else RuntimeError("not found")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "__init__", fail)
    with pytest.raises(OSError, match="a download failed .garbage."):
        data.load("cifar10", tmp_path)


def test_cifar10_that_is_there_needs_no_lock(archive_alone, tmp_path):
    archive_alone.append("somebody")
    assert len(data.load("cifar10", tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


def test_shapes_are_the_same_every_time_and_the_test_images_are_others():
    train, test = data.load("shapes"), data.load("shapes", train=False)
    assert torch.equal(train.images[:100], data.draw_shapes.__wrapped__(10_000, 0).images[:100])
    assert not torch.equal(train.images[:100], test.images[:100])
    assert train.labels.bincount(minlength=10).min() > 900


def test_a_linear_classifier_learns_little_of_shapes():
    ((images, labels),) = data.load("shapes").batches(10_000)
    x, targets = images.flatten(1), F.one_hot(labels).float()
    linear = torch.linalg.solve(x.T @ x + 1e3 * torch.eye(3 * 32 * 32), x.T @ targets)
    ((images, labels),) = data.load("shapes", train=False).batches(1_000)
    accuracy = ((images.flatten(1) @ linear).argmax(1) == labels).float().mean()
    assert 0.05 < accuracy < 0.3


def test_hold_out_takes_the_same_number_of_every_class_and_leaves_the_rest():
    train, held = data.hold_out(numbered(200), 50)
    assert held.labels.bincount().tolist() == [5] * 10
    numbers = torch.cat([train.images, held.images])[:, 0, 0, 0]
    assert sorted(numbers.tolist()) == list(range(200))
    assert torch.equal(held.images, data.hold_out(numbered(200), 50)[1].images)


def test_the_last_images_of_each_class_are_held_out():
    _, held = data.hold_out(numbered(200), 30)
    assert held.images[:, 0, 0, 0].tolist() == list(range(170, 200))
    shuffled = numbered(200)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    _, held = data.hold_out(shuffled, 30)
    for label in range(10):
        members = shuffled.images[shuffled.labels == label, 0, 0, 0]
        assert torch.equal(held.images[held.labels == label, 0, 0, 0], members[-3:])


@pytest.mark.parametrize("count", [0, 5, 200])
def test_hold_out_refuses_what_classes_cannot_share(count):
    with pytest.raises(ValueError, match=f"--holdout {count}"):
        data.hold_out(numbered(200), count)


def test_batches_are_normalised_and_in_order_without_a_seed():
    dataset = numbered(40)
    batches = list(dataset.batches(16))
    assert [len(labels) for _, labels in batches] == [16, 16, 8]
    images, labels = map(torch.cat, zip(*batches))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in data.NORMALISATION["cifar10"])
    expected = (dataset.images / 255 - mean) / std
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(labels, dataset.labels)


def test_every_epoch_shuffles_all_images_afresh_from_the_seed():
    def order(**options):
        return [pixel for x, _ in numbered(40).batches(16, **options) for pixel in x[:, 0, 0, 0]]

    first = order(seed=1)
    assert first == order(seed=1)
    assert sorted(first) == order()
    assert first != order(seed=1, epoch=1)
    assert first != order(seed=2)


def test_batches_from_a_start_are_the_later_ones_of_the_epoch():
    options = {"seed": 3, "epoch": 5, "augment": ("crop", "flip")}
    dataset = data.draw_shapes(40, seed=0)
    every = list(dataset.batches(16, **options))
    later = list(dataset.batches(16, start=1, **options))
    assert len(later) == 2
    torch.testing.assert_close(later, every[1:], rtol=0, atol=0)


@pytest.mark.parametrize("augment", data.AUGMENTATIONS.values())
def test_an_augmentation_makes_other_images_by_its_generator_alone(augment):
    images = torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8)
    first, again, other = (augment(images, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.dtype == torch.uint8 and first.shape == images.shape
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_crop_cuts_each_image_out_of_its_padded_self():
    images = torch.randint(1, 256, (300, 3, 32, 32), dtype=torch.uint8)
    cropped = data.crop(images, torch.Generator().manual_seed(0))
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="reflect")
    places = set()
    for image, result in zip(padded, cropped):
        windows = image.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 5, 5, 32, 32)
        found = (windows == result.view(3, 1, 1, 32, 32)).flatten(3).all(3).all(0).nonzero()
        assert len(found) == 1
        places.add(tuple(found[0].tolist()))
    assert len(places) == 25


def test_a_flip_mirrors_half_of_the_images():
    images = torch.randint(256, (300, 3, 32, 32), dtype=torch.uint8)
    flipped = data.flip(images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    assert 110 < mirrored.sum() < 190
