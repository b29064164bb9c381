"""Linear cross-entropy by the GPU kernels of other libraries: Liger and Cut Cross-Entropy, where they are installed.

They are asked for by name, or taken by ``backend="auto"`` on a GPU when a trial on the call's own tensors finds them
faster. Only what keeps float32-quality weight gradients takes part in the trial: Liger with its float32 accumulator,
Cut Cross-Entropy without gradient filtering in versions that can accumulate in float32.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.cross_entropy import CrossEntropy
from lightning_lossplug.losses.fused.objective import Objective
from lightning_lossplug.losses.fused.precision import LOW, product_dtype
from lightning_lossplug.losses.fused.rows import rows_total
from lightning_lossplug.losses.stats import LogitStats

PACKAGES = {"liger": "liger-kernel", "cce": "cut-cross-entropy"}  # engine -> distribution; the module has underscores
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ask:
    """A scalar loss of a linear head.

    Args:
        hidden: Kept rows, [R, D].
        weight: Classifier, [V, D].
        bias: [V] or None.
        objective: Loss, labels and weights.
        factor: What the summed rows are multiplied by.
        softcap: Or None.
        tile: Rows of a chunk of the own path.
        filter_eps: Gradients below it may be dropped: None, ``auto`` or a number.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    objective: Objective
    factor: Tensor
    softcap: float | None = None
    tile: int | None = None
    filter_eps: float | str | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """What may want a gradient."""
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]


@cache
def installed(engine: str) -> bool:
    """Whether the package of an engine is there."""
    return find_spec(PACKAGES[engine].replace("-", "_")) is not None


def on_gpu(hidden: Tensor) -> bool:
    """Whether the engines' kernels can run."""
    return hidden.is_cuda


def obstacle(engine: str, ask: Ask) -> str | None:
    """Returns why an engine can't serve, as the rest of a sentence; None: it can."""
    loss, objective = ask.objective.loss, ask.objective
    if not installed(engine):
        return f"needs the package {PACKAGES[engine]!r}, which is not installed"
    if not on_gpu(ask.hidden):
        return f"runs on CUDA only, the hidden states are on {ask.hidden.device.type}"
    if type(loss) is not CrossEntropy:
        return f"computes cross-entropy only, not {type(loss).__name__}"
    dtype = product_dtype(ask.hidden, ask.weight)
    if dtype == torch.float64:
        return "has no float64"
    if engine == "cce":
        if dtype not in LOW:
            return f"works in half precision only, not in {dtype}"
        if loss.label_smoothing:
            return "has no label smoothing"
        if ask.bias is not None and "bias" not in _cce_parameters():
            return "takes no bias in the installed version"
        return None
    if objective.row_weight is not None:
        return "takes no sample weights"
    if loss.label_smoothing and objective.class_weight is not None:
        return "takes label smoothing or class weights, not both"
    return None if ask.filter_eps is None else "has no gradient filtering"


def total(engine: str, ask: Ask) -> Tensor:
    """Returns ``factor`` times the summed loss of the rows, by an engine or the own row chunks (``rows``)."""
    if engine == "rows":
        own = {"bias": ask.bias, "softcap": ask.softcap, "chunk": ask.tile}
        return rows_total(ask.hidden, ask.weight, ask.objective, ask.factor, **own)  # type: ignore[arg-type]
    dtype = product_dtype(ask.hidden, ask.weight)
    with torch.autocast(ask.hidden.device.type, enabled=False):
        bias = None if ask.bias is None else ask.bias.to(dtype)
        narrow = replace(ask, hidden=ask.hidden.to(dtype), weight=ask.weight.to(dtype), bias=bias)
        return (_liger if engine == "liger" else _cce)(narrow)


def _liger(ask: Ask) -> Tensor:
    y, weight = ask.objective.y, ask.objective.class_weight
    kernel = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(
        ce_weight=weight,
        label_smoothing=ask.objective.loss.label_smoothing,  # type: ignore[arg-type]
        softcap=ask.softcap,
        accum_dtype=torch.float32,
    )
    # Its mean, not its sum, so that half-precision gradients are scaled before they are rounded.
    divisor = y.numel() if weight is None else weight[y].sum()
    return kernel(ask.weight, ask.hidden, y, ask.bias) * (divisor * ask.factor)


