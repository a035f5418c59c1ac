"""What happens to runs: kills, full disks, damaged and hostile files."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import left_in, stop_after, without_times

import data
import evaluate
import run as run_module
import train
from checkpoint import FORMAT, claim, compute_digest, load_checkpoint
from history import read_history

OPTIONS = (
    "--dataset shapes --arch 4 6 --k 2 --hidden 8 --limit 120 --batch-size 8 --epochs 3 --name run "
    "--augment crop flip"
).split()


def in_process(folder, options, file_size, save_seconds):
    """In a process of its own: train in a folder, with files limited to a size, on fewer shapes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.stderr = open(folder / "stderr", "w", buffering=1)
    sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(1)
    draw = data.draw_shapes
    data.draw_shapes = lambda count, seed: draw(min(count, 250), seed)
    run_module.SAVE_SECONDS = save_seconds
    train.main([*OPTIONS, "--out", str(folder), *options])


def start(folder, *options, file_size=resource.RLIM_INFINITY, save_seconds=0):
    """A process that trains; torch is imported once, in the server that it is forked from."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "test_faults"])
    arguments = (folder, options, file_size, save_seconds)
    process = context.Process(target=in_process, args=arguments)
    process.start()
    return process


def finish(process):
    """The exit code of a process that `start` started, when it has ended."""
    process.join(60)
    return process.exitcode


def killed(process, delay, kind):
    """Send a process a signal after some seconds, wait for its end; whether it was still there."""
    process.join(delay)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, kind)
    process.join(60)
    return alive


def complain(folder):
    """The lines that the last process in a folder left on stderr."""
    return (folder / "stderr").read_text().splitlines()


def weights(folder):
    return load_checkpoint(folder / "run.pt")["weights"]


def same_end(folder, whole):
    """Assert that the run in a folder ended as the one in `whole`, bit for bit."""
    ended, expected = (read_history(path / "run.json") for path in (folder, whole))
    assert without_times(ended) == without_times(expected)
    torch.testing.assert_close(weights(folder), weights(whole), rtol=0, atol=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing happened to, and how many seconds it took."""
    for _ in range(2):  # the first one waits for torch to be imported
        folder = tmp_path_factory.mktemp("whole")
        began = time.monotonic()
        assert finish(start(folder)) == 0
        seconds = time.monotonic() - began
    return folder, seconds


@pytest.mark.parametrize("number", range(20))
def test_a_killed_run_goes_on_to_the_same_end(whole, tmp_path, number):
    expected, seconds = whole
    chance = random.Random(number)
    kind = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    delay = chance.uniform(0.1, 0.9) * seconds
    while not killed(start(tmp_path, "--overwrite"), delay, kind):
        delay /= 2  # it had finished
    killed(start(tmp_path, "--resume"), chance.uniform(0.1, 0.9) * seconds, kind)
    if (tmp_path / "run.json").exists():
        read_history(tmp_path / "run.json")  # whole, whenever the process died
    if (tmp_path / "run.state.pt").exists():
        load_checkpoint(tmp_path / "run.state.pt")
    assert finish(start(tmp_path, "--resume")) == 0
    same_end(tmp_path, expected)


