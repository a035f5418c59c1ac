import pytest
import torch

from figures import calibration, gate_figures, most_wrong, prediction_figures


def test_figures_are_those_of_a_hand_made_example():
    labels = torch.tensor([0, 0, 1, 2])
    logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 9, 0], [0, 9, 0]])
    figures = prediction_figures(logits, labels, ["a", "b", "c"])
    assert figures["accuracy"] == 50
    assert figures["per_class"] == {"a": 50, "b": 100, "c": 0}
    assert figures["confusion"] == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]


def test_calibration_of_a_hand_made_example():
    percentages = torch.tensor([[70.0, 30], [30, 70], [10, 90], [95, 5]])
    figures = calibration(percentages, torch.tensor([0, 0, 1, 0]))
    assert [part["count"] for part in figures["bins"]] == [0] * 10 + [2, 0, 0, 1, 1]
    assert figures["bins"][10] == {"confidence": 70, "accuracy": 50, "count": 2}
    assert figures["bins"][0] == {"confidence": None, "accuracy": None, "count": 0}
    assert figures["ece"] == pytest.approx((2 * 20 + 10 + 5) / 4)


def test_the_wrong_images_come_with_the_most_confident_first():
    percentages = torch.tensor([[60.0, 40], [20, 80], [1, 99], [55, 45]])
    wrong = most_wrong(percentages, torch.tensor([1, 0, 1, 0]), ["a", "b"])
    assert wrong == [
        {"index": 1, "true": "a", "predicted": "b", "confidence": 80},
        {"index": 0, "true": "b", "predicted": "a", "confidence": 60},
    ]


def test_gate_figures_of_a_hand_made_example():
    coefficients = torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    figures = gate_figures(coefficients, torch.tensor([0, 0, 1]), ["a", "b"])
    assert figures["mean_per_class"] == [[0.25, 0.75], [1, 0]]
    assert figures["quantiles"] == [[0, 0.25, 0.5, 0.75, 1]] * 2