def _cce(ask: Ask) -> Tensor:
    wide = {k: True for k in ("accum_e_fp32", "accum_c_fp32") if k in _cce_parameters()}
    more: dict[str, Any] = wide if ask.bias is None else {**wide, "bias": ask.bias}
    nll = (
        import_module("cut_cross_entropy")
        .linear_cross_entropy(
            ask.hidden,
            ask.weight,
            ask.objective.y,
            softcap=ask.softcap,
            reduction="none",
            filter_eps=ask.filter_eps or None,
            **more,
        )
        .float()
    )
    rows = ask.objective.rows(LogitStats(nll, torch.zeros_like(nll), ask.weight.shape[0]))
    return rows.sum() * ask.factor


def _cce_parameters() -> Mapping[str, Any]:
    return inspect.signature(import_module("cut_cross_entropy").linear_cross_entropy).parameters


def require_engine(engine: str, ask: Ask) -> None:
    """Raises :class:`LossplugError` that says why an engine asked for can't serve."""
    reason = obstacle(engine, ask)
    if reason is not None:
        what, remedy = f"the backend {engine!r} {reason}", "Use backend='auto'"
        if ask.filter_eps is not None:
            what, remedy = f"filter_eps={ask.filter_eps!r} is for {what}", "Leave it None for exact gradients"
        raise LossplugError(what, where="fused_linear", remedy=remedy)


_chosen: dict[tuple[Any, ...], str] = {}


def choose(ask: Ask) -> str:
    """Returns the fastest of the own row chunks and the engines that serve as exactly, by one trial per size.

    On a CPU, and under ``torch.use_deterministic_algorithms``, that is ``rows`` without a trial: a choice by time may
    differ between two runs, and with it the last bits.
    """
    if not on_gpu(ask.hidden) or torch.are_deterministic_algorithms_enabled():
        return "rows"
    exact = product_dtype(ask.hidden, ask.weight) == ask.weight.dtype  # else the weight's gradient would be rounded
    names = [e for e in PACKAGES if exact and obstacle(e, ask) is None]
    if "cce" in names and "accum_c_fp32" not in _cce_parameters():
        names.remove("cce")
    if not names:
        return "rows"
    rows, (classes, width) = ask.hidden.shape[0], ask.weight.shape
    wanted = tuple(t.requires_grad for t in ask.leaves)
    key = (*names, str(ask.hidden.device), ask.weight.dtype, rows.bit_length(), width, classes, wanted)
    if key not in _chosen:
        _chosen[key] = fastest({name: lambda name=name: trial(name, ask) for name in ("rows", *names)})  # type: ignore[misc]
    return _chosen[key]


def trial(engine: str, ask: Ask) -> None:
    """Forward and backward of a copy of the call, to its end."""
    hidden, weight = (t.detach().requires_grad_(t.requires_grad) for t in (ask.hidden, ask.weight))
    bias = None if ask.bias is None else ask.bias.detach().requires_grad_(ask.bias.requires_grad)
    copy = replace(ask, hidden=hidden, weight=weight, bias=bias)
    with torch.enable_grad():
        torch.autograd.grad(total(engine, copy), [t for t in copy.leaves if t.requires_grad])
    if ask.hidden.is_cuda:
        torch.cuda.synchronize(ask.hidden.device)


def fastest(runs: Mapping[str, Callable[[], None]], repeats: int = 3) -> str:
    """Returns the name of the run with the least time, after one to warm up; the first one has to work."""
    first, times = next(iter(runs)), {}
    for name, run in runs.items():
        try:
            run()
            spans = []
            for _ in range(repeats):
                start = time.perf_counter()
                run()
                spans.append(time.perf_counter() - start)
            times[name] = min(spans)
        except Exception as error:
            if name == first:
                raise
            logger.warning("fused_linear: %s is left out: %s: %s", describe(name), type(error).__name__, error)
    best = min(times, key=times.__getitem__)
    shown = ", ".join(f"{describe(name)} {1e3 * span:.2f} ms" for name, span in times.items())
    logger.info("fused_linear: %s; %s is taken", shown, describe(best))
    return best


OWN = {"rows": "own chunks of rows", "tiles": "own vocabulary tiles"}


def describe(engine: str) -> str:
    """Returns a name with what it stands for: an own path, or the version of a package."""
    if engine in PACKAGES and installed(engine):
        return f"{engine} ({PACKAGES[engine]} {version(PACKAGES[engine])})"
    return f"{engine} ({OWN[engine]})" if engine in OWN else engine
