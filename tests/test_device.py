import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import RECIPE, ROOT, TINY, evaluate_in, execute

import device
import fast
import run as run_module
from history import read_history

CPU = torch.device("cpu")
# The batches are of 30, 30, 30 and 1 image: of two processes, the second has none of the last.
OPTIONS = [*TINY, *"--limit 91 --batch-size 30 --dropout 0 --augment crop flip".split()]
LONG = "--epochs 40 --schedule none --optimizer sgd --lr 0.01 --holdout 100".split()


def test_auto_is_bfloat16_where_the_cpu_has_instructions_for_it():
    has_them = re.search(r"\b(avx512_bf16|bf16)\b", Path("/proc/cpuinfo").read_text())
    assert device.choose_precision(CPU) == ("bfloat16" if has_them else "float32")
    assert device.choose_precision(CPU, "bfloat16") == "bfloat16"
    assert device.choose_precision(CPU, "float32") == "float32"


@pytest.mark.parametrize("limit", [{"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"ATEN_CPU_CAPABILITY": "avx2"}])
def test_auto_is_float32_where_they_may_not_be_used(limit):
    code = "import device, torch; print(device.choose_precision(torch.device('cpu')))"
    result = execute(sys.executable, "-c", code, **limit)
    assert result.stdout == "float32\n", result.stderr


@pytest.mark.parametrize("precision, emulated", [("bfloat16", False), ("float32", True)])
def test_auto_is_float32_on_gpus_that_emulate_bfloat16(monkeypatch, precision, emulated):
    support = Mock(return_value=not emulated)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", support)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    assert device.choose_precision(torch.device("cuda", 0)) == precision
    support.assert_called_once_with(including_emulation=False)


GROUPS = {  # files of control groups, and how many cores they allow
    "v2": ("0::/job/step", {"job/step/cpu.max": "150000 100000", "cpu.max": "max 100000"}, 1.5),
    "v2, of a container": ("0::/outside", {"cpu.max": "100000 50000"}, 2),
    "v2, of a group around": ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "9 9"}, 0.5),
    "v2, no limit": ("0::/", {"cpu.max": "max 100000"}, None),
    "v1": (
        "4:cpu,cpuacct:/a\n5:memory:/a b",
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
        3,
    ),
    "v1, no limit": (
        "4:cpu:/",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        None,
    ),
}


@pytest.mark.parametrize("own, files, cores", GROUPS.values(), ids=GROUPS)
def test_the_quota_of_a_container_is_found(tmp_path, own, files, cores):
    (tmp_path / "cgroup").write_text(own + "\n")
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    assert fast.read_cpu_quota(tmp_path / "root", tmp_path / "cgroup") == cores


@pytest.mark.parametrize(
    "cores, asked, threads",
    [(1.5, None, 1), (0.3, None, 1), (9, None, 2), (None, None, 2), (1, "2", 2)],
)
def test_a_quota_limits_the_threads_unless_their_number_is_asked_for(
    monkeypatch, cores, asked, threads
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(fast, "read_cpu_quota", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    used = [2]
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    fast.limit_threads()
    assert used[-1] == threads


@pytest.mark.parametrize("git", [None, "exit 128", r"printf '\351'"])
def test_without_git_or_a_repository_there_is_no_commit(monkeypatch, tmp_path, git):
    if git:  # what it prints need not be UTF-8
        (tmp_path / "git").write_text(f"#!/bin/sh\n{git}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_module.describe_environment(CPU, "float32")["commit"] is None


@pytest.fixture
def repository(tmp_path):
    """Another repository, with a commit."""
    git = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "of others"], check=True)
    return tmp_path


def test_the_commit_is_of_these_scripts_whatever_the_environment_names(monkeypatch, repository):
    expected = run_module.find_commit()
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    assert run_module.find_commit() == expected


def test_scripts_that_lie_in_another_repository_have_no_commit(monkeypatch, repository):
    for folder in (repository, repository / "unpacked"):
        folder.mkdir(exist_ok=True)
        (folder / "run.py").touch()
    monkeypatch.setattr(run_module, "__file__", str(repository / "unpacked" / "run.py"))
    assert run_module.find_commit() is None
    monkeypatch.setattr(run_module, "__file__", str(repository / "run.py"))
    assert run_module.find_commit() is None


def test_a_test_is_of_one_process_whatever_the_environment_says(run, tmp_path, monkeypatch):
    run()
    monkeypatch.setattr(device, "WORLD_SIZE", 2)
    monkeypatch.setattr(device.dist, "init_process_group", Mock(side_effect=AssertionError))
    assert evaluate_in(tmp_path)["images"] == 1000


@pytest.mark.parametrize("size", ["", "two", "-1", "0"])
def test_a_number_of_processes_that_is_none_is_refused(run, refused, monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert f"WORLD_SIZE={size!r} in the environment is not a number" in refused(run)


def test_a_process_says_that_it_waits_for_others_and_where(monkeypatch, capsys):
    monkeypatch.setattr(device, "WORLD_SIZE", 2)
    monkeypatch.setattr(device, "PATIENCE", 0)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.delenv("MASTER_PORT", raising=False)

    def come_late(backend):
        time.sleep(0.2)
        raise RuntimeError("late")

    monkeypatch.setattr(device.dist, "init_process_group", come_late)
    with pytest.raises(ValueError, match="do not meet at node1:. .late"):
        device.join_processes(CPU)
    assert "process 0 of 2 waits for the others at node1:?" in capsys.readouterr().err


def train_with_two(folder, *options):
    """The command that trains a run with two processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["train.py", *OPTIONS, "--name", "run", "--out", str(folder), *options]
    return [*torchrun, "--nproc-per-node=2", *script]


def assert_close(history, expected):
    assert history["batch_losses"] == pytest.approx(expected["batch_losses"], rel=1e-5)
    for epoch, other in zip(history["epochs"], expected["epochs"]):
        for figure in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert epoch[figure] == pytest.approx(other[figure], rel=1e-5)


def test_two_processes_give_the_losses_of_one(run, tmp_path):
    # Batch statistics are each process's own.
    recipe = [word for word in RECIPE if word not in ("--norm", "batch")]
    result = execute(*train_with_two(tmp_path / "two", *recipe))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("parameters") == 1  # one process alone prints
    assert_close(read_history(tmp_path / "two" / "run.json"), run(*OPTIONS, *recipe))


def test_in_bfloat16_too_a_process_may_have_none_of_the_last_batch(run, tmp_path):
    options = "--precision bfloat16 --batch-size 4 --limit 21 --epochs 1".split()
    result = execute(*train_with_two(tmp_path / "two", *options))
    assert result.returncode == 0, result.stderr
    history, alone = read_history(tmp_path / "two" / "run.json"), run(*OPTIONS, *options)
    assert history["batch_losses"] == pytest.approx(alone["batch_losses"], rel=0.01)


def test_wrong_data_are_a_line_of_several_processes_too(tmp_path):
    result = execute(*train_with_two(tmp_path, "--holdout", "15"))
    assert result.returncode != 0  # torchrun may end the others before they say the same
    assert "train.py: error: --holdout 15: not a multiple" in result.stderr
    assert "RuntimeError" not in result.stderr


@pytest.fixture
def running(tmp_path):
    """torchrun with two processes, after the first of 40 epochs; the run is in tmp_path / "two"."""
    process = subprocess.Popen(
        train_with_two(tmp_path / "two", *LONG),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    while b"  1/40" not in process.stdout.readline():
        assert process.poll() is None
    yield process
    process.kill()


def test_a_run_that_loses_a_process_stops(running, tmp_path):
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert running.wait(60) != 0
    assert 1 <= len(read_history(tmp_path / "two" / "run.json")["epochs"]) < 40


def test_a_stopped_run_goes_on_with_another_number_of_processes(running, run, tmp_path):
    running.terminate()
    assert running.wait(60) != 0
    assert (tmp_path / "two" / "run.pt").exists()
    resumed = run(*OPTIONS, *LONG, "--resume", out=tmp_path / "two")
    assert_close(resumed, run(*OPTIONS, *LONG))


@pytest.mark.parametrize("size, rank", [("", 0), ("1", 0), ("2", 1)])
def test_a_rank_means_something_only_among_several_processes(monkeypatch, size, rank):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": size}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    names = runpy.run_path(str(ROOT / "device.py"))
    assert (names["RANK"], names["LOCAL_RANK"]) == (rank, rank)