@pytest.mark.parametrize("kind, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_state_and_says_how_to_go_on(whole, tmp_path, kind, code):
    process = start(tmp_path, save_seconds=1000)
    while not (tmp_path / "run.json").exists():
        time.sleep(0.01)
    os.kill(process.pid, kind)
    assert finish(process) == code
    (line,) = complain(tmp_path)
    assert line.startswith(f"train.py: {kind.name}: go on with python ")
    assert line.endswith("--resume")
    assert (tmp_path / "run.state.pt").exists()
    assert finish(start(tmp_path, "--resume")) == 0
    same_end(tmp_path, whole[0])


def test_a_disk_too_full_for_checkpoints_does_not_stop_a_run_before_its_end(whole, tmp_path):
    assert finish(start(tmp_path, file_size=16_000)) == 1
    *warnings, last = complain(tmp_path)
    assert warnings and all("warning: the state is not saved" in line for line in warnings)
    assert last.startswith("train.py: no weights written")
    history = read_history(tmp_path / "run.json")
    assert len(history["epochs"]) == 3 and not history["finished"]
    assert left_in(tmp_path) == ["run.json", "stderr"]
    assert finish(start(tmp_path, "--resume")) == 0
    same_end(tmp_path, whole[0])


def test_a_disk_too_full_for_the_history_stops_a_run_and_the_last_one_stays(whole, tmp_path):
    assert finish(start(tmp_path, "--epochs", "60", file_size=6_000, save_seconds=1000)) == 1
    (line,) = complain(tmp_path)
    assert line.startswith("train.py: error: ") and "File too large" in line
    assert len(read_history(tmp_path / "run.json")["epochs"]) >= 1
    assert left_in(tmp_path) == ["run.json", "stderr"]


def test_a_folder_that_vanishes_stops_a_run_with_a_line(run, tmp_path, monkeypatch, capsys):
    after_epoch = run_module.Run.after_epoch

    def vanish(self, *arguments):
        shutil.rmtree(tmp_path)
        after_epoch(self, *arguments)

    monkeypatch.setattr(run_module.Run, "after_epoch", vanish)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert "No such file or directory" in stopped.value.code
    assert "\n" not in stopped.value.code


def test_two_runs_of_one_name_at_the_same_time_are_refused(run, tmp_path):
    with claim(tmp_path, "run"), pytest.raises(SystemExit) as stopped:
        run()
    assert f"another process is training {tmp_path / 'run'}" in stopped.value.code
    run()


def test_a_loss_that_is_not_finite_stops_the_run_at_its_batch(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "SAVE_SECONDS", -1)
    with pytest.raises(SystemExit) as stopped:
        run("--lr", "1e30", "--optimizer", "sgd")
    assert stopped.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("train.py: the loss is ")
    assert "at epoch 1, batch " in line and "learning rate 1e+30" in line
    assert read_history(tmp_path / "run.json")["finished"] is False
    if (tmp_path / "run.state.pt").exists():
        saved = load_checkpoint(tmp_path / "run.state.pt")["weights"]
        assert all(tensor.isfinite().all() for tensor in saved.values())


def test_a_validation_loss_that_is_not_finite_stops_the_run(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:  # the only step breaks the weights after its loss
        run("--lr", "1e30", "--limit", "8", "--batch-size", "8", "--optimizer", "sgd")
    assert stopped.value.code == 1
    assert "the validation loss is nan after epoch 1" in capsys.readouterr().err
    assert read_history(tmp_path / "run.json")["epochs"] == []


def test_a_run_without_a_schedule_can_be_given_more_epochs(run, tmp_path):
    longer = without_times(run("--schedule", "none", "--epochs", "3"))
    run("--schedule", "none", "--epochs", "2", "--overwrite")
    assert without_times(run("--schedule", "none", "--epochs", "3", "--resume")) == longer


def test_a_run_with_a_schedule_cannot(run):
    run("--epochs", "2")
    with pytest.raises(SystemExit) as stopped:
        run("--epochs", "3", "--resume")
    assert "cosine schedule depends on the number of epochs" in stopped.value.code


def test_options_that_do_not_change_the_result_may_differ_when_resuming(run, tmp_path, monkeypatch):
    whole = without_times(run("--device", "cpu"))
    (tmp_path / "run.pt").unlink()
    history = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(history | {"finished": False}))
    resumed = run("--resume", "--device", "auto", "--data-dir", "elsewhere", "--reported", "50")
    assert without_times(resumed) == whole


def die(*arguments):
    raise RuntimeError("killed")


def test_a_killed_overwrite_never_mixes_two_runs(run, tmp_path, monkeypatch):
    run("--schedule", "none")
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "_write_history", die)
        with pytest.raises(RuntimeError):
            run("--schedule", "none", "--seed", "7", "--overwrite")
    assert left_in(tmp_path) == ["run.json"]
    with pytest.raises(SystemExit, match="seed 0 .now 7."):
        run("--schedule", "none", "--seed", "7", "--resume")


def test_a_state_of_other_options_is_refused(run, tmp_path):
    run("--schedule", "none")
    (tmp_path / "run.json").unlink()
    with pytest.raises(SystemExit, match="run.state.pt was made with other options, seed 0"):
        run("--schedule", "none", "--seed", "7", "--resume")


def test_a_state_without_its_history_is_gone_on_with(run, tmp_path, monkeypatch):
    whole = without_times(run())
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 11)
        run("--overwrite")
    (tmp_path / "run.json").unlink()
    after_epoch, epochs = run_module.Run.after_epoch, []
    monkeypatch.setattr(
        run_module.Run, "after_epoch",
        lambda self, *rest: epochs.append(self.epoch) or after_epoch(self, *rest),
    )  # fmt: skip
    assert without_times(run("--resume")) == whole
    assert epochs == [1]  # the first is not repeated


