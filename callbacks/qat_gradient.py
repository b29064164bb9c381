"""Gradient-adaptive quantisation-aware training: a second pass for flatness, and a gate on every scale's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lossplug.callbacks.exact_resume import random_state, set_random_state
from lightning_lossplug.callbacks.qat import ScaleCallback
from lightning_lossplug.callbacks.sam import SAM, beside, frozen_statistics
from lightning_lossplug.callbacks.sharded import refuse_all_but_data
from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.quantization.base import paused
from lightning_lossplug.quantization.disorder_plot import draw_disorder
from lightning_lossplug.quantization.gaqat import GradientAdaptiveSettings, GradientAdaptiveTechnique
from lightning_lossplug.surgery.chain import unwrap_method, wrap_method
from lightning_lossplug.surgery.shards import full, joint_norm, local, shard_like

OUTERMOST = -1000


class GradientAdaptiveQAT(ScaleCallback[GradientAdaptiveTechnique]):
    r"""QAT at a flat minimum, with a gate on the gradient of every scale (GAQAT, arXiv 2412.05551).

    Each optimizer step has two passes over its batches. The first, at w, gives g and each scale's task gradient; the
    second, at :math:`w + (\rho/\|g\|_2 - \alpha)\,g` (``sagm``; ``sam`` has no alpha), gives g' and each scale's
    flatness gradient. Weights step with (g + g')/2 (``sam``: g'), scales with (m task + flatness)/2, where m is 0
    while the scale is frozen: every ``disorder_window`` steps the scales whose task gradient changed its sign less
    often than ``disorder_threshold`` lose it until the next decision. The defaults of window and threshold are this
    library's; the paper's are not public.

    The second pass repeats all micro-batches with their random states, without logging and without moving running
    statistics. Precision, loss scaling, DDP, FSDP2, accumulation and clipping (of the combined gradient) stay as they
    are. Hooks such as ``on_after_backward`` run in both passes. Manual optimization and other strategies that shard
    parameters are refused.

    Args:
        bits_w: Bits of the weights: 1, 1.58 or 2 to 8.
        bits_a: Bits of each layer's input, 2 to 8; null leaves it as it is.
        sharpness: ``sagm`` or ``sam``.
        rho: Radius of the second pass, >= 0.
        alpha: SAGM's step down before the step up, >= 0.
        disorder_window: Optimizer steps between two decisions, >= 8.
        disorder_threshold: Scales with less disorder are frozen; 0 never, above 1 always.
        freeze_fraction: Freeze this share of the scales, those with the least disorder, instead.
        freeze_target: The half that a frozen scale loses: ``task``, ``smooth`` or ``both`` (it then stands still).
        unfreeze: Decide anew at every window; else frozen is for good.
        perturb_scales: Move scales too in the second pass, as SAGM over all parameters would.
        start_step: First optimizer step at which anything may freeze.
        zero_sign: A zero gradient keeps the ``previous`` sign, or is a sign of its own (``zero``).
        replay: Micro-batches of an accumulation that the second pass repeats: ``all``, or the ``last`` to save memory.
        layer_logs: Log the disorder of every layer.
        picture: File of a heat map of the disorder of every scale over time, drawn after the fit (needs matplotlib).
        weight: Quantiser of the weights; null: ``paretoq`` up to 2 bits, ``lsq`` above.
        activation: Quantiser of the inputs.
        granularity: ``tensor``, ``channel`` or ``group``.
        group_size: Weights per group, for ``group``.
        include: Glob patterns of layer paths, or a mapping to bits; see :class:`QAT`.
        exclude: Glob patterns that are left out.
        first_last_bits: Bits of the first convolution and the output layer; null leaves them as they are. The step of
            the first convolution's input is the range of the first batches; it isn't learned.
        weight_options: Further parameters of the weights' quantiser.
        activation_options: Further parameters of the inputs' quantiser.
        init_batches: Training batches that set the scales of inputs.
        scale_update: ``multiplicative`` (an optimizer's step d makes a scale s exp(d)), ``additive``, or ``auto``:
            multiplicative with optimizers of the Adam kind, whose steps don't shrink with the scale.
        scale_lr: Learning rate of the scales, as a factor of their layer's.
        scale_weight_decay: Weight decay of the scales.
        scale_group: Give scales optimizer groups of their own.
        attention_bits: Bits of the queries, keys and values of attention modules; see :class:`QAT`.
        softmax_bits: Bits of the attention's probabilities; null: as ``attention_bits``.

    Raises:
        LossplugError: A value out of range; no learned scale; SAM beside it, manual optimization, parameters sharded
            by other means than FSDP2.
    """

    def __init__(
        self,
        bits_w: float | None = 4,
        bits_a: int | None = 4,
        sharpness: Literal["sagm", "sam"] = "sagm",
        rho: float = 0.05,
        alpha: float = 0.001,
        disorder_window: int = 100,
        disorder_threshold: float = 0.3,
        freeze_fraction: float | None = None,
        freeze_target: Literal["task", "smooth", "both"] = "task",
        unfreeze: bool = True,
        perturb_scales: bool = False,
        start_step: int = 0,
        zero_sign: Literal["previous", "zero"] = "previous",
        replay: Literal["all", "last"] = "all",
        layer_logs: bool = False,
        picture: str | None = None,
        weight: str | None = None,
        activation: str = "lsq",
        granularity: Literal["tensor", "channel", "group"] = "channel",
        group_size: int | None = None,
        include: list[str] | dict[str, str] | None = None,
        exclude: list[str] | None = None,
        first_last_bits: int | None = 8,
        weight_options: dict[str, Any] | None = None,
        activation_options: dict[str, Any] | None = None,
        init_batches: int = 1,
        scale_update: Literal["auto", "additive", "multiplicative"] = "auto",
        scale_lr: float = 1.0,
        scale_weight_decay: float = 0.0,
        scale_group: bool = True,
        attention_bits: int | None = None,
        softmax_bits: int | None = None,
    ) -> None:
        settings = GradientAdaptiveSettings(
            bits_w=bits_w,
            bits_a=bits_a,
            sharpness=sharpness,
            rho=rho,
            alpha=alpha,
            disorder_window=disorder_window,
            disorder_threshold=disorder_threshold,
            freeze_fraction=freeze_fraction,
            freeze_target=freeze_target,
            unfreeze=unfreeze,
            perturb_scales=perturb_scales,
            start_step=start_step,
            zero_sign=zero_sign,
            replay=replay,
            layer_logs=layer_logs,
            weight=weight,
            activation=activation,
            granularity=granularity,
            group_size=group_size,
            include=include,
            exclude=exclude or [],
            first_last_bits=first_last_bits,
            weight_options=weight_options or {},
            activation_options=activation_options or {},
            init_batches=init_batches,
            scale_update=scale_update,
            scale_lr=scale_lr,
            scale_weight_decay=scale_weight_decay,
            scale_group=scale_group,
            attention_bits=attention_bits,
            softmax_bits=softmax_bits,
        )
        super().__init__(GradientAdaptiveTechnique(settings))
        self._steps: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []  # training_step calls since the last step
        self._second = False
        self.picture = picture

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Converts the layers; records the steps of a fit, to repeat them."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        where = type(self).__name__
        refuse_all_but_data(trainer, where)
        if self.picture is not None:
            require("matplotlib", "cli", "GradientAdaptiveQAT(picture=...)")
        if not pl_module.automatic_optimization:
            raise LossplugError("needs automatic optimization", where=where, remedy="Use QAT, which has one pass")
        if any(isinstance(other, (SAM, GradientAdaptiveQAT)) and other is not self for other in trainer.callbacks):  # type: ignore[attr-defined]
            raise LossplugError("another callback makes a second pass", where=where, remedy="Keep one of them")
        self._steps.clear()
        self._second = False
        wrap_method(pl_module, "training_step", self, self._record(pl_module), order=OUTERMOST)
        for name in ("log", "log_dict"):
            wrap_method(pl_module, name, self, self._log)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hooks the optimizers; there has to be something to adapt."""
        super().on_fit_start(trainer, pl_module)
        _ = self.technique.gate

    def _log(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return None if self._second else inner(*args, **kwargs)

    def _record(self, pl_module: LightningModule) -> Any:
        def training_step(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self._second:
                if self.technique.settings.replay == "last":
                    self._steps.clear()
                self._steps.append((args, kwargs, random_state(pl_module.device)))
            return inner(*args, **kwargs)

        return training_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The second pass: perturbs, repeats, restores, combines; gradients are synchronised and unscaled here."""
        steps, self._steps = self._steps, []
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        scales = {id(p): name for name, p in self.technique.named_scales().items()}
        if not any(id(p) in scales for p in params):
            return
        self._check_complete(trainer, len(steps))
        moved = params if self.technique.settings.perturb_scales else [p for p in params if id(p) not in scales]
        with torch.no_grad():
            factor = self._factor(moved)
            if factor is None:
                return  # the GradScaler skips this step by itself
            kept = [local(p).detach().clone() for p in moved]
            for p in moved:
                local(p).add_((_grad(p) * factor).to(p.dtype))
            # Taken away, not copied: the second pass makes gradients of its own, and adds to nothing. With several
            # processes they may be views of buckets that it writes again.
            alone = trainer.world_size == 1
            first: list[Tensor] = [p.grad if alone else p.grad.clone() for p in params]  # type: ignore[misc, union-attr]
            for p in params:
                p.grad = None
        try:
            with self._repeating(trainer, pl_module):
                self._repeat(trainer, optimizer, steps, pl_module.device)
        finally:
            with torch.no_grad():
                for p, old in zip(moved, kept, strict=True):
                    local(p).copy_(old)
        self._combine(trainer, params, first, scales)

    def _factor(self, params: list[nn.Parameter]) -> Tensor | None:
        settings = self.technique.settings
        norm = joint_norm([_grad(p) for p in params], params)
        if not bool(norm.isfinite()):
            return None
        factor = settings.rho / (norm + 1e-12)
        return factor - settings.alpha if settings.sharpness == "sagm" else factor

    def _check_complete(self, trainer: Trainer, count: int) -> None:
        # A checkpoint between two micro-batches has their gradients (ExactResume), not the batches themselves.
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        expected = (ready - 1) % trainer.accumulate_grad_batches + 1
        if self.technique.settings.replay == "all" and count < expected:
            raise LossplugError(
                f"{count} of {expected} micro-batches of this step are known: the run was resumed in mid-accumulation",
                where=type(self).__name__,
                remedy="Save checkpoints after optimizer steps, or set replay='last'",
            )

    def _repeat(self, trainer: Trainer, optimizer: Optimizer, steps: list[Any], device: torch.device) -> None:
        for i, (args, kwargs, state) in enumerate(steps):
            set_random_state(state, device)
            with _no_sync(trainer) if i + 1 < len(steps) else nullcontext(), torch.enable_grad():
                output = trainer.strategy.training_step(*args, **kwargs)
                loss = output["loss"] if isinstance(output, dict) else output
                if loss is None:
                    continue
                share = 1 if self.technique.settings.replay == "last" else trainer.accumulate_grad_batches
                trainer.strategy.backward(loss / share, optimizer)  # type: ignore[operator, arg-type]

    @contextmanager
    def _repeating(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        after = random_state(pl_module.device)
        self._second = True
        try:
            with frozen_statistics(pl_module), paused(pl_module), beside(trainer):
                yield
        finally:
            self._second = False
            set_random_state(after, pl_module.device)

    @torch.no_grad()
    def _combine(
        self, trainer: Trainer, params: list[nn.Parameter], first: list[Tensor], scales: dict[int, str]
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            elif scaler is not None:
                p.grad.mul_(1.0 / float(scaler.get_scale()))
        second: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        if not bool(joint_norm([_grad(p) for p in params], params).isfinite()):
            for p, g in zip(params, first, strict=True):
                p.grad = g
            return
        names = [scales.get(id(p)) for p in params]
        # The gate counts every entry of every scale, on every rank.
        task = {name: full(g) for name, g in zip(names, first, strict=True) if name is not None}
        smooth = {name: full(g).clone() for name, g in zip(names, second, strict=True) if name is not None}
        gated = self.technique.combine(task, smooth)
        for p, name, g1, g2 in zip(params, names, first, second, strict=True):
            if name is not None:
                local(g2).copy_(shard_like(gated[name], g2))
                if self.technique.settings.freeze_target == "both" and not bool(gated[name].any()):
                    p.grad = None  # so that momentum and weight decay leave it alone too
            elif self.technique.settings.sharpness != "sam":
                local(g2).add_(local(g1)).div_(2)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the picture, if a window was full."""
        super().on_train_end(trainer, pl_module)
        gate = self.technique.gate
        if self.picture is not None and trainer.is_global_zero and gate.history:
            draw_disorder(gate.history, list(gate.sizes), Path(self.picture))

    def _clean_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._clean_up(trainer, pl_module)
        self._steps.clear()
        for name in ("training_step", "log", "log_dict"):
            unwrap_method(pl_module, name, self)


def _grad(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return local(p.grad)


def _no_sync(trainer: Trainer) -> AbstractContextManager[Any]:
    block = getattr(trainer.strategy, "block_backward_sync", None)
    return nullcontext() if block is None else block()
