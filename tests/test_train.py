import functools
import io
import math
import os
import signal
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, ended, evaluate_in, files, needs_cifar10, weights, without_times
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from torch.optim.optimizer import register_optimizer_step_pre_hook

import bench
import data
import evaluate
import plot
import train
from checkpoint import load_checkpoint
from history import read_history
from run import Run
from train import make_model, make_optimizer, parse_args

CPU = torch.device("cpu")
COSINE = [0.0005 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]
CONSTANT = ("--schedule none --lr 0.01", [0.01, 0.01])


@pytest.fixture
def rates():
    """A list that the learning rate of every optimiser step will be in."""
    rates = []
    with register_optimizer_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"])):
        yield rates


def tiny(options):
    return parse_args([*TINY, *options.split()])


def test_a_run_leaves_its_history_and_its_checkpoint(run, tmp_path):
    history = run("--reported 61")
    assert set(files(tmp_path)) == {"run.json", "run.pt"}
    assert history["name"] == "run"
    assert history["config"]["arch"] == [4, 8]
    assert history["reported"] == [61]
    assert history["finished"] is True
    assert len(history["batch_losses"]) == 2 * 4
    assert all(loss == float(f"{loss:.6g}") for loss in history["batch_losses"])
    assert [epoch["epoch"] for epoch in history["epochs"]] == [1, 2]
    assert history["environment"]["precision"] == "float32"
    assert history["environment"]["threads"] == torch.get_num_threads()
    assert history["config"]["data_dir"] == "data"  # as it is typed
    place = {"data_dir": str(Path("data").absolute())}  # evaluate.py may be run elsewhere
    assert load_checkpoint(tmp_path / "run.pt")["config"] == history["config"] | place


