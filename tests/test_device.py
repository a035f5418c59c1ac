import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import RECIPE, ROOT, TINY, execute

import device
import fast
from history import read_history

CPU = torch.device("cpu")
# The batches are of 30, 30, 30 and 1 image: of two processes, the second has none of the last.
OPTIONS = [*TINY, *"--limit 91 --batch-size 30 --dropout 0 --augment crop flip".split()]
LONG = "--epochs 40 --schedule none --optimizer sgd --lr 0.01 --holdout 100".split()


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("has_it", [True, False])
def test_auto_is_bfloat16_where_the_cpu_has_instructions_for_it(monkeypatch, machine, has_it):
    monkeypatch.setattr(device.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "the best")
    x86 = machine == "x86_64"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it and x86)
    monkeypatch.setattr(fast, "ONEDNN_HAS_BFLOAT16", has_it or x86)
    assert device.choose_precision(CPU) == ("bfloat16" if has_it else "float32")
    assert device.choose_precision(CPU, "bfloat16") == "bfloat16"
    assert device.choose_precision(CPU, "float32") == "float32"


def test_auto_is_float32_where_pytorch_may_not_use_them(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert device.choose_precision(CPU) == "float32"


def test_auto_is_float32_where_onednn_may_not_use_them():
    code = "import device, torch; print(device.choose_precision(torch.device('cpu')))"
    result = execute(sys.executable, "-c", code, ONEDNN_MAX_CPU_ISA="AVX2")
    assert result.stdout == "float32\n", result.stderr


@pytest.mark.parametrize("git", [None, "exit 128", r"printf '\351'"])
def test_without_git_or_a_repository_there_is_no_commit(monkeypatch, tmp_path, git):
    if git:  # what it prints need not be UTF-8
        (tmp_path / "git").write_text(f"#!/bin/sh\n{git}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.describe_environment(CPU, "float32")["commit"] is None


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
