"""Scores of predicted probabilities, and the temperature every calibrator is measured against."""

import torch
import torch.nn.functional as F
from runner import spread
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

COLUMNS = (
    ("accuracy", "accuracy in %: median [min, max]", 100),
    ("ece", "calibration error in %", 100),
    ("nll", "NLL", 1),
)
HEADER = ["method", *(title for _, title, _ in COLUMNS)]


def scores(z, y):
    """Accuracy, calibration error (of two classes: of the second's probability) and negative log-likelihood."""
    p = z.softmax(1)
    if z.shape[1] == 2:
        error = binary_calibration_error(p[:, 1], y, n_bins=15)
    else:
        error = multiclass_calibration_error(p, y, num_classes=z.shape[1], n_bins=15)
    accuracy = (z.argmax(1) == y).float().mean()
    return {"accuracy": float(accuracy), "ece": float(error), "nll": float(F.cross_entropy(z, y))}


def temperature(z, y):
    """The one temperature with the least negative log-likelihood, by bisection of its derivative."""
    low, high = -3.0, 3.0  # logarithm of the inverse temperature, in which the loss has one minimum
    for _ in range(40):
        middle = torch.tensor((low + high) / 2, device=z.device, requires_grad=True)
        slope = torch.autograd.grad(F.cross_entropy(z * middle.exp(), y), middle)[0]
        low, high = (low, middle.item()) if slope > 0 else (middle.item(), high)
    return float(torch.tensor(-low).exp())


def score_rows(results, prefix=""):
    """One table row per method of the runs' results, over their seeds."""
    return [[prefix + name, *(spread([r[name][m] for r in results], s) for m, _, s in COLUMNS)] for name in results[0]]
