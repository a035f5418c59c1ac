import contextlib
import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CIFAR10, ROOT, TINY, changed, ended, evaluate_in, files, needs_cifar10
from PIL import Image

import data
import evaluate
import fast
import gallery
import train
from checkpoint import load_checkpoint, load_model, write_checkpoint
from history import hyperparameters, read_history, write_history
from model import Block, build_model

RED, BLUE = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
SHAPE = data.draw_shapes(1, seed=0)
PHOTO = Image.fromarray(SHAPE.images[0].permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A tiny run, evaluated: its folder, history, test figures, and what evaluate.py printed."""
    folder, output = tmp_path_factory.mktemp("evaluated"), io.StringIO()
    train.main([*TINY, "--out", str(folder), "--name", "run"])
    with contextlib.redirect_stdout(output):
        test = evaluate_in(folder)
    history, output = read_history(folder / "run.json"), output.getvalue()
    return SimpleNamespace(folder=folder, history=history, test=test, output=output)


@pytest.fixture
def checkpoint(evaluated, tmp_path):
    """A copy of that run's checkpoint in tmp_path, its history beside it."""
    for name in ("run.pt", "run.json"):
        shutil.copy(evaluated.folder / name, tmp_path)
    return tmp_path / "run.pt"


def test_the_test_metrics_are_those_of_the_last_epoch(evaluated):
    last = evaluated.history["epochs"][-1]
    assert evaluated.test["accuracy"] == pytest.approx(last["val_accuracy"])
    assert evaluated.test["loss"] == pytest.approx(last["val_loss"])
    assert evaluated.history["finished"] is True


@pytest.mark.parametrize("change", [{}, {"config": {"holdout": 500}}, {"finished": False}], ids=str)
def test_once_is_not_of_what_was_tested_nor_of_held_out_nor_unfinished_runs(
    evaluated, checkpoint, capsys, change
):
    if change:
        untested = {name: evaluated.history[name] for name in evaluated.history if name != "test"}
        write_history(checkpoint.with_suffix(".json"), untested | change)
    evaluate.main([str(checkpoint), "--once"])
    assert capsys.readouterr().out == ""


def test_a_test_is_in_the_precision_of_training_unless_another_is_given(run, tmp_path):
    run("--precision bfloat16")
    losses = [evaluate_in(tmp_path, *o)["loss"] for o in ([], ["--precision", "float32"])]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    validation = read_history(tmp_path / "run.json")["epochs"][-1]["val_loss"]
    assert losses[0] == pytest.approx(validation)


def test_a_run_of_a_gpu_whose_channels_are_together_is_tested_as_others(run, tmp_path, monkeypatch):
    monkeypatch.setattr(fast, "memory_format", lambda device, precision: torch.channels_last)
    last = run()["epochs"][-1]
    assert evaluate_in(tmp_path)["accuracy"] == pytest.approx(last["val_accuracy"])
    model = load_model(tmp_path / "run.pt")
    assert all(weights.is_contiguous() for weights in model.parameters())


@pytest.mark.parametrize("change", [{"epochs": []}, {"finished": False}, {"config": {"lr": 1}}])
def test_a_training_meanwhile_is_noticed(checkpoint, evaluated, tmp_path, monkeypatch, change):
    measure, meanwhile = evaluate.measure, evaluated.history | {"test": {"accuracy": 0}} | change

    def measure_while_training(*arguments):
        write_history(tmp_path / "run.json", meanwhile)
        return measure(*arguments)

    monkeypatch.setattr(evaluate, "measure", measure_while_training)
    evaluate.main([str(checkpoint)])
    test = evaluated.test if "epochs" in change else {"accuracy": 0}  # the same or other weights
    assert read_history(tmp_path / "run.json") == meanwhile | {"test": test}


def test_metrics_are_printed_before_they_are_written(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "write_history", Mock(side_effect=OSError("disk full")))
    assert ended(evaluate.main, [str(checkpoint)]) == 1
    output = capsys.readouterr()
    assert "Final Model Test Accuracy" in output.out
    assert output.err == "evaluate.py: error: disk full: --out FOLDER writes elsewhere\n"


def test_all_files_go_to_another_folder_if_one_is_given(checkpoint, evaluated, tmp_path):
    before, out = files(tmp_path), tmp_path / "new" / "out"
    PHOTO.save(tmp_path / "photo.png")
    evaluate.main([str(checkpoint), "--out", str(out)])
    evaluate.main([str(checkpoint), "--out", str(out), "--image", str(tmp_path / "photo.png")])
    assert {name: files(tmp_path)[name] for name in before} == before
    assert sorted(files(out)) == ["run-predictions.png", "run-wrong.png", "run.json"]
    assert read_history(out / "run.json") == evaluated.history


def test_a_test_in_another_folder_is_known_there(checkpoint, evaluated, tmp_path, capsys):
    untested = {name: evaluated.history[name] for name in evaluated.history if name != "test"}
    write_history(tmp_path / "run.json", untested)
    evaluate.main([str(checkpoint), "--out", str(tmp_path / "out"), "--tta"])
    evaluate.main([str(checkpoint), "--out", str(tmp_path / "out")])
    test = read_history(tmp_path / "out" / "run.json")["test"]
    assert test.pop("tta") and test == evaluated.test
    capsys.readouterr()
    evaluate.main([str(checkpoint), "--out", str(tmp_path / "out"), "--once"])
    assert capsys.readouterr().out == ""
    assert "test" not in read_history(tmp_path / "run.json")


@pytest.mark.parametrize("options", [[], ["--once"]])
def test_the_history_of_another_training_is_not_replaced(
    checkpoint, evaluated, refused, monkeypatch, options
):
    other = checkpoint.parent / "out" / "run.json"
    other.parent.mkdir()
    write_history(other, changed(evaluated.history, "run", 12.5))
    before, options = other.read_bytes(), [*options, "--out", str(other.parent)]
    monkeypatch.setattr(evaluate, "measure", None)  # which takes minutes: refused before
    assert f"{other} is of another training" in refused(evaluate.main, [str(checkpoint), *options])
    assert other.read_bytes() == before


def test_images_that_cannot_be_looked_for_where_training_had_them_are_in_data(evaluated, tmp_path):
    saved = load_checkpoint(evaluated.folder / "run.pt")
    saved["config"]["data_dir"] = "a" * 300  # or another user's: such a question fails, too
    write_checkpoint(tmp_path / "run.pt", saved)
    evaluate.main([str(tmp_path / "run.pt")])
    assert (tmp_path / "run-wrong.png").exists()


def test_two_checkpoints_of_one_name_do_not_go_to_one_folder(refused):
    two = ["a/run.pt", "b/run.pt", "--out", "c"]
    assert "two checkpoints have the same name" in refused(evaluate.main, two, code=2)


OUT_OF_MEMORY = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nA hint"), "9 GiB."),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors ..."), "out of memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "allocate memory"),
    (MemoryError("Unable to allocate 9 GiB"), "Unable to allocate 9 GiB"),
    (MemoryError(), "out of memory"),
]


