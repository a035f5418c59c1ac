import json
import time
from unittest.mock import Mock

import pytest
import torch

import bench
import fast
import train
from model import Block

CPU = torch.device("cpu")


def test_the_textbook_block_computes_what_ours_does():
    ours = Block(5, 7, k=3)
    textbook = bench.TextbookBlock(ours)
    kernels = zip(ours.convs.weight.chunk(3), ours.convs.bias.chunk(3))
    for conv, (weight, bias) in zip(textbook.convs, kernels):
        conv.load_state_dict({"weight": weight, "bias": bias})
    textbook.gate_linear.load_state_dict(ours.gate_linear.state_dict())
    images = torch.randn(4, 5, 16, 16)
    torch.testing.assert_close(textbook(images), ours(images))


class Inline:  # instead of a process of its own
    def submit(self, function, *arguments):
        if function is bench.prepare:
            self.step = arguments[0]()
            return Mock()
        return Mock(result=lambda: self.step())


def test_forms_are_timed_in_turn(monkeypatch, capsys):
    monkeypatch.setattr(bench, "TURNS", 3)
    calls, seconds = [], {"ours": (2, 2, 1), "textbook": (4, 6, 8)}

    def build(name):
        left = iter(seconds[name])
        return lambda: lambda: calls.append(name) or next(left)

    workers = [Inline() for _ in range(4)]
    row = bench.compare("x", {name: build(name) for name in seconds}, workers)
    assert calls == ["ours", "textbook"] * 3
    assert row == {"what": "x", "seconds": seconds}
    title, ours, textbook = capsys.readouterr().out.splitlines()
    assert (title, ours.split()) == ("x", ["ours", "2000.00", "ms"])
    assert textbook.split() == ["textbook", "6000.00", "ms", "3.00", "(2.00", "to", "8.00)"]


def test_the_chosen_form_comes_first_and_all_are_there():
    comparisons = dict(bench.list_forms(CPU, "float32"))
    names = comparisons["8 to 4, 32x32, k = 3, batch 32"]
    assert list(names) == ["outputs", "kernels", "one convolution's as a product"]
    assert next(iter(comparisons["64 to 128, 32x32, k = 3, batch 32"])) == "kernels"


def test_a_call_is_timed_alone_where_it_takes_long(monkeypatch):
    step = Mock(side_effect=lambda: time.sleep(0.21))
    bench.prepare(lambda: step)
    assert step.call_count == 5
    assert bench.time_step() == pytest.approx(0.21, rel=0.5)
    assert step.call_count == 6


def test_the_results_are_written_as_json(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "compare", lambda what, forms, workers: [what, *forms])
    bench.main(["--device", "cpu", "--json", str(tmp_path / "new" / "cpu.json"), "--only", "step"])
    report = json.loads((tmp_path / "new" / "cpu.json").read_text())
    assert f"{torch.get_num_threads()} threads" in report["device"]
    assert report["results"][0][0] == "training step of row 4, batch 128"
    assert report["results"][0][-1] == "textbook, float32"


@pytest.mark.parametrize("textbook", [False, True])
def test_a_training_step_trains(textbook):
    options = "--arch 4 4 8 --fc 1 --norm batch --downsample 2 --residual --init whiten"
    args = train.parse_args(f"{options} --batch-size 8".split())
    step = bench.build_training(args, CPU, "float32", textbook)
    losses = [step() for _ in range(20)]
    assert losses[-1] < losses[0]


def test_blocks_and_products_can_be_built_and_run(monkeypatch):
    monkeypatch.setattr(fast, "FORM", "auto")  # is set back
    bench.build_block("kernels", (4, 8, 8, 3), 2, CPU, "bfloat16")()
    assert bench.build_product(2 * 2048**2, CPU, "bfloat16")().shape == (2048, 3)
