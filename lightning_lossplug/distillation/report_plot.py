"""The picture of a distillation run: curves, reliability of both sides, where the student loses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lossplug.distillation.report_text import Details
from lightning_lossplug.errors import LossplugError, require

BLUE, RED, GREY = "#1f6fb4", "#d1602b", "#3a3a3a"
MOST_BARS = 20


def draw_report(rows: Sequence[dict[str, Any]], details: Details, path: Path, title: str) -> None:
    """Writes the records of one teacher as a PNG.

    Args:
        rows: Its records, as ``read_report`` gives them.
        details: Of the last of them.
        path: The file.
        title: Line above the panels.

    Raises:
        LossplugError: matplotlib is not installed, or there is no record.
    """
    require("matplotlib", "cli", "a picture of a distillation")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows:
        raise LossplugError("there is no record to draw", where=str(path))
    figure = Figure(figsize=(15, 8), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.006, ha="left", fontsize=13, fontweight="bold")
    panels = figure.subplots(2, 3).flatten()
    names = {"student_accuracy": BLUE, "teacher_accuracy": RED, "agreement": GREY}
    _curves(panels[0], rows, names, "accuracy and agreement")
    _curves(panels[1], rows, {"gap": GREY, "lost": RED, "won": BLUE}, "gap: right by the teacher alone, student alone")
    divergences = {"kl": RED, "reverse_kl": BLUE, "student_ece": GREY}
    _curves(panels[2], rows, divergences, "divergence in nats, the student's calibration error")
    if details.labelled:
        _reliability(panels[3], details)
        _confidence(panels[4], details)
        _classes(panels[5], details)
    else:
        for axes in panels[3:]:
            axes.set_visible(False)
    figure.savefig(path)


def _dress(axes: Any, title: str, xlabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _curves(axes: Any, rows: Sequence[dict[str, Any]], colors: dict[str, str], title: str) -> None:
    steps = [row["step"] for row in rows]
    for name, color in colors.items():
        values = [math.nan if row[name] is None else row[name] for row in rows]
        if not all(map(math.isnan, values)):
            axes.plot(steps, values, color=color, linewidth=1.8, marker=".", label=name.replace("_", " "))
    _dress(axes, title, "optimizer steps")
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)


def _reliability(axes: Any, details: Details) -> None:
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
    for side, color in (("student", BLUE), ("teacher", RED)):
        curve = getattr(details, side)
        shown = [(c, a) for n, c, a in zip(curve["count"], curve["confidence"], curve["accuracy"], strict=True) if n]
        total = sum(curve["count"])
        error = sum(n * abs(c - a) for n, c, a in zip(*curve.values(), strict=True) if n) / total
        label = f"{side}, calibration error {100 * error:.1f} %"
        axes.plot(*zip(*shown, strict=True), color=color, linewidth=1.8, marker="o", markersize=4, label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_ylabel("accuracy")
    _dress(axes, "reliability", "confidence")
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def _confidence(axes: Any, details: Details) -> None:
    table = details.confidence
    bins = len(table["count"])
    filled = [b for b in range(bins) if table["count"][b]]
    for side, color, shift in (("student", BLUE, 0.3), ("teacher", RED, 0.7)):
        places = [(b + shift) / bins for b in filled]
        axes.bar(places, [table[side][b] for b in filled], width=0.36 / bins, color=color, label=side)
    for b in filled:
        height = max(table["student"][b], table["teacher"][b])
        axes.text((b + 0.5) / bins, height, f"{table['count'][b]:.0f}", ha="center", va="bottom", fontsize=6)
    axes.set_ylim(0, 1.05)
    _dress(axes, "accuracy by the teacher's confidence (number: samples)", "the teacher's confidence")
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9, loc="lower right")


def _classes(axes: Any, details: Details) -> None:
    worst = details.worst(MOST_BARS)
    if details.classes is None or not worst:
        axes.set_visible(False)
        return
    gaps = [details.classes["teacher"][c] - details.classes["student"][c] for c in worst]
    axes.bar(range(len(worst)), gaps, color=GREY)
    axes.set_xticks(range(len(worst)), [str(c) for c in worst], fontsize=7)
    _dress(axes, "accuracy behind the teacher (most samples lost first)", "class")