@pytest.mark.parametrize("error, reason", OUT_OF_MEMORY)
@pytest.mark.parametrize("options", [[], ["--image", "photo.png"]])
def test_too_little_memory_is_a_line(checkpoint, monkeypatch, refused, error, reason, options):
    monkeypatch.setattr(evaluate, "open_checkpoint", Mock(side_effect=error))
    line = refused(evaluate.main, [str(checkpoint), *options])
    assert line.startswith(f"evaluate.py: error: {checkpoint}: ")
    assert line.endswith(f"{reason}: free some memory, or try --device cpu")


def test_too_little_memory_for_a_checkpoint_does_not_make_it_a_damaged_one(
    checkpoint, monkeypatch, refused
):
    monkeypatch.setattr(torch, "load", Mock(side_effect=RuntimeError("can't allocate memory")))
    line = refused(evaluate.main, [str(checkpoint)])
    assert line.endswith("can't allocate memory: free some memory, or try --device cpu")


@pytest.mark.parametrize("error, reason", OUT_OF_MEMORY)
def test_too_little_memory_for_training_is_a_line(tmp_path, monkeypatch, refused, error, reason):
    monkeypatch.setattr(train, "train", Mock(side_effect=error))
    line = refused(train.main, [*TINY, "--out", str(tmp_path)])
    assert line.startswith("train.py: error: ")
    assert line.endswith(f"{reason}: try a smaller network or --batch-size")


