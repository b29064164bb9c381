"""Sharpness-aware minimisation at the level of the closure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchmetrics import Metric

from lightning_lossplug.callbacks.distillation_extras import ExtrasCallback
from lightning_lossplug.callbacks.sharded import refuse_all_but_data
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.surgery.chain import unwrap_method, wrap_method
from lightning_lossplug.surgery.shards import joint_norm, local


def perturbation(params: list[nn.Parameter], rho: float, adaptive: bool) -> tuple[list[Tensor], Tensor]:
    r"""Returns the step to the worst point of the ball for parameters that have gradients, and the norm it used.

    :math:`e = \rho\,g/(\|g\|_2 + 10^{-12})` over all parameters jointly; adaptive:
    :math:`e = \rho\,w^2 g/(\||w|\,g\|_2 + 10^{-12})`. Neither depends on the loss scale. Of sharded parameters the
    steps are those of this rank's shards, the norm is that of all.
    """
    grads = [local(p.grad) for p in params if p.grad is not None]
    pairs = list(zip(grads, map(local, params), strict=True))
    wide = [torch.promote_types(g.dtype, torch.float32) for g in grads]
    weighted = [(g * p.abs() if adaptive else g).to(t) for (g, p), t in zip(pairs, wide, strict=True)]
    norm = joint_norm(weighted, params)
    scale = rho / (norm + 1e-12)
    steps = [w * p.abs() if adaptive else w for w, (_, p) in zip(weighted, pairs, strict=True)]
    return [(s * scale.to(s)).to(p.dtype) for s, p in zip(steps, params, strict=True)], norm


class SAM(Callback):
    r"""Sharpness-aware minimisation: steps with the gradient at the worst point of a ball around the weights.

    Two forward and backward passes per step: the first at w gives :math:`e = \rho\,g/\|g\|_2`, the second at w + e
    gives the gradient that the optimizer uses at w. The user's optimizer, precision (a GradScaler too), clipping (of
    the second gradient) and DDP stay as they are. What is logged and returned is the first pass; running statistics
    of normalisation layers and torchmetrics states move in the first pass only. Under DDP and FSDP2
    (``ModelParallelStrategy``) both passes are averaged over ranks, so that e is the same everywhere and a non-finite
    gradient skips the second pass on all of them. Gradient accumulation, manual optimization and other strategies
    that shard parameters are refused. Hooks such as ``on_after_backward``
    run twice, as do losses with a state of their own (arXiv 2010.01412; adaptive: arXiv 2102.11600).

    Args:
        rho: Radius >= 0 of the ball, 0.05 to 0.2; adaptive 0.5 to 2. 0 is the optimizer alone, in one pass.
        adaptive: Scale the ball by the size of each weight (ASAM).

    Raises:
        LossplugError: A negative ``rho``; accumulation, manual optimization, or a strategy that shards parameters
            and isn't FSDP2 alone, at setup or at the first step.
    """

    def __init__(self, rho: float = 0.05, adaptive: bool = False) -> None:
        self.rho = check_number("SAM", "rho", rho, least=0)
        self.adaptive = adaptive
        self._second = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wraps the optimizer step and the logging of a fit."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise LossplugError(
                "SAM needs automatic optimization", where="SAM", remedy="Call the two passes in training_step yourself"
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(other, SAM) and other is not self for other in callbacks):
            raise LossplugError("two SAM callbacks in one run", where="SAM", remedy="Keep one of them")
        refuse_all_but_data(trainer, "SAM")
        self._refuse_accumulation(trainer)
        self._second = False
        wrap_method(pl_module, "optimizer_step", self, self._optimizer_step(trainer, pl_module))
        for name in ("log", "log_dict"):
            wrap_method(pl_module, name, self, self._log)

    def _refuse_accumulation(self, trainer: Trainer) -> None:
        if trainer.accumulate_grad_batches != 1:
            raise LossplugError(
                f"accumulate_grad_batches is {trainer.accumulate_grad_batches}: the second pass would add to the "
                "gradients of earlier batches",
                where="SAM",
                remedy="Set accumulate_grad_batches=1",
            )

    def _log(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return None if self._second else inner(*args, **kwargs)

    def _optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        def optimizer_step(
            inner: Callable[..., Any], epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
        ) -> Any:
            if self.rho == 0 or optimizer_closure is None:
                return inner(epoch, batch_idx, optimizer, optimizer_closure)
            self._refuse_accumulation(trainer)  # a GradientAccumulationScheduler may have changed it
            params = [p for group in optimizer.param_groups for p in group["params"]]
            return inner(
                epoch, batch_idx, optimizer, lambda: self._two_passes(trainer, pl_module, params, optimizer_closure)
            )

        return optimizer_step

    def _two_passes(
        self, trainer: Trainer, pl_module: LightningModule, params: list[nn.Parameter], closure: Any
    ) -> Any:
        loss = closure()
        params = [p for p in params if p.grad is not None]
        if loss is None or not params:
            return loss
        first = getattr(closure, "_result", None)  # what Lightning hands to on_train_batch_end
        with torch.no_grad():
            steps, norm = perturbation(params, self.rho, self.adaptive)
            if not bool(norm.isfinite()):
                return loss  # the GradScaler skips this step by itself
            saved = [local(p).detach().clone() for p in params]
            for p, step in zip(params, steps, strict=True):
                local(p).add_(step)
        del steps
        try:
            with self._second_pass(pl_module), beside(trainer):
                closure()
        finally:
            with torch.no_grad():
                for p, old in zip(params, saved, strict=True):
                    local(p).copy_(old)
        if first is not None:
            closure._result = first
        return loss

    @contextmanager
    def _second_pass(self, pl_module: LightningModule) -> Iterator[None]:
        self._second = True
        try:
            with frozen_statistics(pl_module):
                yield
        finally:
            self._second = False

    def _clean_up(self, pl_module: LightningModule) -> None:
        for name in ("optimizer_step", "log", "log_dict"):
            unwrap_method(pl_module, name, self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts the methods back."""
        self._clean_up(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an exception, when ``teardown`` is not called."""
        self._clean_up(pl_module)


@contextmanager
def beside(trainer: Trainer) -> Iterator[None]:
    """Within the context of a second pass the networks of other callbacks (teachers that learn) see nothing of it."""
    with ExitStack() as stack:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ExtrasCallback):
                stack.enter_context(callback.second_pass())
        yield


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within the context running statistics of normalisation layers and torchmetrics states don't move."""
    norms = [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    buffers = [b for m in norms for b in m.buffers(recurse=False)]
    kept = [b.clone() for b in buffers]
    metrics = [(m, _metric_state(m)) for m in module.modules() if isinstance(m, Metric)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in zip(buffers, kept, strict=True):
                buffer.copy_(old)
        for metric, state in metrics:
            for name, value in state.items():
                setattr(metric, name, value)


def _metric_state(metric: Metric) -> dict[str, Any]:
    """Copies of what an update of a metric changes."""
    states = {name: getattr(metric, name) for name in metric._defaults}
    copies = {k: list(v) if isinstance(v, list) else v.detach().clone() for k, v in states.items()}
    return {**copies, **{k: getattr(metric, k) for k in ("_update_count", "_computed", "_forward_cache")}}
