import json

import pytest
import torch
from torch.utils.data import DataLoader

import bench
import data
from model import Block


def test_the_textbook_block_computes_what_ours_does():
    ours, textbook = Block(5, 7, k=3), bench.TextbookBlock(5, 7, k=3)
    kernels = zip(ours.convs.weight.chunk(3), ours.convs.bias.chunk(3))
    for conv, (weight, bias) in zip(textbook.convs, kernels):
        conv.load_state_dict({"weight": weight, "bias": bias})
    textbook.gate_linear.load_state_dict(ours.gate_linear.state_dict())
    images = torch.randn(4, 5, 16, 16)
    torch.testing.assert_close(textbook(images), ours(images))


def test_the_textbook_loader_yields_what_ours_does():
    dataset = data.load("shapes", train=False)
    textbook = DataLoader(bench.PerImage(dataset, augment=False), 128)
    for (images, labels), (expected, expected_labels) in zip(
        data.batches(dataset, "shapes", 128), textbook
    ):
        torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(labels, expected_labels)


def test_two_functions_are_timed_in_turn_after_a_turn_to_warm_up(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    result = bench.compare(
        "x", lambda: calls.append("ours"), lambda: calls.append("textbook"),
        torch.device("cpu"), turns=2,
    )  # fmt: skip
    assert calls == ["textbook", "ours"] * 3
    assert result == {
        "what": "x", "ours_seconds": 1, "textbook_seconds": 1,
        "ratio": 1, "ratio_min": 1, "ratio_max": 1,
    }  # fmt: skip


def test_the_figures_are_written_as_json(monkeypatch, tmp_path):
    tiny = {"a tiny row": ({"arch": [4, 8], "hidden": 8}, 4)}
    monkeypatch.setattr(bench, "ROWS", tiny)
    bench.main(["--only", "step", "--device", "cpu", "--json", str(tmp_path / "new" / "cpu.json")])
    report = json.loads((tmp_path / "new" / "cpu.json").read_text())
    assert report["threads"] == torch.get_num_threads()
    (row,) = report["results"]
    assert row["what"] == "training step of a tiny row, batch 4"
    assert row["ratio"] > 0


@pytest.mark.parametrize("textbook", [False, True])
def test_a_training_step_changes_the_network(textbook):
    step = bench.training_step({"arch": [4], "fc": 1}, torch.device("cpu"), textbook)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    first = float(step(images, labels))
    for _ in range(20):
        last = float(step(images, labels))
    assert last < first