def test_another_error_than_of_memory_is_shown_whole(checkpoint, monkeypatch):
    monkeypatch.setattr(evaluate, "measure", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        evaluate.main([str(checkpoint)])


def test_ctrl_c_ends_a_test(checkpoint, monkeypatch):
    monkeypatch.setattr(evaluate, "measure", Mock(side_effect=KeyboardInterrupt))
    assert ended(evaluate.main, [str(checkpoint)]) == 130


def test_every_class_is_printed_and_kept_and_the_last_line_is_the_reports(evaluated):
    *classes, loss, last = evaluated.output.splitlines()
    accuracies = evaluated.test["per_class"].items()
    assert classes == [f"{name:>12} {accuracy:6.2f}%" for name, accuracy in accuracies]
    assert last == f"Final Model Test Accuracy: {evaluated.test['accuracy']:.2f}%"


def test_a_checkpoint_alone_is_enough(checkpoint, tmp_path, capsys):
    (tmp_path / "run.json").unlink()
    evaluate.main([str(checkpoint.rename(tmp_path / "elsewhere.pt"))])
    output = capsys.readouterr()
    assert "Final Model Test Accuracy" in output.out
    assert "elsewhere.json is not there" in output.err
    assert not (tmp_path / "elsewhere.json").exists()


def test_the_measured_coefficients_are_the_blocks_own():
    torch.manual_seed(0)
    model = build_model({"arch": [4, 8], "k": 2, "fc": 1}).eval()
    x, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])
    batches, amp = [(x, labels)], contextlib.nullcontext()
    gates = evaluate.measure(model, batches, amp, data.CLASSES["shapes"], tta=True)["gates"]
    assert [gate["block"] for gate in gates] == ["block1", "block2"]
    for block, gate, given in zip(model.backbone, gates, [x, model.backbone[0](x)]):
        expected = block.coefficients(given)
        torch.testing.assert_close(torch.tensor(gate["mean_per_class"][:3]), expected)


@pytest.mark.parametrize("k, second, expected", [(1, 0, None), (2, 3, 1), (2, -1, -1), (3, 1, 1)])
def test_the_similarity_of_kernels_is_their_mean_cosine(k, second, expected):
    block = Block(4, 8, k)
    with torch.no_grad():
        for kernels in block.convs.weight.chunk(k)[1:]:
            kernels.copy_(second * block.convs.weight[:8])
    assert evaluate.measure_similarity(block) == (expected and pytest.approx(expected))


def test_test_time_augmentation_stands_beside_the_plain_metrics(checkpoint, evaluated, capsys):
    plain, augmented = evaluated.test, evaluate_in(checkpoint.parent, "--tta")
    model = load_model(checkpoint)
    ((images, labels),) = data.load("shapes", train=False).batches(1_000)
    logits = 2 * model(images) + 2 * model(images.flip(3))
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    for moved in (padded[:, :, :-2, :-2], padded[:, :, 2:, 2:]):  # by a pixel, to either corner
        logits += model(moved) + model(moved.flip(3))
    logits /= 8
    accuracy = 100 * (logits.argmax(1) == labels).double().mean().item()
    loss = F.cross_entropy(logits, labels).item()
    *_, line, last = capsys.readouterr().out.splitlines()
    assert evaluate_in(checkpoint.parent) == augmented  # without --tta, which is kept
    assert augmented.pop("tta") == pytest.approx({"accuracy": accuracy, "loss": loss, "views": 6})
    assert augmented == plain
    assert line == f"With test-time augmentation, six views: {accuracy:.2f}%"
    assert last == f"Final Model Test Accuracy: {plain['accuracy']:.2f}%"


def test_photos_of_test_time_augmentation_say_so_and_differ_from_plain_ones(
    checkpoint, tmp_path, capsys
):
    PHOTO.save(tmp_path / "photo.png")
    command = [str(checkpoint), "--image", str(tmp_path / "photo.png")]
    evaluate.main(command)
    evaluate.main([*command, "--tta"])
    plain, augmented = capsys.readouterr().out.splitlines()
    assert augmented.endswith("% (mean of six views)")
    assert augmented.removesuffix(" (mean of six views)") != plain


def test_a_moved_image_shows_its_mirror_image_at_the_edge():
    x = torch.arange(9.0).view(1, 1, 3, 3)  # 0 1 2, 3 4 5, 6 7 8
    assert evaluate.move(x, 1, False).flatten().tolist() == [4, 3, 4, 1, 0, 1, 4, 3, 4]
    assert evaluate.move(x, -1, False).flatten().tolist() == [4, 5, 4, 7, 8, 7, 4, 5, 4]
    assert evaluate.move(x, 0, True).flatten().tolist() == [2, 1, 0, 5, 4, 3, 8, 7, 6]


