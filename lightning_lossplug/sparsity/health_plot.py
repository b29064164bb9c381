"""The picture of a run's mask health: heat maps per layer, curves of the means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lossplug.errors import LossplugError, require

LABELS = {
    "flip_rate": "mask entries changed per update",
    "kept_mass": "share of |W| that is kept",
    "sparsity": "zeros",
    "pruned_grad_energy": "gradient energy on pruned weights",
    "pruned_grad_noise": "noise of that gradient",
}
COLORS = ("#d1602b", "#1f6fb4", "#3a3a3a", "#2d8a4e", "#8a5fb0")
MOST_NAMES = 24


def draw_health(rows: Sequence[dict[str, Any]], path: Path, title: str = "N:M mask health") -> None:
    """Writes the records of a run as a PNG.

    Args:
        rows: Records with ``step``, ``layer`` and the signals of :class:`LayerHealth` (None where not measured).
        path: The file.
        title: Line above the panels.

    Raises:
        LossplugError: matplotlib is not installed, or there is no record.
    """
    require("matplotlib", "cli", "a plot of the mask health")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows:
        raise LossplugError("there is no record to draw", where=str(path))
    steps = sorted({row["step"] for row in rows})
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure = Figure(figsize=(14, 4 + 0.16 * min(len(layers), MOST_NAMES)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.006, ha="left", fontsize=13, fontweight="bold")
    panels = figure.subplots(2, 2, width_ratios=(1.3, 1))
    for axes, name in zip(panels[:, 0], ("flip_rate", "kept_mass"), strict=True):
        _heat(figure, axes, rows, steps, layers, name)
    for axes, names in (
        (panels[0, 1], ("flip_rate",)),
        (panels[1, 1], ("sparsity", "kept_mass", "pruned_grad_energy", "pruned_grad_noise")),
    ):
        _curves(axes, rows, steps, names)
    figure.savefig(path)


def _heat(
    figure: Any, axes: Any, rows: Sequence[dict[str, Any]], steps: list[int], layers: list[str], name: str
) -> None:
    grid = [[math.nan] * len(steps) for _ in layers]
    column, line = {s: i for i, s in enumerate(steps)}, {layer: i for i, layer in enumerate(layers)}
    for row in rows:
        if row[name] is not None:
            grid[line[row["layer"]]][column[row["step"]]] = row[name]
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="magma", vmin=0)
    figure.colorbar(image, ax=axes, fraction=0.04)
    axes.set_title(LABELS[name], loc="left", fontsize=11)
    every = max(1, math.ceil(len(layers) / MOST_NAMES))
    axes.set_yticks(range(0, len(layers), every), [layers[i] for i in range(0, len(layers), every)], fontsize=7)
    ticks = range(0, len(steps), max(1, len(steps) // 8))
    axes.set_xticks(ticks, [str(steps[i]) for i in ticks])
    axes.set_xlabel("optimizer steps")


def _curves(axes: Any, rows: Sequence[dict[str, Any]], steps: list[int], names: Sequence[str]) -> None:
    colors = dict(zip(LABELS, COLORS, strict=True))
    for name in names:
        found = []
        for step in steps:
            values = [row[name] for row in rows if row["step"] == step and row[name] is not None]
            found.append(sum(values) / len(values) if values else math.nan)
        axes.plot(steps, found, color=colors[name], linewidth=1.8, label=LABELS[name])
    axes.set_title("mean over layers", loc="left", fontsize=11)
    axes.set_xlabel("optimizer steps")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
