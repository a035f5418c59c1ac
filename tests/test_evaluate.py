import re

import pytest
import torch

import evaluate
from history import read_history


@pytest.fixture
def evaluated(run, tmp_path, capsys):
    """A tiny run, evaluated: its history, and what evaluate.py printed."""
    run()
    capsys.readouterr()
    evaluate.main([str(tmp_path / "run.pt")])
    return read_history(tmp_path / "run.json"), capsys.readouterr().out


def test_the_last_line_is_the_reports(evaluated):
    history, output = evaluated
    last = output.splitlines()[-1]
    assert re.fullmatch(r"Final Model Test Accuracy: \d+\.\d\d%", last)
    assert f"{history['test']['accuracy']:.2f}%" in last


def test_the_test_figures_are_those_of_the_last_epoch(evaluated):
    history, _ = evaluated
    assert history["test"]["accuracy"] == pytest.approx(history["epochs"][-1]["val_accuracy"])
    assert history["test"]["loss"] == pytest.approx(history["epochs"][-1]["val_loss"])
    assert history["finished"] is True


def test_every_class_is_printed_and_kept(evaluated):
    history, output = evaluated
    for name, accuracy in history["test"]["per_class"].items():
        assert f"{name} {accuracy:6.2f}%" in output
    assert len(history["test"]["per_class"]) == 10


def test_figures_are_those_of_a_hand_made_example():
    labels = torch.tensor([0, 0, 1, 2])
    logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 9, 0], [0, 9, 0]])
    figures = evaluate.test_figures(logits, labels, ["a", "b", "c"])
    assert figures["accuracy"] == 50
    assert figures["per_class"] == {"a": 50, "b": 100, "c": 0}
    assert figures["confusion"] == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]


def test_a_checkpoint_alone_is_enough(run, tmp_path, capsys):
    run()
    (tmp_path / "run.json").unlink()
    moved = (tmp_path / "run.pt").rename(tmp_path / "elsewhere.pt")
    evaluate.main([str(moved)])
    output = capsys.readouterr()
    assert "Final Model Test Accuracy" in output.out
    assert "elsewhere.json is not there" in output.err
    assert not (tmp_path / "elsewhere.json").exists()
