"""What a callback trains or averages beside the module: its optimizer, and its place in the checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lossplug.callbacks.sharded import keeps_all_on_every_rank, shards_data_only
from lightning_lossplug.distillation.networks import several_processes, share
from lightning_lossplug.distillation.optimizer import AuxiliaryOptimizer
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.surgery.chain import wrap_method


class ExtrasCallback(Callback):
    """Owns networks outside the module, steps those that learn with the module's optimizer, saves and restores them.

    The state of a resumed run is kept until the networks exist: before ``on_fit_start`` there may be none.
    """

    beside_shards: ClassVar[bool] = True  # False for what reads whole weights of the student

    def __init__(
        self,
        lr_scale: float = 1.0,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], Any] | None = None,
    ) -> None:
        self.where = type(self).__name__
        self.lr_scale, self.optimizer, self.scheduler = lr_scale, optimizer, scheduler
        self.step = 0
        self.aux: AuxiliaryOptimizer | None = None
        self._saved: dict[str, Any] | None = None
        self._restored = self._prepared = self._late = False
        self._open = False  # gradients of an unfinished accumulation are held
        self._again = False  # a step is computed a second time

    @abstractmethod
    def extras(self) -> nn.ModuleList:
        """Everything that is trained, or changes, and belongs into the checkpoint."""

    def forget_run(self) -> None:
        """Drops what an earlier fit left, except the networks."""
        self._restored, self._saved, self.aux, self._open = False, None, None, False
        self._prepared = self._late = False

    def _refuse_sharding(self, trainer: Trainer) -> None:
        strategy = trainer.strategy
        # Whole extras on every process, their gradients averaged, are right beside a student in shards, too.
        if not keeps_all_on_every_rank(strategy) and not (self.beside_shards and shards_data_only(strategy)):
            raise LossplugError(
                f"a network that changes in training is not supported with {type(trainer.strategy).__name__}",
                where=self.where,
                remedy="Use one device or DDP, or a frozen teacher",
            )

    def _prepare(self, trainer: Trainer) -> None:
        """Restores the extras and makes their optimizer; called once they exist."""
        extras = self.extras()
        self._refuse_sharding(trainer)
        saved = self._saved
        if saved is not None:
            self._load(extras, saved["extras"])
        share([*(p.data for p in extras.parameters()), *extras.buffers()])
        trained = [p for p in extras.parameters() if p.requires_grad]
        if trained:
            self.aux = AuxiliaryOptimizer(trained, trainer.optimizers[0], self.optimizer, self.lr_scale, self.scheduler)
            # Behind every callback's on_before_optimizer_step: a second pass there meets the networks of the first.
            wrap_method(trainer.lightning_module, "configure_gradient_clipping", self, self._stepping(trainer))
        if saved is not None:
            self._resume(saved, extras)
        self._prepared = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores what FSDP2 has loaded only after ``on_fit_start``."""
        if self._late and (saved := self._saved) is not None:
            extras, self._late = self.extras(), False
            self._load(extras, saved["extras"])
            self._resume(saved, extras)

    def _resume(self, saved: dict[str, Any], extras: nn.ModuleList) -> None:
        if set(saved["extras"]) <= set(extras.state_dict()):
            self._saved = None  # else a part of it is made, and restored, at the first step
        if self.aux is not None:
            self.aux.load_state_dict(saved)
            if saved.get("gradients"):
                self.aux.set_gradients(saved["gradients"][dist.get_rank() if several_processes() else 0])
                self._open = True

    def _load(self, extras: nn.ModuleList, saved: dict[str, Tensor]) -> None:
        now = extras.state_dict()
        odd = [k for k, v in now.items() if k not in saved or saved[k].shape != v.shape]
        if odd:
            raise LossplugError(
                f"the checkpoint was written with other networks: {odd[0]!r} doesn't fit",
                where=self.where,
                remedy="Resume with the teachers and losses the run was started with",
            )
        extras.load_state_dict({k: saved[k] for k in now})

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drops the extras' gradients: at the first micro-batch of a window only."""
        if self.aux is not None:
            self.aux.zero_grad()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gradients are held now."""
        self._open = True

    def aux_steps(self) -> bool:
        """Whether the extras take this step."""
        return True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The window is complete."""
        self._open = False

    @contextmanager
    def second_pass(self) -> Iterator[None]:
        """Within the context a step is computed again: what it does to the extras is undone."""
        extras = self.extras()
        grads = [(p, p.grad) for p in extras.parameters()]
        buffers = [(b, b.clone()) for b in extras.buffers()]
        for p, _ in grads:
            p.grad = None
        self._again = True
        try:
            yield
        finally:
            self._again = False
            for p, grad in grads:
                p.grad = grad
            with torch.no_grad():
                for buffer, old in buffers:
                    buffer.copy_(old)

    def _stepping(self, trainer: Trainer) -> Any:
        def configure_gradient_clipping(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            inner(*args, **kwargs)
            if self.aux_steps():
                self._step_extras(trainer)

        return configure_gradient_clipping

    def _step_extras(self, trainer: Trainer) -> None:
        """Steps the extras: averaged over processes, unscaled and clipped as the module's own gradients are."""
        limit, how = trainer.gradient_clip_val, trainer.gradient_clip_algorithm

        def clip(parameters: list[nn.Parameter]) -> None:
            if how is not None and str(getattr(how, "value", how)) == "value":
                nn.utils.clip_grad_value_(parameters, float(limit))  # type: ignore[arg-type]
            else:
                nn.utils.clip_grad_norm_(parameters, float(limit))  # type: ignore[arg-type]

        scaler = getattr(trainer.precision_plugin, "scaler", None)
        assert self.aux is not None
        self.aux.step(scaler, clip if limit else None)

    def state_dict(self) -> dict[str, Any]:
        """The clock and, where there are extras, their weights and optimizer, in plain types."""
        extras = dict(self.extras().state_dict())
        return {"step": self.step, "extras": extras, **({} if self.aux is None else self.aux.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps :meth:`state_dict` until the objects exist."""
        self.step, self._restored = state_dict["step"], True
        self._saved = state_dict if state_dict["extras"] else None
        self._late = self._prepared

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the extras' gradients of an unfinished accumulation, of every process."""
        if self.aux is None or not self._open:
            return
        ranks: list[Any] = [self.aux.gradients()]
        if several_processes():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, self.aux.gradients())
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None:
            state["gradients"] = ranks
