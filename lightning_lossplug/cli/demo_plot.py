"""The picture of ``lossplug demo``: accuracy, schedules, and where the zeros are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lightning_lossplug.cli.demo_runs import Outcome

COLORS = ("#3a3a3a", "#1f6fb4", "#d1602b", "#2d8a4e")


def draw(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """Writes the comparison as a PNG.

    Args:
        outcomes: The runs, dense first.
        path: The file.
        title: Line above the panels.
    """
    figure = Figure(figsize=(15, 5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, width_ratios=(1.1, 1.1, 1))
    figure.suptitle(title, x=0.006, ha="left", fontsize=13, fontweight="bold")
    for axes, fill in zip(panels, (_accuracy, _schedules, _layers), strict=True):
        fill(axes, outcomes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.savefig(path)


def _accuracy(axes: Any, outcomes: Sequence[Outcome]) -> None:
    quartiles = []
    for color, outcome in zip(COLORS, outcomes, strict=False):
        steps, values = zip(*outcome.curves["accuracy"], strict=True)
        quartiles.append(sorted(values)[len(values) // 4])
        label = f"{outcome.variant.name}: {outcome.metrics['accuracy']:.1%} on the test split"
        axes.plot(steps, values, color=color, linewidth=1.8, label=label)
    axes.set_title("accuracy on the validation split", loc="left", fontsize=11)
    axes.set_xlabel("optimizer steps")
    axes.set_xlim(left=0)
    axes.set_ylim(max(0.0, min(quartiles) - 0.35), 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False, loc="lower right")


def _schedules(axes: Any, outcomes: Sequence[Outcome]) -> None:
    for color, outcome in zip(COLORS, outcomes, strict=False):
        for key, style in (("sparsity", "-"), ("decay", "--")):
            if outcome.curves[key]:
                steps, values = zip(*outcome.curves[key], strict=True)
                axes.plot(steps, values, color=color, linestyle=style, linewidth=1.8)
    axes.plot([], [], color="0.4", linestyle="-", label="share of weights masked hard")
    axes.plot([], [], color="0.4", linestyle="--", label="factor of the pruned weights")
    axes.set_title("schedule of the masked layers", loc="left", fontsize=11)
    axes.set_xlabel("optimizer steps")
    axes.set_xlim(left=0)
    axes.set_ylim(-0.02, 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.2, 0.86))


def _layers(axes: Any, outcomes: Sequence[Outcome]) -> None:
    names = list(outcomes[0].layers)
    sparse = [(color, o) for color, o in zip(COLORS, outcomes, strict=False) if any(o.layers.values())]
    height = 0.8 / max(len(sparse), 1)
    for index, (color, outcome) in enumerate(sparse):
        places = [row + (index - (len(sparse) - 1) / 2) * height for row in range(len(names))]
        axes.barh(places, [outcome.layers[name] for name in names], height=height, color=color)
    for row, name in enumerate(names):
        if not any(outcome.layers[name] for _, outcome in sparse):
            axes.text(0.01, row, "left dense", va="center", color="0.45", fontsize=9)
    axes.set_title("zeros per layer after folding", loc="left", fontsize=11)
    axes.set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of weights that are exactly 0")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x", color="0.9")
    axes.tick_params(axis="y", length=0)
