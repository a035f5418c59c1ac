import contextlib
import io
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image

import data
import evaluate
import train
from checkpoint import load_checkpoint, load_model
from history import read_history, write_history
from model import build_model


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A tiny run, evaluated: its history, what evaluate.py printed, and the folder."""
    folder, output = tmp_path_factory.mktemp("evaluated"), io.StringIO()
    train.main([*TINY, "--out", str(folder), "--name", "run"])
    with contextlib.redirect_stdout(output):
        evaluate.main([str(folder / "run.pt")])
    return read_history(folder / "run.json"), output.getvalue(), folder


def test_the_last_line_is_the_reports(evaluated):
    history, output, _ = evaluated
    last = output.splitlines()[-1]
    assert re.fullmatch(r"Final Model Test Accuracy: \d+\.\d\d%", last)
    assert f"{history['test']['accuracy']:.2f}%" in last


def test_the_test_metrics_are_those_of_the_last_epoch(evaluated):
    history, _, _ = evaluated
    assert history["test"]["accuracy"] == pytest.approx(history["epochs"][-1]["val_accuracy"])
    assert history["test"]["loss"] == pytest.approx(history["epochs"][-1]["val_loss"])
    assert history["finished"] is True


def test_once_leaves_a_test_and_held_out_runs_alone(evaluated, run, tmp_path, capsys):
    evaluate.main([str(evaluated[2] / "run.pt"), "--once"])
    run("--holdout", "500")
    capsys.readouterr()
    evaluate.main([str(tmp_path / "run.pt"), "--once"])
    assert capsys.readouterr().out == ""
    assert "test" not in read_history(tmp_path / "run.json")


def test_what_training_wrote_meanwhile_is_kept(run, tmp_path, monkeypatch):
    history, measure = run(), evaluate.measure

    def measure_while_training(*arguments):
        write_history(tmp_path / "run.json", history | {"epochs": history["epochs"] * 2})
        return measure(*arguments)

    monkeypatch.setattr(evaluate, "measure", measure_while_training)
    evaluate.main([str(tmp_path / "run.pt")])
    assert len(read_history(tmp_path / "run.json")["epochs"]) == 4


def test_metrics_are_printed_before_they_are_written(run, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise OSError("disk full")

    run()
    monkeypatch.setattr(evaluate, "write_history", fail)
    with pytest.raises(SystemExit, match="disk full"):
        evaluate.main([str(tmp_path / "run.pt")])
    assert "Final Model Test Accuracy" in capsys.readouterr().out


def test_every_class_is_printed_and_kept(evaluated):
    history, output, _ = evaluated
    for name, accuracy in history["test"]["per_class"].items():
        assert f"{name} {accuracy:6.2f}%" in output
    assert len(history["test"]["per_class"]) == 10


def test_a_checkpoint_alone_is_enough(run, tmp_path, capsys):
    run()
    (tmp_path / "run.json").unlink()
    moved = (tmp_path / "run.pt").rename(tmp_path / "elsewhere.pt")
    evaluate.main([str(moved)])
    output = capsys.readouterr()
    assert "Final Model Test Accuracy" in output.out
    assert "elsewhere.json is not there" in output.err
    assert not (tmp_path / "elsewhere.json").exists()


def test_every_gate_is_kept_and_softmax_means_sum_to_one(evaluated):
    gates = evaluated[0]["test"]["gates"]
    assert [gate["block"] for gate in gates] == ["block1", "block2"]
    for gate in gates:
        assert np.sum(gate["mean_per_class"], axis=1) == pytest.approx(np.ones(10), abs=1e-5)
        assert np.shape(gate["quantiles"]) == (2, 5)
        assert (np.diff(gate["quantiles"]) >= 0).all()


def test_the_kept_coefficients_are_the_blocks_own():
    torch.manual_seed(0)
    model = build_model({"arch": [4, 8], "k": 2, "fc": 1}).eval()
    images = torch.randn(3, 3, 32, 32)
    with evaluate.keep_coefficients(model) as kept:
        model(images)
    model(images)  # not kept any more
    inputs = [images, model.backbone[0](images)]
    for block, (coefficients,), given in zip(model.backbone, kept.values(), inputs):
        torch.testing.assert_close(coefficients, block.coefficients(given))


def test_the_first_kernels_are_kept_with_four_digits(evaluated):
    history, _, folder = evaluated
    kernels = history["test"]["kernels"]
    weights = load_checkpoint(folder / "run.pt")["weights"]
    assert np.shape(kernels) == (2, 4, 3, 3, 3)
    expected = weights["backbone.block1.convs.weight"].view(2, 4, 3, 3, 3)
    assert np.allclose(kernels, expected, rtol=0, atol=0.00006)
    assert kernels[1][3][2][1][0] == round(kernels[1][3][2][1][0], 4)


def test_test_time_augmentation_stands_beside_the_plain_metrics(evaluated, tmp_path, capsys):
    history, _, folder = evaluated
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    plain = history["test"]
    evaluate.main([str(tmp_path / "run.pt"), "--tta"])
    test = read_history(tmp_path / "run.json")["test"]
    model = load_model(tmp_path / "run.pt")
    ((images, labels),) = data.batches(data.load("shapes", train=False), "shapes", 1_000)
    logits = (model(images) + model(images.flip(3))) / 2
    expected = {
        "accuracy": 100 * (logits.argmax(1) == labels).double().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
    }
    assert test.pop("tta") == pytest.approx(expected)
    assert test == plain
    augmented, last = capsys.readouterr().out.splitlines()[-2:]
    assert augmented == f"With flip test-time augmentation: {expected['accuracy']:.2f}%"
    assert last == f"Final Model Test Accuracy: {plain['accuracy']:.2f}%"


def test_photos_of_mirror_images_are_alike_with_test_time_augmentation(run, tmp_path, capsys):
    run()
    image = data.load("shapes", train=False).tensors[0][0].permute(1, 2, 0)
    photos = tmp_path / "photo.png", tmp_path / "mirrored.png"
    for path, pixels in zip(photos, (image, image.flip(1))):
        Image.fromarray(pixels.numpy()).save(path)
    capsys.readouterr()
    evaluate.main([str(tmp_path / "run.pt"), "--tta", "--image", *map(str, photos)])
    first, second = (line.partition(": ")[2] for line in capsys.readouterr().out.splitlines())
    assert first == second
    assert first.endswith("% (flip test-time augmentation)")


def test_the_wrong_images_are_drawn(evaluated):
    history, _, folder = evaluated
    wrong = history["test"]["wrong"]
    assert len(wrong) == 36
    assert all(one["true"] != one["predicted"] for one in wrong)
    with Image.open(folder / "run-wrong.png") as picture:
        assert picture.format == "PNG"


def test_infinite_outputs_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluate.compute_percentages(torch.tensor([[1.0, float("nan")]]))


@pytest.fixture
def red(tmp_path):
    """red(mode, **options): a file with an image of that mode, 40 x 30, as red as that can be."""

    def save(mode, suffix=".png", **options):
        path = tmp_path / f"{mode.replace(';', '-')}{suffix}"
        Image.new("RGB", (40, 30), "red").convert(mode).save(path, **options)
        return path

    return save


@pytest.mark.parametrize(
    "mode, suffix, colour",
    [
        ("RGB", ".png", (255, 0, 0)),
        ("RGBA", ".png", (255, 0, 0)),
        ("P", ".png", (255, 0, 0)),
        ("CMYK", ".tif", (255, 0, 0)),
        ("L", ".png", (76, 76, 76)),
        ("LA", ".png", (76, 76, 76)),
    ],
)
def test_photos_of_every_mode_are_read(red, mode, suffix, colour):
    photo = evaluate.read_photo(red(mode, suffix))
    assert (photo.mode, photo.size) == ("RGB", (40, 30))
    assert np.allclose(photo.getpixel((20, 15)), colour, atol=1)


def test_16_bits_become_8(tmp_path):
    Image.fromarray(np.full((5, 5), 0x8080, np.uint16)).save(tmp_path / "deep.png")
    assert evaluate.read_photo(tmp_path / "deep.png").getpixel((2, 2)) == (128, 128, 128)


def test_one_pixel_is_enough(tmp_path):
    Image.new("1", (1, 1), 1).save(tmp_path / "dot.png")
    assert evaluate.read_photo(tmp_path / "dot.png").getpixel((0, 0)) == (255, 255, 255)


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (5, 5), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert evaluate.read_photo(tmp_path / "clear.png").getpixel((2, 2)) == (255, 255, 255)


def test_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (40, 30)).save(tmp_path / "side.jpg", exif=exif)
    assert evaluate.read_photo(tmp_path / "side.jpg").size == (30, 40)


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert evaluate.read_photo(tmp_path / "moving.gif").getpixel((4, 4)) == (255, 0, 0)


def test_photos_are_classified_without_a_data_set(run, tmp_path, capsys, monkeypatch):
    run()
    image = data.load("shapes", train=False).tensors[0][0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "first.png")
    model = load_model(tmp_path / "run.pt")
    ((images, _),) = data.batches(data.load("shapes", train=False), "shapes", 1_000)
    likeliest = (100 * model(images[:1])[0].softmax(0)).topk(3)
    capsys.readouterr()
    monkeypatch.delattr(evaluate, "load")
    evaluate.main([str(tmp_path / "run.pt"), "--image", str(tmp_path / "first.png")])
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist())
    expected = ", ".join(f"{data.CLASSES['shapes'][i]} {value:.1f} %" for i, value in pairs)
    assert capsys.readouterr().out == f"{tmp_path / 'first.png'}: {expected}\n"
    assert (tmp_path / "run-predictions.png").exists()
    assert not (tmp_path / "run-wrong.png").exists()


def test_files_that_are_no_images_are_named_and_the_others_classified(
    run, red, tmp_path, capsys, monkeypatch
):
    run()
    good, cut = red("RGB", ".jpg"), tmp_path / "cut.jpg"
    cut.write_bytes(good.read_bytes()[:-20])
    (tmp_path / "text.png").write_text("not an image")
    Image.new("1", (200, 200)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    bad = [cut, tmp_path / "text.png", tmp_path / "bomb.png", tmp_path, tmp_path / "missing.png"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(tmp_path / "run.pt"), "--image", *map(str, bad), str(good)])
    output = capsys.readouterr()
    assert stopped.value.code == 1
    errors = [line for line in output.err.splitlines() if "error: " in line]
    assert len(errors) == len(bad)
    for path, line in zip(bad, errors):
        assert line.startswith(f"evaluate.py: error: {path}: ")
    assert "decompression bomb" in errors[2]
    assert output.out.startswith(f"{good}: ")


def test_metrics_are_those_of_a_hand_made_example():
    labels = torch.tensor([0, 0, 1, 2])
    logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 9, 0], [0, 9, 0]])
    figures = evaluate.measure_predictions(logits, labels, ["a", "b", "c"])
    assert figures["accuracy"] == 50
    assert figures["per_class"] == {"a": 50, "b": 100, "c": 0}
    assert figures["confusion"] == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]


def test_calibration_of_a_hand_made_example():
    percentages = torch.tensor([[70.0, 30], [30, 70], [10, 90], [95, 5]])
    figures = evaluate.measure_calibration(percentages, torch.tensor([0, 0, 1, 0]))
    assert [part["count"] for part in figures["bins"]] == [0] * 10 + [2, 0, 0, 1, 1]
    assert figures["bins"][10] == {"confidence": 70, "accuracy": 50, "count": 2}
    assert figures["bins"][0] == {"confidence": None, "accuracy": None, "count": 0}
    assert figures["ece"] == pytest.approx((2 * 20 + 10 + 5) / 4)


def test_the_wrong_images_come_with_the_most_confident_first():
    percentages = torch.tensor([[60.0, 40], [20, 80], [1, 99], [55, 45]])
    wrong = evaluate.find_most_wrong(percentages, torch.tensor([1, 0, 1, 0]), ["a", "b"])
    assert wrong == [
        {"index": 1, "true": "a", "predicted": "b", "confidence": 80},
        {"index": 0, "true": "b", "predicted": "a", "confidence": 60},
    ]


def test_gate_metrics_of_a_hand_made_example():
    coefficients = torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    figures = evaluate.measure_gate(coefficients, torch.tensor([0, 0, 1]), ["a", "b"])
    assert figures["mean_per_class"] == [[0.25, 0.75], [1, 0]]
    assert figures["quantiles"] == [[0, 0.25, 0.5, 0.75, 1]] * 2
