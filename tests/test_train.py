import io
import math

import pytest
import torch
from conftest import CIFAR10, RECIPE, TINY, left_in, needs_cifar10, stop_after, without_times
from torch.optim.swa_utils import AveragedModel

import data
import evaluate
from history import format_seconds, read_history
from run import Progress, Run
from train import make_model, make_optimizer, parse_args

CPU = torch.device("cpu")


def rates_used(monkeypatch):
    """A list that the learning rate of every optimiser step of AdamW will be in."""
    rates, step = [], torch.optim.AdamW.step

    def noting(self):
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    return rates


def test_a_run_leaves_its_history_and_its_checkpoint(run, tmp_path):
    history = run("--reported", "61")
    assert left_in(tmp_path) == ["run.json", "run.pt"]
    assert history["name"] == "run"
    assert history["config"]["arch"] == [4, 8]
    assert history["reported"] == 61
    assert history["finished"] is True
    assert len(history["batch_losses"]) == 2 * 4
    assert [epoch["epoch"] for epoch in history["epochs"]] == [1, 2]
    assert history["environment"]["precision"] == "float32"
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
    rates = rates_used(monkeypatch)
    history = run("--epochs", "4")
    used = [epoch["lr"] for epoch in history["epochs"]]
    assert rates == [lr for lr in used for _ in range(4)]
    assert used == pytest.approx([0.0005 * (1 + math.cos(math.pi * t / 4)) for t in range(4)])


def test_onecycle_warms_up_to_the_learning_rate_and_comes_down_batch_by_batch(run, monkeypatch):
    rates = rates_used(monkeypatch)
    history = run("--schedule", "onecycle", "--epochs", "5")
    assert len(rates) == 5 * 4
    peak = rates.index(max(rates))
    assert rates[0] == pytest.approx(0.001 / 25)
    assert (peak, max(rates)) == (5, pytest.approx(0.001))  # at 30 %
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 1e-6
    assert [epoch["lr"] for epoch in history["epochs"]] == rates[3::4]  # the last batch's


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
        (["--optimizer", "sgd", "--momentum", "0.9", "--nesterov"], torch.optim.SGD,
         {"momentum": 0.9, "nesterov": True}),
        (["--weight-decay", "0.1"], torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
)  # fmt: skip
def test_optimisers_are_pytorchs_with_its_defaults(options, kind, expected):
    args = parse_args([*TINY, *options])
    optimizer = make_optimizer(make_model(args, CPU), args)
    assert type(optimizer) is kind
    assert expected.items() <= optimizer.defaults.items()


@pytest.mark.parametrize(
    "option, first",
    [
        ("--norm batch", 0),
        ("--downsample", 0),
        ("--residual", 0),
        ("--augment cutout", 0),
        ("--label-smoothing 0.1", 0),
        ("--schedule onecycle", 1),
        ("--nesterov", 1),
        ("--no-bias-decay", 1),
        ("--ema 0.9", None),
    ],
)
def test_an_option_changes_the_losses_from_the_batch_on_that_it_acts_on(run, option, first):
    base = "--arch 8 8 4 --init default --optimizer sgd --momentum 0.9 --weight-decay 0.1".split()
    plain = run(*base)["batch_losses"]
    changed = run(*base, *option.split(), "--overwrite")["batch_losses"]
    differ = [number for number, (a, b) in enumerate(zip(plain, changed)) if a != b]
    assert differ == ([] if first is None else list(range(first, 8)))


