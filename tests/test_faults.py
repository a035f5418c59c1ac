import errno
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY, ended, ending, execute, files

import data
import run as run_module
import train
from checkpoint import load_checkpoint
from history import read_history
from run import claim, format_command

OPTIONS = [*TINY, *"--name run --limit 120 --batch-size 8 --epochs 3 --augment crop flip".split()]


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
    """A process that trains, forked from a server that has imported what takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "evaluate", "pytest"])
    arguments = (folder, options, file_size, save_seconds)
    process = context.Process(target=in_process, args=arguments)
    process.start()
    return process


def finish(process, seconds=60):
    """The exit code of a process that `start` started, when it has ended; None if it has not."""
    process.join(seconds)
    return process.exitcode


def killed(process, delay, kind):
    """Send a process a signal after some seconds, wait for its end; whether it was still there."""
    alive = finish(process, delay) is None
    if alive:
        os.kill(process.pid, kind)
    finish(process)
    return alive


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """How a run ends that nothing happens to, and how many seconds it takes."""
    finish(start(tmp_path_factory.mktemp("first")))  # it waits for torch to be imported
    folder, began = tmp_path_factory.mktemp("whole"), time.monotonic()
    assert finish(start(folder)) == 0
    seconds = time.monotonic() - began
    return ending(folder), seconds


@pytest.mark.parametrize("number", range(10))
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
    if (tmp_path / "run.pt").exists():
        load_checkpoint(tmp_path / "run.pt")
    assert finish(start(tmp_path, "--resume")) == 0
    assert ending(tmp_path) == expected


NOHUP = pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="nohup runs the tests"
)
KINDS = (signal.SIGTERM, 143), (signal.SIGINT, 130), pytest.param(signal.SIGHUP, 129, marks=NOHUP)


@pytest.mark.parametrize("kind, code", KINDS)
def test_a_signal_saves_the_state_and_says_how_to_go_on(whole, tmp_path, kind, code):
    process = start(tmp_path, "--name", "run", "--overwrite", save_seconds=1000)
    while not (tmp_path / "run.json").exists():
        time.sleep(0.01)
    os.kill(process.pid, kind)
    assert finish(process) == code
    (line,) = (tmp_path / "stderr").read_text().splitlines()
    words = [*OPTIONS, "--out", str(tmp_path), "--name", "run", "--resume"]
    assert line == f"train.py: {kind.name}: go on with python train.py {shlex.join(words)}"
    assert "state" in load_checkpoint(tmp_path / "run.pt")
    assert finish(start(tmp_path, "--resume")) == 0
    assert ending(tmp_path) == whole[0]


def test_the_command_that_goes_on_is_in_windows_words_there(monkeypatch):
    words = [r".\train.py", "--out", r"C:\my runs"]
    assert format_command(words) == r"python '.\train.py' --out 'C:\my runs'"
    monkeypatch.setattr(os, "name", "nt")
    assert format_command(words) == r'python .\train.py --out "C:\my runs"'


def test_a_disk_too_full_for_what_resuming_needs_does_not_stop_a_run(whole, tmp_path):
    assert finish(start(tmp_path, file_size=50_000)) == 0  # enough for the weights
    warnings = (tmp_path / "stderr").read_text().splitlines()
    assert warnings and all("warning: the state is not saved" in line for line in warnings)
    assert ending(tmp_path) == whole[0]


def test_a_disk_too_full_for_the_last_weights_lets_a_run_go_on_later(run, tmp_path, monkeypatch):
    run()
    whole, save = ending(tmp_path), torch.save

    def refuse_the_last(checkpoint, file):
        if "state" not in checkpoint:
            raise OSError(errno.ENOSPC, "No space left")
        save(checkpoint, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", refuse_the_last)
        assert "No space left: " in ended(run, "--overwrite")
    assert len(read_history(tmp_path / "run.json")["epochs"]) == 2
    run("--resume")
    assert ending(tmp_path) == whole


def test_a_disk_too_full_for_the_history_stops_a_run_and_the_last_one_stays(whole, tmp_path):
    small = "--pool max --fc 1 --epochs 150".split()  # its checkpoint is smaller than its history
    assert finish(start(tmp_path, *small, file_size=16_000, save_seconds=1000)) == 1
    (line,) = (tmp_path / "stderr").read_text().splitlines()
    assert line == f"train.py: error: [Errno 27] File too large: '{tmp_path / 'run.json'}'"
    assert len(read_history(tmp_path / "run.json")["epochs"]) >= 1
    assert set(files(tmp_path)) == {"run.json", "run.pt", "stderr"}


def test_a_disk_too_full_for_an_overwrite_leaves_everything(run, tmp_path, monkeypatch):
    run()
    before = files(tmp_path)
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert "No space left: " in ended(run, "--overwrite")
    assert files(tmp_path) == before


def test_a_disk_that_is_full_from_the_start_lets_no_run_begin(tmp_path):
    assert finish(start(tmp_path, file_size=6_000)) == 1
    (line,) = (tmp_path / "stderr").read_text().splitlines()
    assert line.startswith("train.py: error: ") and "run.pt" in line
    assert set(files(tmp_path)) == {"stderr"}


def test_a_run_goes_on_when_nobody_reads_what_it_prints(tmp_path):
    options = [*OPTIONS, "--out", str(tmp_path)]
    command = shlex.join([sys.executable, "train.py", *options])
    result = execute("bash", "-c", f"{command} 2>/dev/full | head -1; exit ${{PIPESTATUS[0]}}")
    assert result.returncode == 0
    assert "parameters" in result.stdout and "epoch" not in result.stdout
    assert read_history(tmp_path / "run.json")["finished"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_flush_is_written_to_all_the_same(run, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(number, "not here")))
    assert run()["finished"]


def test_a_disk_that_fails_to_flush_is_told(run, monkeypatch):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    assert "Input/output error" in ended(run)


def test_a_run_needs_no_stderr(run, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # so it is where the shell closed it
    assert run()["finished"]


@pytest.mark.parametrize(
    "options, reason, advice",
    [
        ("", "DefaultCPUAllocator: no memory", "--batch-size"),
        ("--compile", "DefaultCPUAllocator: no memory", "--batch-size"),
        ("--compile", "no compiler\n...", "--compile"),
    ],
)
def test_what_does_not_fit_a_machine_ends_in_a_line(run, monkeypatch, options, reason, advice):
    monkeypatch.setattr(train, "predict", Mock(side_effect=RuntimeError(reason)))
    monkeypatch.setattr("torch.compile", lambda model: model)
    assert ended(run, options).endswith(advice)


def test_a_folder_that_vanishes_stops_a_run_with_a_line(run, tmp_path, monkeypatch):
    predict = train.predict
    monkeypatch.setattr(train, "predict", lambda *a: shutil.rmtree(tmp_path) or predict(*a))
    line = ended(run)
    assert "No such file or directory" in line
    assert "\n" not in line


def test_two_runs_of_one_name_at_the_same_time_are_refused(run, tmp_path):
    with claim(tmp_path, "run"):
        assert f"another process is training {tmp_path / 'run'}" in ended(run)
    run()


def test_a_loss_that_is_not_finite_stops_the_run_at_its_batch(run, tmp_path, capsys):
    assert ended(run, "--lr 2e9 --optimizer sgd") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("train.py: the loss is ")
    assert "at epoch 1, batch " in line and "learning rate 2e+09" in line
    assert read_history(tmp_path / "run.json")["finished"] is False


def test_a_validation_loss_that_is_not_finite_stops_the_run(run, tmp_path, capsys):
    one_step = "--limit 8 --batch-size 8 --lr 2e9 --optimizer sgd"  # breaks the weights
    assert ended(run, one_step) == 1
    assert "val_loss is nan after epoch 1" in capsys.readouterr().err
    assert read_history(tmp_path / "run.json")["epochs"] == []


def test_a_file_system_without_locks_is_a_warning(run, monkeypatch, capsys, tmp_path):
    error = OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=error))
    assert run()["finished"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: Function not implemented")
    assert str(tmp_path) in line
