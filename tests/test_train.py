import io
import math

import pytest
import torch
from conftest import CIFAR10, TINY, needs_cifar10, without_times

import train
from console import Progress, duration
from history import read_history
from options import parse_args


def stop_after(monkeypatch, batches, signal_number=15):
    """Let a signal come when so many batches, of training or validation, are done."""
    stop_if_asked, count = train.Run.stop_if_asked, [0]

    def counted(self):
        count[0] += 1
        if count[0] == batches:
            self.on_signal(signal_number, None)
        stop_if_asked(self)

    monkeypatch.setattr(train.Run, "stop_if_asked", counted)


def test_a_run_leaves_its_history_and_its_checkpoint(run, tmp_path):
    history = run("--reported", "61")
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "run.pt"}
    assert history["name"] == "run"
    assert history["config"]["arch"] == [4, 8]
    assert history["reported"] == 61
    assert history["finished"] is True
    assert len(history["batch_losses"]) == 2 * 4
    assert [epoch["epoch"] for epoch in history["epochs"]] == [1, 2]
    assert history["environment"]["mix"] == ["outputs", "kernels"]
    assert torch.load(tmp_path / "run.pt", weights_only=True)["config"] == history["config"]


def test_the_training_loss_of_an_epoch_is_the_mean_over_its_images(run):
    history = run()
    sizes = [32, 32, 32, 4]
    total = sum(loss * size for loss, size in zip(history["batch_losses"], sizes))
    assert history["epochs"][0]["train_loss"] == pytest.approx(total / 100)


def test_the_same_seed_gives_the_same_history_and_another_seed_another(run):
    first = without_times(run("--augment", "crop", "flip"))
    again = without_times(run("--augment", "crop", "flip", "--overwrite"))
    other = without_times(run("--augment", "crop", "flip", "--overwrite", "--seed", "1"))
    assert first == again
    assert first["batch_losses"] != other["batch_losses"]


def test_the_learning_rate_in_the_history_is_the_one_that_was_used(run, monkeypatch):
    used = []
    train_epoch = train.Run.train_epoch

    def noting(self):
        used.append(self.optimizer.param_groups[0]["lr"])
        train_epoch(self)

    monkeypatch.setattr(train.Run, "train_epoch", noting)
    history = run("--epochs", "4")
    assert [epoch["lr"] for epoch in history["epochs"]] == used
    assert used == pytest.approx([0.0005 * (1 + math.cos(math.pi * t / 4)) for t in range(4)])


def test_without_a_schedule_the_learning_rate_stays(run):
    history = run("--schedule", "none", "--lr", "0.01")
    assert [epoch["lr"] for epoch in history["epochs"]] == [0.01, 0.01]


