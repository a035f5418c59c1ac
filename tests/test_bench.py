import contextlib
import json
from unittest.mock import Mock

import pytest
import torch

import bench
import fast
from model import Block


def test_the_textbook_block_computes_what_ours_does():
    ours = Block(5, 7, k=3)
    textbook = bench.TextbookBlock(ours)
    kernels = zip(ours.convs.weight.chunk(3), ours.convs.bias.chunk(3))
    for conv, (weight, bias) in zip(textbook.convs, kernels):
        conv.load_state_dict({"weight": weight, "bias": bias})
    textbook.gate_linear.load_state_dict(ours.gate_linear.state_dict())
    images = torch.randn(4, 5, 16, 16)
    torch.testing.assert_close(textbook(images), ours(images))


class Inline(contextlib.ExitStack):  # instead of a process of its own
    def submit(self, function, *arguments):
        if function is bench.prepare:
            self.step = arguments[0](*arguments[1:])
            return Mock()
        if function is bench.time_step:
            return Mock(result=self.step)
        return Mock(result=lambda: function(*arguments))


def test_two_forms_are_timed_in_turn(capsys):
    calls, ours, textbook = [], iter([2, 2, 1]), iter([4, 6, 8])

    def build(name, seconds):
        return lambda: calls.append(name) or next(seconds)

    forms = (build, "ours", ours), (build, "textbook", textbook)
    row = bench.compare("x", *forms, "textbook", (Inline(), Inline()), turns=3)
    assert calls == ["ours", "textbook"] * 3
    figures = {"seconds": 2, "other_seconds": 6, "ratio": 3, "ratio_min": 2, "ratio_max": 8}
    assert row == {"what": "x", "against": "textbook"} | figures
    assert "3.00 (2.00 to 8.00)" in capsys.readouterr().out


def test_the_form_that_is_chosen_is_marked(monkeypatch, capsys):
    monkeypatch.setattr(bench, "build_block", lambda *arguments: lambda: len(arguments[-1]))
    row = bench.compare_forms((8, 4, 16, 3), 2, torch.device("cpu"), "float32", Inline())
    assert row["chosen"] == "outputs"
    assert row["seconds"] == {form: len(form) for form in fast.FORMS}
    line = capsys.readouterr().out
    assert line.startswith("8 to 4, 16x16, k = 3")
    assert line.count("*") == 1
    assert "7000.00*" in line


@pytest.mark.parametrize("seconds, calls", [(1, 5), (6, 2), (30, 1)])
def test_a_form_is_warmed_up_by_five_calls_or_ten_seconds(monkeypatch, seconds, calls):
    timed = Mock(return_value=seconds)
    monkeypatch.setattr(bench, "time_step", timed)
    bench.prepare(Mock())
    assert timed.call_count == calls


def test_the_results_are_written_as_json(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "compare", lambda what, *_: what)
    monkeypatch.setattr(bench, "compare_forms", lambda shape, *_: f"form {shape}")
    bench.main(["--device", "cpu", "--json", str(tmp_path / "new" / "cpu.json")])
    report = json.loads((tmp_path / "new" / "cpu.json").read_text())
    assert f"{torch.get_num_threads()} threads" in report["device"]
    parts = {what.split()[0] for what in report["results"]}
    assert parts == {"form", "the", "training"}


@pytest.mark.parametrize("textbook", [False, True])
def test_a_training_step_trains(monkeypatch, textbook):
    options = {"arch": [4, 4, 8], "fc": 1, "norm": "batch", "downsample": True, "residual": True}
    monkeypatch.setattr(bench, "ROWS", {"tiny": (options, 8)})
    step = bench.build_training("tiny", torch.device("cpu"), "float32", textbook)
    losses = [step() for _ in range(20)]
    assert losses[-1] < losses[0]


def test_every_form_can_be_built_and_run():
    cpu = torch.device("cpu")
    bench.build_block(4, 8, 8, 3, 2, cpu, "bfloat16", "kernels")()
    bench.build_backbone(1, cpu, "bfloat16")()