def test_a_kill_at_the_very_end_repeats_nothing(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(run_module.Run, "_remove", die)
        run()
    assert read_history(tmp_path / "run.json")["finished"]
    with pytest.raises(SystemExit) as stopped:
        run("--resume")
    assert stopped.value.code == 0


@pytest.mark.parametrize(
    "gone, options", [(".pt", []), (".state.pt", ["--schedule", "none", "--epochs", "3"])]
)
def test_a_finished_run_that_lost_a_file_is_refused_and_kept(run, tmp_path, gone, options):
    run(*options[:2])
    (tmp_path / f"run{gone}").unlink()
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(SystemExit, match=f"run{gone} is gone"):
        run("--resume", *options)
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_resumed_run_keeps_the_environment_of_its_last_start(run, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 2)
        run("--reported", "40")
    monkeypatch.setattr(train, "environment", lambda *_: {"device": "another", "precision": "?"})
    history = run("--resume", "--reported", "50", "--mix", "outputs")
    assert history["reported"] == 50
    assert history["environment"]["device"] == "another"
    assert history["environment"]["mix"] == ["outputs", "outputs"]


def test_a_killed_runs_half_written_files_go_with_the_next_start(run, tmp_path):
    for name in ("run.pt.123.part", "run.state.pt.123.part", "run.other.pt.123.part"):
        (tmp_path / name).touch()
    run()
    assert left_in(tmp_path) == ["run.json", "run.other.pt.123.part", "run.pt"]


def draw_options(chance):
    """Options of a run at random: whatever can be combined."""
    pick = chance.choice
    options = ["--gate", pick(["softmax", "relu", "sigmoid", "none"])]
    options += ["--arch", *map(str, chance.choices([4, 8, 17], k=chance.randint(1, 4)))]
    options += ["--k", pick("123"), "--fc", pick("123"), "--pool", pick(["avg", "adaptive"])]
    options += ["--init", pick(["he", "default"]), "--mix", pick(["auto", "outputs", "kernels"])]
    options += ["--batch-size", pick(["7", "32", "100"]), "--holdout", pick(["0", "500"])]
    options += ["--schedule", pick(["cosine", "onecycle", "none"]), "--seed", pick("019")]
    options += ["--precision", pick(["float32", "bfloat16"]), "--dropout", pick(["0", "0.5"])]
    options += pick([[], ["--optimizer", "adam"],
                     "--optimizer sgd --lr 0.05 --momentum 0.9 --nesterov".split()])  # fmt: skip
    flags = "--norm batch,--downsample,--residual,--label-smoothing 0.1,--ema 0.9,--no-bias-decay"
    for flag in f"{flags},--no-block-relu,--augment crop,--augment flip cutout".split(","):
        options += flag.split() if chance.random() < 0.4 else []
    return options


@pytest.mark.parametrize("number", range(int(os.environ.get("COMBINATIONS", 6))))
def test_any_combination_of_options_is_resumed_bit_for_bit(run, tmp_path, monkeypatch, number):
    chance = random.Random(number)
    options = draw_options(chance)
    whole = without_times(run(*options))
    expected = weights(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, chance.randint(1, len(whole["batch_losses"])))
        run(*options, "--overwrite")
    assert without_times(run(*options, "--resume")) == whole
    torch.testing.assert_close(weights(tmp_path), expected, rtol=0, atol=0)


class Hostile:
    """An object whose pickle would create a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path, as_zip):
    checkpoint = {"format": FORMAT, "config": Hostile(tmp_path / "ran")}
    torch.save(checkpoint, tmp_path / "run.pt", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(tmp_path / "run.pt")])
    assert "run.pt is not a whole checkpoint" in stopped.value.code
    assert "\n" not in stopped.value.code
    assert not (tmp_path / "ran").exists()


def test_a_flipped_bit_in_a_checkpoint_is_found_or_harmless(run, tmp_path):
    run()
    path, good, found = tmp_path / "run.pt", weights(tmp_path), 0
    content = path.read_bytes()
    for share in range(1, 40):
        flipped = bytearray(content)
        flipped[len(content) * share // 40] ^= 1
        path.write_bytes(flipped)
        try:
            loaded = weights(tmp_path)
        except ValueError as error:
            assert str(path) in str(error)
            found += 1
        else:  # it was in the padding between the tensors
            torch.testing.assert_close(loaded, good, rtol=0, atol=0)
    assert found > 20


@pytest.mark.parametrize("suffix", [".json", ".state.pt"])
def test_a_damaged_file_is_named_and_kept_when_resuming(run, tmp_path, monkeypatch, suffix):
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(SystemExit):
            run()
    path = tmp_path / f"run{suffix}"
    path.write_bytes(path.read_bytes()[:-20])
    before = path.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        run("--resume")
    assert str(path) in stopped.value.code
    assert path.read_bytes() == before


def test_a_state_of_another_network_is_refused(run, tmp_path):
    run("--schedule", "none")
    saved = load_checkpoint(tmp_path / "run.state.pt")
    saved["weights"]["classifier.2.weight"] = torch.zeros(3, 3)
    saved["digest"] = compute_digest(saved)
    torch.save(saved, tmp_path / "run.state.pt")
    with pytest.raises(SystemExit) as stopped:
        run("--schedule", "none", "--epochs", "3", "--resume")
    assert "run.state.pt is of another run" in stopped.value.code
