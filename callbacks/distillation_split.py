"""The distillation's own part of the gradient, beside an ordinary backward pass of the whole loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_lossplug.callbacks.sharded import keeps_all_on_every_rank
from lightning_lossplug.distillation.networks import several_processes
from lightning_lossplug.distillation.two_gradients import DOT, AlignScope, align_gradients
from lightning_lossplug.errors import LossplugError


class SplitGradients:
    """Takes the gradient of the distillation term before the backward pass of the sum, and acts on both parts.

    The task's part is the difference of the two. Parts are summed over an accumulation window and averaged over
    processes; with a GradScaler they are taken under its scale.

    Args:
        where: Who asks, for messages.
        dot_delta: Take the steps of :class:`~lightning_lossplug.distillation.DOT` with this delta.
        align: Project conflicts with the task out of the distillation's part.
    """

    def __init__(self, where: str, dot_delta: float | None, align: AlignScope | None) -> None:
        if dot_delta is not None and align is not None:
            raise LossplugError("dot_delta and align both rule the step", where=where, remedy="Give one of them")
        self.where, self.dot_delta, self.align = where, dot_delta, align
        self.dot: DOT | None = None
        self.parameters: list[nn.Parameter] = []
        self.parts: list[Tensor | None] = []

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the parameters; called when the optimizer exists.

        Raises:
            LossplugError: Sharded parameters, SAM, clipping with DOT, or an optimizer that DOT can't use.
        """
        name = "dot_delta" if self.dot_delta is not None else "align"
        if not keeps_all_on_every_rank(trainer.strategy):
            raise LossplugError(
                f"{name} is not supported with {type(trainer.strategy).__name__}",
                where=self.where,
                remedy="Use one device or DDP",
            )
        names = [type(c).__name__ for c in trainer.callbacks]  # type: ignore[attr-defined]
        for other in {"SAM", "GradientAdaptiveQAT"} & set(names):
            raise LossplugError(f"{name} and {other} both rule the step", where=self.where, remedy="Keep one of them")
        if self.dot_delta is not None:
            if trainer.gradient_clip_val:
                raise LossplugError(
                    "gradient_clip_val would clip the two velocities of dot_delta together",
                    where=self.where,
                    remedy="Leave clipping out",
                )
            self.dot = DOT(trainer.optimizers[0], self.dot_delta)
        self.parameters = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        self.parts = []

    def take(self, term: Tensor, trainer: Trainer) -> None:
        """Adds the gradient of one micro-batch's term; its graph stays for the backward pass.

        Raises:
            LossplugError: The graph can't be differentiated twice.
        """
        fresh = term_gradients(term, self.parameters, trainer, self.where, 1 / trainer.accumulate_grad_batches)
        self.parts = added(self.parts, fresh)

    @torch.no_grad()
    def act(self, trainer: Trainer) -> None:
        """Changes the gradients that the optimizer is about to use (after unscaling, before clipping)."""
        parts, self.parts = self.parts, []
        if not parts:
            return
        for g in summed(parts):
            g.div_(dist.get_world_size() if several_processes() else 1)
        totals = [p.grad for p in self.parameters]
        held = [g for g in (*totals, *parts) if g is not None]
        if scale_of(getattr(trainer.precision_plugin, "scaler", None)) is not None and not all(
            bool(g.isfinite().all()) for g in held
        ):
            return  # the scaler skips this step
        if self.dot is not None:
            self.dot.prepare(parts)
            return
        assert self.align is not None
        task = [t if t is None or g is None else t - g for t, g in zip(totals, parts, strict=True)]
        parts = [None if t is None else g for t, g in zip(totals, parts, strict=True)]
        aligned = align_gradients(parts, task, self.align)
        for total, own, kd in zip(totals, task, aligned, strict=True):
            if total is not None and own is not None and kd is not None:
                total.copy_(own + kd)

    def after_step(self) -> None:
        """Gives the optimizer its settings back."""
        if self.dot is not None:
            self.dot.restore()

    def state_dict(self) -> dict[str, Any]:
        """Velocities, and parts of an unfinished window (of every process)."""
        state: dict[str, Any] = {} if self.dot is None else {"dot": self.dot.state_dict()}
        if self.parts:
            ranks: list[Any] = [self.parts]
            if several_processes():
                ranks = [None] * dist.get_world_size()
                dist.all_gather_object(ranks, [None if g is None else g.cpu() for g in self.parts])
            state["parts"] = ranks
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`, after :meth:`start`."""
        if self.dot is not None and "dot" in state:
            self.dot.load_state_dict(state["dot"])
        if "parts" in state:
            mine = state["parts"][dist.get_rank() if several_processes() else 0]
            self.parts = [None if g is None else g.to(p) for g, p in zip(mine, self.parameters, strict=True)]


class WindowMean:
    """Makes the distillation a mean over all tokens of an accumulation window and all processes, exactly.

    The backward pass gives the mean of the micro-batches' means. Beside it every micro-batch's own gradient is summed
    once weighted by its tokens, and the difference is put right before the step.

    Args:
        where: Who asks, for messages.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.parameters: list[nn.Parameter] = []
        self.extra = 0  # so many of them, the last, are not the module's
        self.plain: list[Tensor | None] = []
        self.weighted: list[Tensor | None] = []
        self.tokens: Tensor | None = None

    def start(self, trainer: Trainer, extras: list[nn.Parameter]) -> None:
        """Finds the parameters: the module's, and those beside it that the term reaches too."""
        own = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        self.parameters, self.extra = [*own, *extras], len(extras)
        self.plain, self.weighted, self.tokens = [], [], None

    def take(self, term: Tensor, tokens: Tensor, trainer: Trainer) -> None:
        """Adds the gradient of one micro-batch's term, a mean over so many tokens."""
        found = term_gradients(term, self.parameters, trainer, self.where, 1.0)
        window = trainer.accumulate_grad_batches
        self.plain = added(self.plain, [None if g is None else g / window for g in found])
        self.weighted = added(self.weighted, [None if g is None else g * tokens.to(g) for g in found])
        count = tokens.detach().double()
        self.tokens = count if self.tokens is None else self.tokens + count

    @torch.no_grad()
    def act(self, trainer: Trainer) -> None:
        """Puts the gradients right; the module's are unscaled and averaged by now, those of the extras not yet."""
        if self.tokens is None:
            return
        plain, weighted, tokens = self.plain, self.weighted, self.tokens
        self.plain, self.weighted, self.tokens = [], [], None
        processes = dist.get_world_size() if several_processes() else 1
        summed([*plain, *weighted])
        if processes > 1:
            dist.all_reduce(tokens)
        scale = scale_of(getattr(trainer.precision_plugin, "scaler", None)) or 1.0
        own = len(self.parameters) - self.extra
        for i, (p, naive, exact) in enumerate(zip(self.parameters, plain, weighted, strict=True)):
            if p.grad is not None and naive is not None and exact is not None:
                right = exact / tokens.clamp(min=1).to(exact) - naive / processes
                p.grad.add_(right, alpha=1.0 if i < own else scale)

    def state_dict(self) -> dict[str, Any]:
        """Sums of an unfinished window, of every process."""
        if self.tokens is None:
            return {}
        mine = {"plain": self.plain, "weighted": self.weighted, "tokens": self.tokens}
        ranks: list[Any] = [mine]
        if several_processes():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, mine)
        return {"ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`, after :meth:`start`."""
        if "ranks" not in state:
            return
        mine = state["ranks"][dist.get_rank() if several_processes() else 0]
        pairs = [zip(mine[name], self.parameters, strict=True) for name in ("plain", "weighted")]
        self.plain, self.weighted = ([None if g is None else g.to(p) for g, p in pair] for pair in pairs)
        self.tokens = mine["tokens"].to(self.parameters[0].device)


def term_gradients(
    term: Tensor, parameters: list[nn.Parameter], trainer: Trainer, where: str, factor: float
) -> list[Tensor | None]:
    """Returns the gradient of a term, times a factor, free of a GradScaler's scale; its graph stays.

    Raises:
        LossplugError: The graph can't be differentiated twice.
    """
    scale = scale_of(getattr(trainer.precision_plugin, "scaler", None)) or 1.0
    learned = [p for p in parameters if p.requires_grad]
    found: tuple[Tensor | None, ...] = (None,) * len(learned)
    if term.requires_grad:
        try:
            found = torch.autograd.grad(term * scale, learned, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise LossplugError(
                f"the distillation's own gradient can't be taken ({str(error).splitlines()[0]})",
                where=where,
                remedy="Use non-reentrant checkpointing and no compiled network, or leave dot_delta, align and "
                "normalize out",
            ) from None
    by_id = {id(p): g for p, g in zip(learned, found, strict=True)}
    return [None if (g := by_id.get(id(p))) is None else g.detach() * (factor / scale) for p in parameters]


def added(sums: list[Tensor | None], fresh: list[Tensor | None]) -> list[Tensor | None]:
    """Returns sums of gradients, one more added."""
    if not sums:
        return fresh
    return [b if a is None else a if b is None else a + b for a, b in zip(sums, fresh, strict=True)]


def summed(gradients: list[Tensor | None]) -> list[Tensor]:
    """Sums gradients over processes in place; returns those that there are."""
    held = [g for g in gradients if g is not None]
    if several_processes():
        for g in held:
            dist.all_reduce(g)
    return held


def scale_of(scaler: Any) -> float | None:
    """Returns the scale of a GradScaler that is in use, or None."""
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None