@pytest.mark.parametrize(
    "options, kind, expected",
    [
        ([], torch.optim.AdamW, {"weight_decay": 0.01}),
        (["--optimizer", "adam"], torch.optim.Adam, {"weight_decay": 0}),
        (["--optimizer", "sgd"], torch.optim.SGD, {"weight_decay": 0, "momentum": 0}),
        (["--optimizer", "sgd", "--momentum", "0.9"], torch.optim.SGD, {"momentum": 0.9}),
        (["--weight-decay", "0.1"], torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
)
def test_optimisers_are_pytorchs_with_its_defaults(tmp_path, options, kind, expected):
    args = parse_args("", [*TINY, "--out", str(tmp_path), *options])
    optimizer = train.Run(args).optimizer
    assert type(optimizer) is kind
    assert expected.items() <= optimizer.defaults.items()


def test_holdout_validates_on_training_images(tmp_path):
    args = parse_args("", [*TINY, "--holdout", "500", "--out", str(tmp_path)])
    run = train.Run(args)
    assert (len(run.train_set), len(run.validation_set)) == (100, 500)
    assert torch.equal(
        run.validation_set.tensors[0], train.data.hold_out(train.data.load("shapes"), 500)[1][:][0]
    )


def test_the_network_learns_shapes_far_better_than_a_linear_classifier(run):
    history = run(
        *"--limit 10000 --batch-size 128 --arch 8 4 --k 3 --fc 1 --init default".split(),
        *"--lr 0.005 --epochs 3".split(),
    )
    assert history["epochs"][-1]["val_accuracy"] > 60  # a linear one stays below 30


@pytest.mark.parametrize("gate", ["softmax", "relu", "sigmoid", "none"])
def test_the_loss_falls_with_every_gate(run, gate):
    epochs = run("--gate", gate, "--lr", "0.01", "--epochs", "4", "--fc", "1")["epochs"]
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]


def test_bfloat16_gives_nearly_the_same_losses(run):
    exact = run()["epochs"][-1]
    rounded = run("--overwrite", "--precision", "bfloat16")["epochs"][-1]
    assert rounded["train_loss"] == pytest.approx(exact["train_loss"], rel=0.02)
    assert rounded["train_loss"] != exact["train_loss"]


def test_every_epoch_prints_a_line_and_progress_stays_out_of_pipes(run, capsys):
    history = run()
    output = capsys.readouterr()
    lines = [line for line in output.out.splitlines() if line.startswith(("  1/2", "  2/2"))]
    assert len(lines) == 2
    assert f"{history['epochs'][1]['val_accuracy']:.2f}" in lines[1]
    assert "block1" in output.out and "total" in output.out
    assert output.err == ""


def test_progress_is_one_line_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(start=0, end=10, images_per_epoch=1000)
    progress.began = progress.shown = progress.began - 5  # five seconds ago
    progress.show(0.5, 3, 6)
    assert "  1/10  batch 3/6  100 images/s  1m35s left" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()


@pytest.mark.parametrize(
    "seconds, text", [(4.2, "4.2s"), (59.7, "1m00s"), (200, "3m20s"), (7500, "2h05m")]
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("batches", [2, 4, 6, 13])  # within, at the end of, after the first epoch
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_interrupted_run_goes_on_to_the_same_end(run, monkeypatch, tmp_path, batches, optimizer):
    options = ["--optimizer", optimizer, "--augment", "crop", "flip", "--epochs", "3"]
    whole = without_times(run(*options))
    weights = torch.load(tmp_path / "run.pt", weights_only=True)["weights"]
    with monkeypatch.context() as patch:
        stop_after(patch, batches)
        with pytest.raises(SystemExit) as stopped:
            run(*options, "--overwrite")
    assert stopped.value.code == 128 + 15
    assert (tmp_path / "run.state.pt").exists()
    assert without_times(run(*options, "--resume")) == whole
    resumed = torch.load(tmp_path / "run.pt", weights_only=True)["weights"]
    torch.testing.assert_close(resumed, weights, rtol=0, atol=0)
    assert not (tmp_path / "run.state.pt").exists()


def test_an_interrupted_run_says_how_to_go_on(run, monkeypatch, capsys):
    stop_after(monkeypatch, 2, signal_number=2)
    monkeypatch.setattr("sys.argv", ["train.py", "--name", "my run", "--overwrite"])
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 130
    assert "go on with python train.py --name 'my run' --resume" in capsys.readouterr().err


def test_a_run_that_was_killed_before_anything_was_saved_begins_again(run, monkeypatch, tmp_path):
    def die(self):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train_epoch", die)
        with pytest.raises(RuntimeError):
            run()
    assert read_history(tmp_path / "run.json")["finished"] is False
    assert run("--resume")["finished"] is True


def test_resuming_a_finished_run_changes_nothing(run, tmp_path):
    run()
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        run("--resume")
    assert stopped.value.code == 0
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_name_is_made_from_the_options():
    name = parse_args("", "--arch 16 8 --fc 1 --augment crop flip --device cpu".split()).name
    assert name == "cifar10-16-8-k3-augment-crop-flip-fc-1"


@needs_cifar10
def test_the_network_learns_cifar10(run):
    history = run(
        *"--dataset cifar10 --limit 5000 --batch-size 64 --arch 16 8 4 --k 3 --fc 1".split(),
        *f"--init default --lr 0.005 --epochs 1 --data-dir {CIFAR10}".split(),
    )
    assert history["epochs"][-1]["val_accuracy"] > 25