def test_the_wrong_images_are_drawn(evaluated):
    assert len(evaluated.test["wrong"]) == 36
    assert all(one["true"] != one["predicted"] for one in evaluated.test["wrong"])
    with Image.open(evaluated.folder / "run-wrong.png") as picture:
        assert picture.format == "PNG"


def test_the_data_set_is_looked_for_where_it_was_for_training(tmp_path, monkeypatch):
    looked, load = [], evaluate.load
    monkeypatch.setattr(evaluate, "load", lambda name, *a, **k: looked.append(a) or load(name, **k))
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--data-dir", "a/data", "--out", "runs", "--name", "run"])
    evaluate.main(["runs/run.pt"])  # that machine's folder is not here
    (tmp_path / "a" / "data").mkdir(parents=True)
    monkeypatch.chdir("runs")
    evaluate.main(["run.pt"])
    evaluate.main(["run.pt", "--data-dir", "elsewhere"])
    assert looked == [("data",), (tmp_path / "a" / "data",), (Path("elsewhere"),)]


def test_a_device_that_is_not_there_is_refused(checkpoint):
    args = evaluate.parse_args(["run.pt", "--device", "cuda:99"])
    with pytest.raises(ValueError, match="--device cuda:99 does not work here"):
        evaluate.open_checkpoint(checkpoint, args)


def test_exported_weights_are_half_as_large_and_give_the_same_accuracy(run, tmp_path, capsys):
    run("--schedule none --precision bfloat16")  # a checkpoint with what resuming needs
    paths = tmp_path / "run.pt", tmp_path / "weights" / "half.pt"
    evaluate.main([str(paths[0]), "--export", str(paths[1])])
    before, after = map(load_checkpoint, paths)
    assert set(after) == set(before) - {"state"}
    assert (after["config"]["data_dir"], after["precision"]) == ("data", "float32")
    for name, tensor in before["weights"].items():
        assert torch.equal(after["weights"][name], tensor.half())
    metrics = []
    for path in paths:
        evaluate.main([str(path), "--precision", "float32"])
        metrics.append(float(capsys.readouterr().out.split()[-1].rstrip("%")))
    assert metrics[1] == pytest.approx(metrics[0], abs=0.5)


def test_an_export_replaces_nothing_and_is_of_one_checkpoint(checkpoint, refused):
    before, path = checkpoint.read_bytes(), str(checkpoint)
    assert f"{path} exists" in refused(evaluate.main, [path, "--export", path])
    assert checkpoint.read_bytes() == before
    assert "not 2" in refused(evaluate.main, [path, path, "--export", f"{path}2"], code=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--export a.pt --tta", "--export writes weights: without"),
        ("--export a.pt --image b.png", "--export writes weights: without"),
        ("--image b.png --once", "--once is of tests: without --image"),
    ],
)
def test_options_that_would_be_ignored_are_refused(refused, options, message):
    assert message in refused(evaluate.main, ["run.pt", *options.split()], code=2)


@needs_cifar10
def test_the_published_weights_are_those_of_the_published_run():
    model = load_model(ROOT / "weights" / "best.pt")
    run = read_history(ROOT / "results" / "best" / "best.json")
    assert hyperparameters(model.config) == hyperparameters(run["config"])
    x, labels = next(data.load("cifar10", CIFAR10, train=False).batches(500))
    accuracy = 100 * (model(x).argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(run["test"]["accuracy"], abs=3)


def test_several_checkpoints_are_tested_and_a_bad_one_does_not_stop_the_others(checkpoint, capsys):
    bad = checkpoint.with_name("bad.pt")
    bad.write_text("text")
    assert ended(evaluate.main, [str(bad), str(checkpoint)]) == 1
    output = capsys.readouterr()
    assert output.out.count("Final Model Test Accuracy") == 1
    assert f"evaluate.py: error: {bad}" in output.err


def test_photos_are_classified_without_a_data_set(checkpoint, tmp_path, capsys, monkeypatch):
    wide = Image.new("RGB", (48, 32))
    wide.paste(PHOTO, (8, 0))  # the middle is taken
    wide.save(tmp_path / "photo.png")
    ((images, _),) = SHAPE.batches(1)
    likeliest = (100 * load_model(checkpoint)(images)[0].softmax(0)).topk(3)
    monkeypatch.delattr(evaluate, "load")
    evaluate.main([str(checkpoint), "--image", str(tmp_path / "photo.png")])
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist())
    expected = ", ".join(f"{data.CLASSES['shapes'][i]} {value:.1f} %" for i, value in pairs)
    assert capsys.readouterr().out == f"{tmp_path / 'photo.png'}: {expected}\n"
    assert (tmp_path / "run-predictions.png").exists()
    assert not (tmp_path / "run-wrong.png").exists()


