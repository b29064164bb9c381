r"""Thresholds that make activations sparse after training: CHESS (one per channel) and CATS (one per layer).

CHESS, of a gated block ``down(act(gate(x)) * up(x))`` with a = act(gate(x)), u = up(x): the importance of an entry is
:math:`|a_j| U_j` with :math:`U_j` the mean :math:`|u_j|` over calibration tokens, tau its ``floor(q N)``-th smallest
value over all tokens and channels, and :math:`t_j = \tau / U_j`; entries with :math:`|a_j| < t_j` become 0. With equal
:math:`U_j` that is CATS, which thresholds :math:`|a|` itself and needs no gate.

Entries are zeroed and then multiplied like any other: this measures quality. Batch-1 decoding can be faster with a
kernel that skips the columns of ``up`` and ``down``, which this project doesn't have; prefill gains nothing.

Source: CHESS, arXiv 2409.01366 (CATS: arXiv 2404.08763).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register
from lightning_lossplug.sparsity.activation import find_activations
from lightning_lossplug.sparsity.kth import KthSmallest

# (activation, up projection) of gated blocks: Llama and its kin in transformers, SwiGLU in timm
GATED = (("act_fn", "up_proj"), ("act", "fc1_x"))
QUERY, OUTPUT = ("q_proj",), ("o_proj",)
Forward = Callable[[nn.Module, Any], Any]


def call_model(model: nn.Module, batch: Any) -> Any:
    """Calls a model with a batch: a dict by name, else its first element (or itself, for a tensor)."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


@dataclass
class _Site:
    activation: nn.Module
    up: nn.Module | None
    sparsity: float
    is_input: bool = False  # thresholded before the module (attention projections) rather than after it


