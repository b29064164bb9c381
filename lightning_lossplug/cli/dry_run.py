"""A few steps of a fit, measured and then ended: what ``lossplug check`` adds to a Trainer besides the recipe."""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_lossplug.callbacks.technique import TechniqueCallback
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.transform import QuantTransform
from lightning_lossplug.sparsity.technique import NMTechnique
from lightning_lossplug.surgery.plug import plugged_layers

WARMUP = 3  # steps that are not counted: allocation, scales set from data


class DryRun(Callback):
    """Times steps, writes what it saw, and ends the process in the middle of the fit.

    Args:
        report: The JSON file to write.
        steps: Batches to measure, after three that are not.
        recipe: The recipe's callbacks, for the report.
    """

    def __init__(self, report: Path, steps: int, recipe: list[Callback]) -> None:
        self.report, self.steps, self.recipe = report, steps, recipe
        self.times: list[float] = []
        self.last: float | None = None
        self.batch = ""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Looks at the batch, once."""
        if not self.batch:
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
            self.batch = ", ".join("x".join(map(str, leaf.shape)) or "number" for leaf in tensors[:3])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the time from the end of one step to the end of the next."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.last is not None:
            self.times.append(now - self.last)
        self.last = now
        if len(self.times) >= WARMUP + self.steps - 1:
            self.finish(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A fit shorter than the check."""
        self.finish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keeps what stopped the fit, before the script's own handling of it."""
        if not isinstance(exception, SystemExit):
            kind = "" if isinstance(exception, LossplugError) else f"{type(exception).__name__}: "
            self.write({"stopped": kind + " ".join(str(exception).split())})

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the report and ends the process: nothing of the script after its fit should run.

        Raises:
            SystemExit: Always.
        """
        counted = self.times[WARMUP:] or self.times
        size, dense = expected_bytes(pl_module, self.recipe)
        self.write(
            {
                "module": type(pl_module).__name__,
                "parameters": sum(p.numel() for p in pl_module.parameters()),
                "batch": self.batch,
                "steps": len(counted),
                "seconds": statistics.median(counted) if counted else None,
                "peak_bytes": peak_bytes(),
                "bytes": size,
                "dense_bytes": dense,
                "callbacks": [describe(callback) for callback in self.recipe],
            }
        )
        raise SystemExit(0)

    def write(self, what: dict[str, Any]) -> None:
        """Writes the report; of several processes the first one's counts."""
        if int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) == 0:
            self.report.write_text(json.dumps(what), encoding="utf-8")


def describe(callback: Callback) -> dict[str, Any]:
    """Returns what a callback says of itself: settings, and the layers it took and left out."""
    found: dict[str, Any] = {"name": type(callback).__name__}
    if isinstance(callback, TechniqueCallback):
        found["settings"] = callback.describe()
        if callback.selection is not None:
            found["table"] = callback.selection.table(compact=True)
            found["taken"] = len(callback.selection.taken)
            found["left"] = len(callback.selection.choices) - found["taken"]
    return found


def expected_bytes(model: torch.nn.Module, callbacks: list[Callback]) -> tuple[int, int]:
    """Returns the nominal size of the weights after the run, and of the plain ones, in bytes.

    A weight of N:M keeps ``n / m`` of its values and ``ceil(log2 m)`` bits for each one's place (or a bit per entry, if
    that is less); a quantised weight has the bits of its codes. Scales are not counted.
    """
    keep: dict[int, tuple[int, int]] = {}
    for callback in callbacks:
        technique = getattr(callback, "technique", None)
        if isinstance(technique, NMTechnique):
            for layer in technique.layers.values():
                if not layer.recipe.ends_dense:
                    keep[id(layer.weight)] = layer.recipe.n, layer.recipe.m
    bits: dict[int, float] = {}
    for _, layer in plugged_layers(model):
        for name, parameter in layer.named_parameters(recurse=False):
            stack = layer._modules.get(f"{name}_transforms")
            for transform in stack.children() if stack is not None else ():
                if isinstance(transform, QuantTransform):
                    bits[id(parameter)] = float(transform.quantizer.bits)  # type: ignore[arg-type]
    total = dense = 0.0
    for parameter in model.parameters():
        count, full = parameter.numel(), 8.0 * parameter.element_size()
        dense += count * full
        width = min(full, bits.get(id(parameter), full))
        n, m = keep.get(id(parameter), (1, 1))
        total += count * min(width, width * n / m + (min(1.0, n / m * (m - 1).bit_length()) if m > 1 else 0.0))
    return round(total / 8), round(dense / 8)


def peak_bytes() -> int:
    """Returns the most memory this process has held: of the GPU where there is one, resident otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
