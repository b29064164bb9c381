"""The picture of gradient disorder: a heat map of every scale over the windows of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lightning_lossplug.errors import LossplugError, require

MOST_NAMES = 40


def draw_disorder(history: Sequence[tuple[int, Sequence[float]]], names: Sequence[str], path: Path) -> None:
    """Writes the disorder of every scale as a PNG, with the mean below.

    Args:
        history: Optimizer step and disorder per scale, window by window (``GradientGate.history``).
        names: Names of the scales.
        path: The file; missing folders are made.

    Raises:
        LossplugError: matplotlib is not installed, or there is no window.
    """
    require("matplotlib", "cli", "a plot of the gradient disorder")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not history:
        raise LossplugError("there is no full window to draw", where=str(path))
    steps = [step for step, _ in history]
    every = max(1, math.ceil(len(names) / MOST_NAMES))
    figure = Figure(figsize=(11, 3.5 + 0.16 * min(len(names), MOST_NAMES)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    heat, mean = figure.subplots(2, 1, height_ratios=(1 + min(len(names), MOST_NAMES) / 8, 1), sharex=True)
    rows = list(zip(*(values for _, values in history), strict=True))
    image = heat.imshow(rows, aspect="auto", interpolation="nearest", cmap="magma", vmin=0, vmax=0.6)
    figure.colorbar(image, ax=heat, fraction=0.04)
    shown = range(0, len(names), every)
    heat.set_yticks(shown, [names[i] for i in shown], fontsize=7)
    heat.set_title(
        "gradient disorder: how often the task gradient of a scale changes its sign", loc="left", fontsize=11
    )
    mean.plot(range(len(steps)), [sum(values) / len(values) for _, values in history], color="#d1602b", linewidth=1.8)
    mean.axhline(0.5, color="0.6", linewidth=1, linestyle="--")  # what noise gives
    mean.set_ylim(0, 0.7)
    mean.set_title("mean over scales (dashed: noise)", loc="left", fontsize=11)
    ticks = range(0, len(steps), max(1, len(steps) // 8))
    mean.set_xticks(ticks, [str(steps[i]) for i in ticks])
    mean.set_xlabel("optimizer steps")
    mean.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
