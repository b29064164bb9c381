"""Health of N:M training, layer by layer: do masks settle, is what they keep what matters, what do pruned weights do.

Nothing here runs unless it is called; :class:`lightning_lossplug.callbacks.SparsityHealth` calls it when logs are due.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.sparsity.technique import NMTechnique
from lightning_lossplug.surgery.shards import full

SIGNALS = ("sparsity", "kept_mass", "flip_rate", "pruned_grad_energy", "pruned_grad_noise")


@dataclass(frozen=True)
class LayerHealth:
    r"""The signals of one weight W with mask :math:`\Phi` and gradient g; None where there is nothing to measure.

    Args:
        layer: Path of the layer.
        pattern: ``N:M`` of the mask now, or ``dense`` before the first one.
        sparsity: Share of zeros in what the forward pass uses; 0 while pruned weights are only attenuated.
        kept_mass: :math:`\sum \Phi|W| / \sum |W|` of the latent weight: N/M for equal entries, 1 once pruned weights
            are 0. It falls when pruned weights grow back.
        flip_rate: Share of mask entries that the last mask update changed (arXiv 2404.01847). Healthy runs rise first,
            then fall towards 0.
        pruned_grad_energy: :math:`\sum (1-\Phi) g^2 / \sum g^2`. Near 1 - N/M the pruned weights pull as hard as the
            kept ones.
        pruned_grad_noise: :math:`1 - \sum \hat m^2 / \sum \hat v` over pruned entries, from Adam's bias-corrected
            moments: 0 for a steady gradient, close to 1 (0.95 at beta1 = 0.9, long run) for pure noise. None for
            optimizers without both moments.
    """

    layer: str
    pattern: str
    sparsity: float
    kept_mass: float | None
    flip_rate: float | None
    pruned_grad_energy: float | None
    pruned_grad_noise: float | None

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields in plain types."""
        return asdict(self)


COLUMNS = tuple(f.name for f in fields(LayerHealth))


@torch.no_grad()
def nm_health(technique: NMTechnique, optimizer: Optimizer | None = None) -> list[LayerHealth]:
    """Measures every layer of a technique; with gradients in place (just before a step) also what they say.

    One pass over each weight and its gradient and one wait for the device in all. Sharded weights (FSDP2) are gathered:
    every rank has to call it.

    Args:
        technique: Attached to a model.
        optimizer: For its moments; layers it doesn't hold are left out. None: all layers, no noise.
    """
    ours = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    names, patterns, flips, measured = [], [], [], []
    for name, layer in technique.layers.items():
        if ours is not None and id(layer.weight) not in ours:
            continue
        names.append(name)
        patterns.append(layer.pattern)
        flips.append(layer.flip_rate)
        mask, weight = layer.transform.mask, full(layer.weight).abs()
        pruned, grad = ~mask, layer.weight.grad
        nothing = torch.full((), math.nan, device=mask.device)
        row = (
            pruned.mean(dtype=torch.float32) if layer.transform.mode == "hard" else torch.zeros_like(nothing),
            _share(weight, mask),
            nothing if grad is None else _share(full(grad).float().square(), pruned),
            nothing if optimizer is None else _noise(optimizer, layer.weight, pruned),
        )
        measured.append(torch.stack(row))
    values = torch.stack([row.to(measured[0].device) for row in measured]).tolist() if measured else []
    return [
        LayerHealth(
            layer=name,
            pattern=f"{pattern[0]}:{pattern[1]}" if pattern else "dense",
            sparsity=row[0],
            kept_mass=_known(row[1]),
            flip_rate=flip,
            pruned_grad_energy=_known(row[2]),
            pruned_grad_noise=_known(row[3]),
        )
        for name, pattern, flip, row in zip(names, patterns, flips, values, strict=True)
    ]


def _share(values: Tensor, part: Tensor) -> Tensor:
    total = values.sum(dtype=torch.float32)
    return torch.where(part, values, 0).sum(dtype=torch.float32) / total  # 0 / 0 is NaN: nothing to tell


def _noise(optimizer: Optimizer, weight: Tensor, pruned: Tensor) -> Tensor:
    state = optimizer.state.get(weight, {})
    first, second, step = (state.get(key) for key in ("exp_avg", "exp_avg_sq", "step"))
    group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
    if first is None or second is None or step is None or "betas" not in group:
        return torch.full((), math.nan, device=pruned.device)
    beta1, beta2 = (float(beta) for beta in group["betas"])
    count = float(step)
    steady = torch.where(pruned, full(first).float().square(), 0).sum() / (1 - beta1**count) ** 2
    energy = torch.where(pruned, full(second).float(), 0).sum() / (1 - beta2**count)
    return (1 - steady / energy).clamp(max=1.0)  # NaN where no entry is pruned or had a gradient


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def mean_health(rows: Sequence[LayerHealth]) -> dict[str, float]:
    """Returns the mean over layers of every signal that some layer has."""
    found = {}
    for name in SIGNALS:
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        if values:
            found[name] = sum(values) / len(values)
    return found


@dataclass
class Settling:
    """Tells masks that will not settle from masks that take their time.

    Over the last ``window`` flip rates of one pattern, the masks don't settle if the mean of the later half is not
    below the mean of the earlier half, and above ``tolerance``. A change of pattern starts a new window.

    Args:
        window: Flip rates that are looked at, an even number >= 4.
        tolerance: Mean flip rate that counts as settled.
        pattern: Of the values in ``history``.
        history: The last flip rates.
    """

    window: int = 10
    tolerance: float = 1e-3
    pattern: str = ""
    history: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.window < 4 or self.window % 2:
            raise LossplugError(f"window is {self.window}", where="Settling", remedy="Choose an even number, 4 or more")
        if not 0 <= self.tolerance < 1:
            raise LossplugError(f"tolerance is {self.tolerance}, allowed is [0, 1)", where="Settling")

    def update(self, flip_rate: float, pattern: str) -> tuple[float, float] | None:
        """Adds a value; returns the means of the two halves if the masks don't settle, else None."""
        if pattern != self.pattern:
            self.pattern, self.history = pattern, []
        self.history = [*self.history, flip_rate][-self.window :]
        if len(self.history) < self.window:
            return None
        half = self.window // 2
        earlier, later = sum(self.history[:half]) / half, sum(self.history[half:]) / half
        return (earlier, later) if later >= earlier and later > self.tolerance else None
