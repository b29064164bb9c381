"""Loss and gradient of a registered loss over the margin (or, for regression, over the error), and their plot."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lossplug.cli.output import require_writable
from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.registry import Entry, registry

CLASSES = 10
SPARKS = "▁▂▃▄▅▆▇█"

COSINE = 0.99  # the slope over the cosine ends in a vertical
OTHERS = f"minus the other {CLASSES - 1}, all equal"
# signature: what the horizontal axis is, and what stays fixed
AXES = {
    "logits_index": f"margin: target logit {OTHERS}",
    "logits_soft": f"margin: target logit {OTHERS} (one-hot target)",
    "logits_pair": f"margin: student's logit {OTHERS}, where the teacher's margin is 4",
    "scores_sets": f"margin: score of the positive {OTHERS}",
    "margin_bounds": f"margin: target logit {OTHERS}, in the worst case and under attack",
    "embeddings_labels_head": f"cosine of embedding and class, at right angles to the other {CLASSES - 1}",
    "binary_logits": "logit of a positive target",
    "regression": "error: prediction minus target",
}


@dataclass(frozen=True)
class Curve:
    """A loss over one number.

    Args:
        axis: What the number is.
        x: The numbers.
        loss: Loss at each of them.
        gradient: Its derivative by the number.
    """

    axis: str
    x: Tensor
    loss: Tensor
    gradient: Tensor


def can_draw(entry: Entry) -> bool:
    """Tells whether a loss depends on one number that a plot can have on its axis."""
    return entry.kind == "loss" and entry.signature in AXES and entry.name != "spherical_output_layer"


def curve(entry: Entry, parameters: dict[str, Any], *, points: int = 241, reach: float = 8.0) -> Curve:
    """Evaluates a loss in float64 over ``[-reach, reach]``.

    Raises:
        LossplugError: The loss has no such axis, or lacks a parameter.
    """
    if not can_draw(entry):
        raise LossplugError(
            f"{entry.kind} {entry.name!r} has no margin to draw it over",
            remedy=f"Plots exist for losses called as {', '.join(AXES)}",
        )
    given = dict(parameters)
    names = {parameter.name for parameter in entry.parameters()}
    if "num_classes" in names:
        given.setdefault("num_classes", CLASSES)
    if entry.signature == "embeddings_labels_head":
        given |= {"num_classes": CLASSES, "embedding_size": CLASSES + 1}
        reach = COSINE
    missing = [p.name for p in entry.parameters() if p.required and p.name not in given]
    if missing:
        raise LossplugError(f"loss {entry.name!r} needs {', '.join(missing)}", remedy=f"Add --set {missing[0]}=VALUE")
    if "reduction" in names:
        given["reduction"] = "none"
    x = torch.linspace(-reach, reach, points, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about training, which this is not
        rows = _call(registry.create("loss", entry.name, **given).double().eval(), entry, x)
    if rows.shape[:1] != x.shape:
        raise LossplugError(f"loss {entry.name!r} gives one value for a whole batch, so it has no curve of its own")
    rows = rows.reshape(points, -1).sum(1)
    (gradient,) = torch.autograd.grad(rows.sum(), x)
    return Curve(AXES[str(entry.signature)], x.detach(), rows.detach(), gradient)


def _call(loss: Any, entry: Entry, x: Tensor) -> Tensor:
    classes = entry.facts.get("classes", CLASSES)
    logits = torch.cat([x[:, None], x.new_zeros(len(x), classes - 1)], dim=1)
    first = torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), classes)
    if entry.signature == "logits_index":
        # Rows weighed by their features: all alike here.
        more = {"features": torch.zeros_like(logits)} if "features" in entry.facts.get("needs", ()) else {}
        return loss(logits, first.argmax(1), **more)
    if entry.signature == "embeddings_labels_head":
        with torch.no_grad():
            loss.weight.copy_(torch.eye(classes, classes + 1))
        away = (1 - x.square()).sqrt()[:, None]
        return loss(torch.cat([logits, away], dim=1), first.argmax(1))
    if entry.signature == "logits_soft":
        return loss(logits, first.to(x))
    if entry.signature == "logits_pair":
        return loss(logits, 4 * first.to(x))
    if entry.signature == "scores_sets":
        return loss(logits, first.bool())
    if entry.signature == "margin_bounds":
        margins = x[:, None].expand(-1, classes - 1)
        return loss(margins, margins)
    return loss(x, torch.ones_like(x) if entry.signature == "binary_logits" else torch.zeros_like(x))


def sparkline(values: Tensor, width: int = 48) -> str:
    """Returns a curve as one line of bars, lowest to highest value."""
    picked = values[torch.linspace(0, len(values) - 1, width).round().long()]
    low, high = picked.min(), picked.max()
    scaled = (picked - low) / (high - low).clamp_min(1e-12) * (len(SPARKS) - 1)
    return "".join(SPARKS[int(level)] for level in scaled.round())


def draw(found: Curve, title: str, path: Path) -> None:
    """Writes the curve as a PNG (or what the file's suffix says).

    Raises:
        LossplugError: matplotlib is missing, or the file can't be written.
    """
    require("matplotlib", "cli", "a plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    require_writable(path)
    if path.suffix.lstrip(".") not in FigureCanvasAgg.get_supported_filetypes():
        raise LossplugError(
            f"a plot can't be written as {path.suffix or 'a file without suffix'!r}", where=str(path), remedy="Use .png"
        )
    figure = Figure(figsize=(7.2, 4.2), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    axes.axhline(0, color="0.75", linewidth=0.8)
    axes.axvline(0, color="0.75", linewidth=0.8)
    axes.plot(found.x, found.loss, color="#1f5fa8", linewidth=2, label="loss")
    axes.plot(found.x, found.gradient, color="#c44e1c", linewidth=2, linestyle="--", label="gradient")
    axes.set_xlabel(found.axis)
    axes.set_ylabel("loss (nats) and its derivative" if "logit" in found.axis else "loss and its derivative")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(float(found.x[0]), float(found.x[-1]))
    axes.legend(frameon=False)
    figure.savefig(path)
