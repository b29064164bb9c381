"""Pictures of a calibration: how fast spectra fall, and where the channels went."""

from __future__ import annotations

from pathlib import Path

from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.kv_cache.plan import KVFactors
from lightning_lossplug.kv_cache.recorder import MomentRecorder


def plot_kv_factors(factors: KVFactors, path: str | Path, recorder: MomentRecorder | None = None) -> Path:
    """Draws ranks and errors of every layer, and the spectra of keys and values if the calibration is given.

    Args:
        factors: The factors.
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        recorder: The calibration they were made from; None to leave the spectra out.

    Returns:
        The file.

    Raises:
        LossplugError: matplotlib is not installed, or the file can't be written.
    """
    require("matplotlib", "cli", "a plot of KV factors")
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if recorder is None else 3
    figure = Figure(figsize=(5 * panels, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels)
    layers = sorted(factors.layers)
    for name, color in (("keys", "tab:blue"), ("values", "tab:orange")):
        made = [getattr(factors.layers[index], name) for index in layers]
        axes[0].plot(layers, [one.rank / one.width for one in made], "o-", color=color, label=name)
        errors = [getattr(factors.layers[index], f"{name[0]}_error") for index in layers]
        axes[1].plot(layers, errors, "o-", color=color, label=name)
        if recorder is None:
            continue
        for index in layers:
            second = getattr(recorder.layers[index], name).second(centred=factors.settings.means).cpu()
            falling = torch.linalg.eigvalsh(second).flip(0).clamp_min(0)
            left = 1 - falling.cumsum(0) / falling.sum().clamp_min(1e-300)
            shares = torch.arange(1, len(left) + 1) / len(left)
            label = name if index == layers[0] else None
            axes[2].plot(shares, left.clamp_min(1e-6), color=color, alpha=0.4, linewidth=0.8, label=label)
    axes[0].set(xlabel="layer", ylabel="channels kept", ylim=(0, None))
    axes[1].set(xlabel="layer", ylabel="relative squared error", ylim=(0, None))
    if recorder is not None:
        axes[2].set(xlabel="channels kept", ylabel="least relative squared error", yscale="log", ylim=(1e-5, 1))
    for axis in axes:
        axis.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # matplotlib says ValueError to an ending it does not know
        raise LossplugError(f"can't be written: {error}", where=str(path)) from None
    return Path(path)