@register(
    "activation",
    "chess",
    family="activation_sparsity",
    paper="CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification",
    arxiv="2409.01366",
)
class ActivationThresholds:
    """Calibrates thresholds on a model as it is, and applies them by hooks that come off without a trace.

    ::

        thresholds = ActivationThresholds(sparsity=0.5)
        thresholds.calibrate(model, batches)
        with thresholds.applied(model) as measured:
            evaluate(model)
        print(measured())  # achieved share of zeros per activation

    Args:
        sparsity: Share q of entries to zero, in [0, 1); 0 changes nothing.
        method: ``chess`` (a threshold per channel, gated blocks only) or ``cats`` (one per layer).
        attention: Also threshold the input of ``q_proj`` (k and v see the dense one) and of ``o_proj``, by magnitude.
        include: Glob patterns of activation paths; None: all that are found.
        per_layer: Glob pattern of activation paths to their own sparsity; the first match counts.

    Raises:
        LossplugError: A value out of range.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        method: Literal["chess", "cats"] = "chess",
        attention: bool = False,
        include: Sequence[str] | None = None,
        per_layer: dict[str, float] | None = None,
    ) -> None:
        for value in (sparsity, *(per_layer or {}).values()):
            if not 0 <= value < 1:
                raise LossplugError(f"sparsity is {value}, allowed is [0, 1)", where="ActivationThresholds")
        if method not in ("chess", "cats"):
            raise LossplugError(
                f"unknown method {method!r}", where="ActivationThresholds", remedy="Use 'chess' or 'cats'"
            )
        self.sparsity, self.method, self.attention = sparsity, method, attention
        self.include, self.per_layer = include, per_layer or {}
        self.thresholds: dict[str, Tensor] = {}

    @torch.no_grad()
    def calibrate(self, model: nn.Module, batches: Sequence[Any], forward: Forward = call_model) -> None:
        """Sets the thresholds from what the dense model does on a few batches, which are run three times.

        Args:
            model: In evaluation mode.
            batches: Unpadded, of equal length (every sample weighs the same); 65536 tokens are plenty.
            forward: Calls the model with a batch.

        Raises:
            LossplugError: No gated block (``chess``), no activation, no batch, or none that ran.
        """
        if model.training:
            raise LossplugError("the model is in training mode", where="ActivationThresholds", remedy="Call eval()")
        sites = self._sites(model)
        means: dict[str, list[Tensor]] = {path: [] for path in sites}
        streams = {path: KthSmallest() for path in sites}

        def keep_mean(path: str, module: nn.Module, args: Any, output: Tensor) -> None:
            means[path].append(output.float().abs().flatten(0, -2).mean(0))

        ups = {path: site for path, site in sites.items() if site.up is not None}
        self._run(model, batches, forward, [s.up.register_forward_hook(partial(keep_mean, p)) for p, s in ups.items()])  # type: ignore[union-attr]
        scales = {path: torch.stack(found).mean(0) for path, found in means.items() if found}
        if len(scales) < len(ups):
            raise LossplugError("the up projections didn't run on the batches", where="ActivationThresholds")
        for turn in ("first", "second"):
            hooks = []
            for path, site in sites.items():
                count = partial(self._count, getattr(streams[path], turn), scales.get(path))
                if site.is_input:
                    hooks.append(site.activation.register_forward_pre_hook(lambda m, args, c=count: c(args[0])))
                else:
                    hooks.append(site.activation.register_forward_hook(lambda m, args, out, c=count: c(out)))
            self._run(model, batches, forward, hooks)
            for path, stream in streams.items():
                if turn == "first":
                    if not int(stream.upper.sum()):
                        raise LossplugError("it didn't run on the batches", where=path, remedy="Give batches")
                    stream.choose(sites[path].sparsity)
        tiny = torch.finfo(torch.float32).tiny
        self.thresholds = {
            path: streams[path].value() / scales[path].clamp(min=tiny)
            if path in scales
            else torch.tensor(streams[path].value())
            for path in sites
        }

    @staticmethod
    def _count(count: Callable[[Tensor], None], scale: Tensor | None, values: Tensor) -> None:
        count(values if scale is None else values.float().abs() * scale)

    @staticmethod
    def _run(model: nn.Module, batches: Iterable[Any], forward: Forward, handles: Iterable[RemovableHandle]) -> None:
        handles = list(handles)
        try:
            if handles:
                for batch in batches:
                    forward(model, batch)
        finally:
            for handle in handles:
                handle.remove()

    def _sites(self, model: nn.Module) -> dict[str, _Site]:
        found: dict[str, _Site] = {}
        if self.method == "chess":
            for path, block in model.named_modules():
                for activation, up in GATED:
                    if isinstance(getattr(block, activation, None), nn.Module) and hasattr(block, up):
                        name = f"{path}.{activation}" if path else activation
                        found[name] = _Site(getattr(block, activation), getattr(block, up), self.sparsity)
            if not found:
                raise LossplugError(
                    "the model has no gated feed-forward block",
                    where="ActivationThresholds",
                    remedy="Use method='cats', which takes any activation",
                )
        else:
            found = {path: _Site(m, None, self.sparsity) for path, m in find_activations(model).items()}
        if self.attention:
            for path, module in model.named_modules():
                if path.rpartition(".")[2] in (*QUERY, *OUTPUT):
                    found[path] = _Site(module, None, self.sparsity, is_input=True)
        if self.include is not None:
            found = {p: s for p, s in found.items() if any(fnmatchcase(p, pattern) for pattern in self.include)}
        for path, site in found.items():
            own = (value for pattern, value in self.per_layer.items() if fnmatchcase(path, pattern))
            site.sparsity = next(own, self.sparsity)
        if not found:
            raise LossplugError(f"no activation matches include={self.include}", where="ActivationThresholds")
        return found

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[Callable[[], dict[str, float]]]:
        """Applies the thresholds inside a ``with`` block; yields a function that tells the achieved share of zeros.

        Raises:
            LossplugError: Not calibrated, or calibrated on another model.
        """
        handles, counts = [], {path: [0, 0] for path in self.thresholds}
        if not self.thresholds:
            raise LossplugError("there are no thresholds yet", where="ActivationThresholds", remedy="Call calibrate")
        sites = self._sites(model)
        if set(sites) != set(self.thresholds):
            other = sorted(set(sites) ^ set(self.thresholds))[0]
            raise LossplugError("the thresholds are those of another model", where=other)

        def cut(path: str, values: Tensor) -> Tensor:
            threshold = self.thresholds[path] = self.thresholds[path].to(values.device)
            values = torch.where(values.abs() < threshold, 0, values)
            counts[path][0] += values.numel() - int(values.count_nonzero())
            counts[path][1] += values.numel()
            return values

        for path, site in sites.items():
            if site.is_input:
                handles.append(
                    site.activation.register_forward_pre_hook(lambda m, args, p=path: (cut(p, args[0]), *args[1:]))
                )
            else:
                handles.append(site.activation.register_forward_hook(lambda m, args, out, p=path: cut(p, out)))
        try:
            yield lambda: {path: hits / total for path, (hits, total) in counts.items() if total}
        finally:
            for handle in handles:
                handle.remove()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the thresholds by path, to be saved as tensors."""
        return {path: threshold.cpu() for path, threshold in self.thresholds.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores :meth:`state_dict`."""
        self.thresholds = dict(state)