def test_no_images_are_named_and_the_rest_classified(checkpoint, tmp_path, capsys, monkeypatch):
    good, *bad = [tmp_path / name for name in ("good", "cut", "text", "bomb", "pipe", "gone", "")]
    os.mkfifo(bad[3])
    RED.save(good, "JPEG")
    bad[0].write_bytes(good.read_bytes()[:-20])
    bad[1].write_text("not an image")
    Image.new("1", (200, 200)).save(bad[2], "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)
    assert ended(evaluate.main, [str(checkpoint), "--image", *map(str, [*bad, good])]) == 1
    output = capsys.readouterr()
    cut, *errors = (line for line in output.err.splitlines() if "error: " in line)
    assert f"{bad[0]}: not a whole image (image file is truncated" in cut
    reasons = [
        "no image that PIL can read: convert it to JPEG",
        "it has more than 30,000 pixels: make it smaller",
        *["there is no such file"] * 3,
    ]
    assert errors == [f"evaluate.py: error: {path}: {why}" for path, why in zip(bad[1:], reasons)]
    assert output.out.startswith(f"{good}: ")


def test_many_photos_are_drawn_in_several_pictures(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "PAGE", 2)
    drawn = Mock(wraps=gallery.draw_predictions)
    monkeypatch.setattr(gallery, "draw_predictions", drawn)
    photos = [tmp_path / f"{number}.png" for number in range(5)]
    for photo in photos:
        RED.save(photo)
    evaluate.main([str(checkpoint), "--image", *map(str, photos)])
    pictures = [f"run-predictions{number}.png" for number in ("", "-2", "-3")]
    assert capsys.readouterr().err.split() == [str(tmp_path / name) for name in pictures]
    assert all((tmp_path / name).exists() for name in pictures)
    names = [[name for name, *_ in call.args[0]] for call in drawn.call_args_list]
    assert names == [["0.png", "1.png"], ["2.png", "3.png"], ["4.png"]]
    assert [call.args[2] for call in drawn.call_args_list] == [f"run, {n} of 3" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "name", ["\udcff.jpg", "a\nb.jpg", "a\0\x1b.jpg", "$x^2$.jpg", "猫.jpg", ""]
)
def test_whatever_a_photo_or_a_run_is_called_it_is_drawn(tmp_path, name, recwarn):
    grey = np.zeros((3, 3, 3), np.uint8)
    figure = gallery.draw_predictions([(name, grey, grey, [50.0, 50.0])], ["a", "b"], name)
    gallery.save(figure, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()
    assert not recwarn.list


@pytest.mark.parametrize("letter, width", [("a", 1), ("猫", 2)])
def test_long_names_of_photos_are_cut_to_their_width(letter, width):
    assert gallery.shorten(letter * (28 // width)) == letter * (28 // width)
    assert gallery.shorten(letter * 29) == letter * (27 // width) + "…"


def test_letters_that_matplotlibs_font_lacks_are_of_the_users_fonts(monkeypatch):
    monkeypatch.setattr(gallery.font_manager, "get_font_names", lambda: ["Mine", "SimHei", "Serif"])
    monkeypatch.setattr(gallery, "EAST_ASIAN", ["Not Here", "SimHei"])
    with matplotlib.rc_context({"font.family": ["Mine", "serif"], "font.serif": ["Gone", "Serif"]}):
        assert gallery.choose_fonts() == ["sans-serif", "Mine", "Serif", "SimHei"]


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


def test_what_some_devices_do_not_have_is_computed_on_the_cpu(checkpoint, evaluated, monkeypatch):
    to_cpu, quantile = torch.Tensor.cpu, torch.Tensor.quantile

    def on_cpu(tensor):
        moved = to_cpu(tensor).view_as(tensor)
        moved.on_cpu = True
        return moved

    def only_there(tensor, *arguments, **options):
        assert tensor.on_cpu
        return quantile(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "cpu", on_cpu)
    monkeypatch.setattr(torch.Tensor, "quantile", only_there)
    assert evaluate_in(checkpoint.parent) == evaluated.test