def test_the_command_of_a_history_is_what_one_types_beside_the_scripts(run, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/a notebook's kernel"])
    command = run("--lr 0.01")["command"]
    assert command.startswith("python train.py --dataset shapes ")
    assert command.endswith("--lr 0.01")


def test_training_from_python_leaves_the_signals_handlers_as_they_were(run):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run()
    ended(run, "--overwrite --lr 2e9 --optimizer sgd")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_training_loss_of_an_epoch_is_the_mean_over_its_images(run):
    history = run()
    sizes = [32, 32, 32, 4]
    total = sum(loss * size for loss, size in zip(history["batch_losses"], sizes))
    assert history["epochs"][0]["train_loss"] == pytest.approx(total / 100)


def test_every_epoch_has_a_shuffle_of_its_own_and_the_accuracy_of_its_images(run):
    history = run("--lr 0 --dropout 0")  # the network stays as it began
    train_set = data.load("shapes")[:100]
    x, labels = next(train_set.batches(100))
    correct = make_model(tiny("--dropout 0"), train_set, CPU, "float32")(x).argmax(1) == labels
    assert [epoch["train_accuracy"] for epoch in history["epochs"]] == [correct.sum()] * 2
    assert set(history["batch_losses"][:4]).isdisjoint(history["batch_losses"][4:])


def test_the_same_seed_gives_the_same_history_and_another_seed_another(run, tmp_path):
    first = without_times(run("--augment crop flip"))
    again = without_times(run("--augment crop flip --overwrite"))
    assert first == again
    run("--augment crop flip --seed 1")
    other = read_history(tmp_path / "run-seed1.json")
    assert first["batch_losses"] != other["batch_losses"]


@pytest.mark.parametrize("options, expected", [("--epochs 4", COSINE), CONSTANT])
def test_the_learning_rate_in_the_history_is_the_one_that_was_used(run, rates, options, expected):
    used = [epoch["lr"] for epoch in run(options)["epochs"]]
    assert rates == [lr for lr in used for _ in range(4)]
    assert used == pytest.approx(expected)


def test_onecycle_warms_up_in_a_fifth_of_the_run_and_comes_down_batch_by_batch(run, rates):
    history = run("--schedule onecycle --epochs 5")
    up, down = np.arange(1, 5) / 4, np.arange(16, 0, -1) / 16
    assert rates == pytest.approx(0.001 * np.concatenate([up, down]))
    assert [epoch["lr"] for epoch in history["epochs"]] == rates[3::4]  # the last batch's


@pytest.mark.parametrize(
    "options, kind, expected",
    [
        ("", AdamW, {"weight_decay": 0.01}),
        ("--weight-decay 0.1", AdamW, {"weight_decay": 0.1}),
        ("--optimizer adam", Adam, {"weight_decay": 0}),
        ("--optimizer sgd", SGD, {"weight_decay": 0, "momentum": 0}),
        ("--optimizer sgd --momentum 0.9 --nesterov", SGD, {"momentum": 0.9, "nesterov": True}),
        ("--optimizer another --weight-decay 0.1", RMSprop, {"weight_decay": 0.1}),
        ("--optimizer another --weight-decay 0.1", Adagrad, {"weight_decay": 0.1}),
    ],
)
def test_optimisers_are_pytorchs_with_its_defaults(options, kind, expected, monkeypatch):
    monkeypatch.setitem(train.OPTIMIZERS, "another", kind)  # any of them can be added
    optimizer = make_optimizer(torch.nn.Linear(1, 1), tiny(options))
    assert type(optimizer) is kind
    assert expected.items() <= optimizer.defaults.items()


@pytest.mark.parametrize(
    "option, first",
    [
        ("--init dirac", 0),
        ("--whiten", 0),
        ("--no-block-relu", 0),
        ("--norm batch", 0),
        ("--downsample 2", 0),
        ("--pool max", 0),
        ("--logit-scale 0.5", 0),
        ("--augment crop", 0),
    ],
)
def test_an_option_changes_the_losses_from_the_batch_on_that_it_acts_on(run, option, first):
    base = "--arch 8 8 4 --init default --optimizer sgd --lr 0.03 --momentum 0.9 --weight-decay 0.1"
    plain = run(base)["batch_losses"]
    changed = run(base, option, "--overwrite")["batch_losses"]
    differ = [number for number, (a, b) in enumerate(zip(plain, changed)) if a != b]
    assert differ == list(range(first, 8))


def test_label_smoothing_changes_the_training_loss_alone(run, tmp_path):
    plain = run("--fc 1")
    smooth = run("--fc 1 --label-smoothing 0.4 --overwrite")
    train_set = data.load("shapes")[:100]
    images, labels = next(train_set.batches(32, seed=0))
    chances = make_model(tiny("--fc 1"), train_set, CPU, "float32")(images).log_softmax(1)
    true = -chances.gather(1, labels[:, None]).mean().item()
    expected = 0.6 * true - 0.4 * chances.mean().item()
    assert plain["batch_losses"][0] == pytest.approx(true, rel=1e-5)
    assert smooth["batch_losses"][0] == pytest.approx(expected, rel=1e-5)
    assert smooth["epochs"][-1]["val_loss"] == pytest.approx(evaluate_in(tmp_path)["loss"])


def test_holdout_validates_on_training_images_and_trains_on_the_others():
    sets = train.load_data(tiny("--holdout 500 --limit 9500"), CPU)
    for images, expected in zip(sets, data.hold_out(data.load("shapes"), 500)):
        assert torch.equal(images.images, expected.images)


@pytest.mark.parametrize(
    "options, least",
    [
        ("--dataset shapes --limit 10000 --arch 8 4", 60),  # a linear classifier stays below 30
        pytest.param("--dataset cifar10 --limit 5000 --arch 16 8 4", 25, marks=needs_cifar10),
    ],
)
def test_a_network_learns(run, monkeypatch, options, least):
    monkeypatch.chdir(ROOT)
    history = run(options, "--k 3 --fc 1 --init default --batch-size 64 --lr 0.005 --epochs 1")
    assert history["epochs"][-1]["val_accuracy"] > least


def test_bfloat16_gives_nearly_the_same_losses(run):
    exact = run()["epochs"][-1]["train_loss"]
    rounded = run("--overwrite --precision bfloat16")["epochs"][-1]["train_loss"]
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


def test_every_epoch_prints_a_line_and_progress_stays_out_of_pipes(run, capsys):
    history = run()
    output = capsys.readouterr()
    lines = [line for line in output.out.splitlines() if line.startswith(("  1/2", "  2/2"))]
    assert len(lines) == 2
    assert f"{history['epochs'][1]['val_accuracy']:.2f}" in lines[1]
    assert f"{history['parameters']:,} parameters" in output.out
    assert output.err == ""


def test_progress_is_one_line_on_a_terminal(run, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    run()
    first, *_, end = terminal.getvalue().split("\r")
    assert first.startswith("  1/2  batch 1/4  ")
    assert first.rstrip().endswith(" left")
    assert end == ""  # what follows takes its place
    assert "\n" not in terminal.getvalue()


def test_progress_fits_a_narrow_terminal(run, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty, terminal.fileno = lambda: True, lambda: 2
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("os.get_terminal_size", lambda number: os.terminal_size((30, 20)))
    run()
    assert {len(line) for line in terminal.getvalue().split("\r")[:-1]} == {29}


def test_a_small_learning_rate_is_printed_as_it_is(run, capsys):
    run("--lr 3e-7 --schedule none")
    assert "  1/2       3e-07  " in capsys.readouterr().out


def test_a_batch_that_processes_cannot_share_equally_is_refused(monkeypatch, refused):
    monkeypatch.setattr(train, "WORLD_SIZE", 3)
    line = refused(parse_args, ["--batch-size", "128"], code=2)
    assert "--batch-size 128: 3 processes have equal shares of a batch" in line
    assert parse_args(["--batch-size", "129"]).batch_size == 129


def test_a_name_is_made_from_the_options():
    assert parse_args("--arch 16 8 --fc 1".split()).name == "cifar10-16-8-k3"
    assert parse_args("--arch 16 --seed 2".split()).name == "cifar10-16-k3-seed2"


def test_a_compiled_network_has_the_losses_of_the_others(run, monkeypatch):
    options = "--arch 8 8 --fc 1 --limit 256 --batch-size 128"
    plain = run(options)["batch_losses"]
    # All of torch.compile but the compiler, which takes half a minute.
    compiler = Mock(side_effect=functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch, "compile", compiler)
    compiled = run(options, "--compile --overwrite")["batch_losses"]
    assert compiler.called
    assert compiled == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(
    "parse, options",
    [
        (parse_args, "--out=~/x --data-dir=~/x"),
        (evaluate.parse_args, "~/x --data-dir=~/x --image=~/x --out=~/x"),
        (evaluate.parse_args, "~/x --export=~/x"),
        (plot.parse_args, "~/x --out=~/x"),
        (bench.parse_args, "--json=~/x"),
    ],
)
def test_options_that_are_paths_know_the_home_folder(parse, options, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(parse(options.split())).count("Path('/home/me/x')") == options.count("~")


def test_a_further_metric_of_batches_goes_into_the_history(run, monkeypatch):
    log_batch = Run.log_batch

    def log_one_more(self, epoch, step, *metrics, **others):
        log_batch(self, epoch, step, *metrics, **others, place=float(step))

    monkeypatch.setattr(Run, "log_batch", log_one_more)
    steps = (32 * 0 + 32 * 1 + 32 * 2 + 4 * 3) / 100
    assert [epoch["train_place"] for epoch in run()["epochs"]] == pytest.approx([steps] * 2)


def test_a_metric_that_is_new_when_a_run_goes_on_is_of_the_batches_that_have_it(
    run, stop, monkeypatch
):
    stop(2)
    log_batch = Run.log_batch
    monkeypatch.setattr(Run, "log_batch", functools.partialmethod(log_batch, place=1.0))
    epochs = run("--resume")["epochs"]
    assert [epoch["train_place"] for epoch in epochs] == [1, 1]


def test_a_network_has_as_many_outputs_as_its_data_set_has_classes(run, tmp_path, monkeypatch):
    monkeypatch.setitem(data.CLASSES, "shapes", [*data.CLASSES["shapes"], "heart", "moon"])
    run("--fc 1 --holdout 0")
    assert weights(tmp_path)["classifier.2.bias"].shape == (12,)
    assert len(evaluate_in(tmp_path)["confusion"]) == 12