@pytest.mark.parametrize("options, decay", [([], 0.01), (["--weight-decay", "0.1"], 0.1)])
def test_weight_decay_can_be_for_weights_only(options, decay):
    args = parse_args([*TINY, "--no-bias-decay", "--norm", "batch", *options])
    model = make_model(args, CPU)
    decayed, others = make_optimizer(model, args).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (decay, 0)
    assert all(".norm." not in names[id(p)] and p.dim() > 1 for p in decayed["params"])
    assert {names[id(p)].split(".")[-1] for p in others["params"]} == {"bias", "weight"}
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_label_smoothing_changes_the_training_loss_alone(run, tmp_path):
    plain = run("--fc", "1")
    smooth = run("--fc", "1", "--label-smoothing", "0.4", "--overwrite")
    train_set, _ = data.load_both("shapes", limit=100)
    images, labels = next(iter(data.batches(train_set, "shapes", 32, seed=0)))
    chances = make_model(parse_args([*TINY, "--fc", "1"]), CPU)(images).log_softmax(1)
    true = -chances.gather(1, labels[:, None]).mean().item()
    expected = 0.6 * true - 0.4 * chances.mean().item()
    assert plain["batch_losses"][0] == pytest.approx(true, rel=1e-5)
    assert smooth["batch_losses"][0] == pytest.approx(expected, rel=1e-5)
    evaluate.main([str(tmp_path / "run.pt")])
    test = read_history(tmp_path / "run.json")["test"]
    assert smooth["epochs"][-1]["val_loss"] == pytest.approx(test["loss"])


def test_the_moving_average_is_validated_and_kept_and_training_stays_the_same(
    run, tmp_path, monkeypatch
):
    options = ["--norm", "batch", "--optimizer", "sgd", "--momentum", "0.9"]
    plain = run(*options)
    averages, update = [], AveragedModel.update_parameters

    def noting(self, model):
        now = {name: value.clone() for name, value in model.state_dict().items()}
        before = averages[-1] if averages else now
        averages.append({name: 0.75 * before[name] + 0.25 * now[name] for name in now})
        update(self, model)

    monkeypatch.setattr(AveragedModel, "update_parameters", noting)
    history = run(*options, "--ema", "0.75", "--overwrite")
    assert history["batch_losses"] == plain["batch_losses"]
    assert history["epochs"][-1]["val_loss"] != plain["epochs"][-1]["val_loss"]
    assert len(averages) == 8
    kept = torch.load(tmp_path / "run.pt", weights_only=True)["weights"]
    expected = {name: value for name, value in averages[-1].items() if "num_batches" not in name}
    assert len(expected) == len(kept) - 2
    for name, value in expected.items():
        torch.testing.assert_close(kept[name], value)
    evaluate.main([str(tmp_path / "run.pt")])
    test = read_history(tmp_path / "run.json")["test"]
    assert test["loss"] == pytest.approx(history["epochs"][-1]["val_loss"])


def test_holdout_validates_on_training_images(run):
    _, validation_set = data.load_both("shapes", holdout=500, limit=100)
    _, held = data.hold_out(data.load("shapes"), 500)
    assert torch.equal(validation_set.tensors[0], held.tensors[0])
    accuracy = run("--holdout", "500")["epochs"][-1]["val_accuracy"]
    assert accuracy * 5 == pytest.approx(round(accuracy * 5))  # of 500 images


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
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("batches", [2, 4, 6, 13])  # within, at the end of, after the first epoch
@pytest.mark.parametrize(
    "changes", [[], RECIPE, ["--precision", "bfloat16"]], ids=["report", "recipe", "bfloat16"]
)
def test_an_interrupted_run_goes_on_to_the_same_end(run, monkeypatch, tmp_path, batches, changes):
    options = ["--augment", "crop", "flip", *changes, "--epochs", "3"]
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
    def die(self, *arguments):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "after_batch", die)
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
    name = parse_args("--arch 16 8 --fc 1 --augment crop flip --device cpu".split()).name
    assert name == "cifar10-16-8-k3-augment-crop-flip-fc-1"


@needs_cifar10
def test_the_network_learns_cifar10(run):
    history = run(
        *"--dataset cifar10 --limit 5000 --batch-size 64 --arch 16 8 4 --k 3 --fc 1".split(),
        *f"--init default --lr 0.005 --epochs 1 --data-dir {CIFAR10}".split(),
    )
    assert history["epochs"][-1]["val_accuracy"] > 25
