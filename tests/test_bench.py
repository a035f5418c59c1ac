import json
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
from test_textbook import as_textbook

import bench
import fast
import train
from model import Block

CPU = torch.device("cpu")


@pytest.mark.parametrize("downsample", [False, True])
def test_the_textbooks_block_of_best_computes_what_ours_does(downsample):
    ours = Block(6, 7, k=2, norm="batch", downsample=downsample)
    theirs = bench.BestBlock(ours)
    theirs.load_state_dict(as_textbook(ours.state_dict(), k=2))
    x = torch.randn(4, 6, 16, 16)
    torch.testing.assert_close(theirs(x), ours(x))


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
    others = ["k = 1, a plain convolution", "one convolution's as a product"]
    assert list(names) == ["outputs", "inputs", "kernels", *others]
    assert next(iter(comparisons["64 to 128, 32x32, k = 3, batch 32"])) == "kernels"


def test_a_call_is_timed_alone_where_it_takes_long(monkeypatch):
    limit = Mock()
    monkeypatch.setattr(fast, "limit_threads", limit)  # of textbook forms as of ours
    step = Mock(side_effect=lambda: time.sleep(0.21))
    bench.prepare(lambda: step)
    limit.assert_called_once()
    assert step.call_count == 5
    assert bench.time_step() == pytest.approx(0.21, rel=0.5)
    assert step.call_count == 6


def test_all_parts_are_timed_printed_and_kept_as_json(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fast, "FORM", "auto")  # is set back
    monkeypatch.setattr(train, "WORLD_SIZE", 3)  # of a cluster's environment
    # Quicker than processes; all run their steps, though as threads they time the last one's.
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda count, *_: ThreadPoolExecutor(count))
    monkeypatch.setattr(bench, "TURNS", 1)
    monkeypatch.setattr(bench, "SHAPES", [(4, 8, 8, 3)])
    monkeypatch.setattr(bench, "ROWS", {"row 4": f"{bench.ROWS['row 4']} --batch-size 2"})
    bench.main(["--device", "cpu", "--json", str(tmp_path / "new" / "cpu.json")])
    report = json.loads((tmp_path / "new" / "cpu.json").read_text())
    assert f"{torch.get_num_threads()} threads" in report["device"]
    block, step = report["results"]
    assert block["what"] == "4 to 8, 8x8, k = 3, batch 512"
    assert step["what"] == "training step of row 4, batch 2"
    assert "textbook, float32" in step["seconds"]
    printed = capsys.readouterr().out
    for result in (block, step):
        assert all(name in printed for name in (result["what"], *result["seconds"]))


def test_too_little_memory_is_a_line_and_what_was_measured_is_kept(monkeypatch, refused, tmp_path):
    results = iter([{"what": "a block", "seconds": {}}])

    def measure_or_fail(*_):
        for result in results:
            return result
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(bench, "compare", measure_or_fail)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda count, *_: ThreadPoolExecutor(count))
    line = refused(bench.main, ["--only", "form", "--json", str(tmp_path / "cpu.json")])
    assert line.startswith("bench.py: error: DefaultCPUAllocator: can't allocate memory")
    assert json.loads((tmp_path / "cpu.json").read_text())["results"] == [
        {"what": "a block", "seconds": {}}
    ]


BEST = "--arch 4 4 8 --fc 1 --norm batch --downsample 2 --whiten --init dirac"


@pytest.mark.parametrize("build", [bench.build_step, bench.build_textbook_step])
@pytest.mark.parametrize("options", ["--arch 4 8 --fc 1 --lr 0.01", BEST], ids=["report", "best"])
def test_a_training_step_trains(options, build):
    args = train.parse_args(f"{options} --batch-size 8".split())
    step = build(args, CPU, "float32")
    losses = [step() for _ in range(20)]
    assert losses[-1] < losses[0]
