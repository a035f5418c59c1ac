"""What a test says, from the logits and labels of its images: accuracy, calibration, gates."""

import torch
import torch.nn.functional as F

BINS = 15  # of confidence
QUANTILES = (0, 0.25, 0.5, 0.75, 1)
WRONG = 36  # misclassified images kept


def prediction_figures(logits, labels, classes):
    """Figures of logits (N, 10) against labels (N,), as train.py's history keeps them.

    Accuracies, confidences and the calibration error are percentages; the confusion matrix counts,
    its rows are the true classes.
    """
    pairs = labels * len(classes) + logits.argmax(1)
    confusion = pairs.bincount(minlength=len(classes) ** 2).view(len(classes), len(classes))
    correct = confusion.diagonal()
    per_class = 100 * correct / confusion.sum(1).clamp(min=1)
    percentages = 100 * logits.softmax(1)
    return {
        "accuracy": 100 * correct.sum().item() / len(labels),
        "loss": F.cross_entropy(logits, labels).item(),
        "images": len(labels),
        "per_class": dict(zip(classes, per_class.tolist())),
        "confusion": confusion.tolist(),
        "calibration": calibration(percentages, labels),
        "wrong": most_wrong(percentages, labels, classes),
    }


def calibration(percentages, labels):
    """The expected calibration error ("ece") of probabilities (N, 10), and the bins it is from.

    Each bin has the mean confidence and the accuracy of its images, None if it has no image: all
    in per cent. A confidence between two bins belongs to the lower one.
    """
    confidence, predicted = percentages.max(1)
    correct = 100.0 * (predicted == labels)
    places = (confidence * BINS / 100).ceil().clamp(1, BINS) - 1
    bins, error = [], 0
    for place in range(BINS):
        inside = places == place
        figures = {"confidence": None, "accuracy": None, "count": inside.sum().item()}
        if figures["count"]:
            figures["confidence"] = confidence[inside].mean().item()
            figures["accuracy"] = correct[inside].mean().item()
            error += figures["count"] * abs(figures["confidence"] - figures["accuracy"])
        bins.append(figures)
    return {"bins": bins, "ece": error / len(labels)}


def most_wrong(percentages, labels, classes):
    """The misclassified images of probabilities (N, 10), in per cent, the most confident first."""
    confidence, predicted = percentages.max(1)
    wrong = (predicted != labels).nonzero().flatten()
    order = confidence[wrong].argsort(descending=True, stable=True)
    return [
        {
            "index": index,
            "true": classes[labels[index]],
            "predicted": classes[predicted[index]],
            "confidence": confidence[index].item(),
        }
        for index in wrong[order[:WRONG]].tolist()
    ]


def gate_figures(coefficients, labels, classes):
    """Figures of a block's coefficients (N, k): means of each class (10, k), quantiles (k, 5)."""
    members = F.one_hot(labels, len(classes)).T.float()
    means = members @ coefficients / members.sum(1, keepdim=True).clamp(min=1)
    levels = torch.tensor(QUANTILES, device=coefficients.device)
    return {
        "mean_per_class": means.tolist(),
        "quantiles": coefficients.quantile(levels, dim=0).T.tolist(),
    }
