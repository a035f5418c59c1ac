"""Where a run computes: which precision a CPU gets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import device

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("has_it", [True, False])
def test_auto_is_bfloat16_where_the_cpu_has_instructions_for_it(monkeypatch, machine, has_it):
    monkeypatch.setattr(device.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "the best")
    if machine == "x86_64":
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    allowed = has_it or machine == "x86_64"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: allowed)
    assert device.precision_on(CPU) == ("bfloat16" if has_it else "float32")
    assert device.precision_on(CPU, "bfloat16") == "bfloat16"
    assert device.precision_on(CPU, "float32") == "float32"


@pytest.mark.parametrize("limit", ["ATEN_CPU_CAPABILITY=avx2", "ONEDNN_MAX_CPU_ISA=AVX2"])
def test_auto_is_float32_where_pytorch_or_onednn_may_not_use_them(limit):
    code = "import device, torch; print(device.precision_on(torch.device('cpu')))"
    environment = os.environ | dict([limit.split("=")])
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.stdout == "float32\n", result.stderr


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert device.environment(CPU, "float32")["commit"] is None
