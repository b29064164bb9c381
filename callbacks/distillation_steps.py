"""How a distillation step is taken: two gradients apart, exact means over tokens, text the student writes."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lossplug.callbacks.distillation_base import DistillationCallback
from lightning_lossplug.callbacks.distillation_split import SplitGradients, WindowMean
from lightning_lossplug.callbacks.sharded import keeps_all_on_every_rank
from lightning_lossplug.distillation.networks import several_processes
from lightning_lossplug.distillation.on_policy import OnPolicy, Sampler, write
from lightning_lossplug.distillation.two_gradients import AlignScope
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_choice

Normalize = Literal["batch", "window"]


class StepwiseDistillation(DistillationCallback):
    """Adds to the base what a step may do beside adding a term; see the arguments of ``Distillation``."""

    teacher: nn.Module | None

    def set_steps(
        self,
        dot_delta: float | None,
        align: AlignScope | None,
        normalize: Normalize,
        on_policy: float | OnPolicy | None,
        logits_alone: bool,
    ) -> None:
        """Takes the settings.

        Raises:
            LossplugError: Values out of range, or settings that exclude each other.
        """
        if align is not None:
            check_choice(self.where, "align", align, get_args(AlignScope))
        self._split = None if dot_delta is align is None else SplitGradients(self.where, dot_delta, align)
        check_choice(self.where, "normalize", normalize, get_args(Normalize))
        if normalize == "window" and (self._split is not None or not logits_alone):
            raise LossplugError(
                "normalize='window' goes with a loss of logits alone, without dot_delta or align", where=self.where
            )
        self.normalize = normalize
        self._window = WindowMean(self.where)
        self._rows: Tensor | None = None  # how many rows the last loss is a mean of
        self._split_state: dict[str, Any] | None = None
        settings = OnPolicy(fraction=float(on_policy)) if isinstance(on_policy, (int, float)) else on_policy
        self.sampler = None if settings is None else Sampler(settings)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins anew."""
        if stage == "fit":
            self._split_state = None
            if self.sampler is not None:
                self.sampler = Sampler(self.sampler.how)
        super().setup(trainer, pl_module, stage)

    def start_steps(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the parameters, and restores where a run is resumed.

        Raises:
            LossplugError: The strategy shards parameters.
        """
        plain = keeps_all_on_every_rank(trainer.strategy)
        if not plain and (self.sampler is not None or self.normalize == "window"):
            name = "on_policy" if self.sampler is not None else "normalize='window'"
            raise LossplugError(
                f"{name} is not supported with {type(trainer.strategy).__name__}",
                where=self.where,
                remedy="Use one device or DDP",
            )
        names = {type(c).__name__ for c in trainer.callbacks}  # type: ignore[attr-defined]
        if self.normalize == "window" and trainer.accumulate_grad_batches > 1 and "GradientAdaptiveQAT" in names:
            raise LossplugError(
                "normalize='window' and GradientAdaptiveQAT both take passes of their own over accumulated batches",
                where=self.where,
                remedy="Use normalize='batch', or accumulate_grad_batches=1",
            )
        self._window.start(trainer, [] if self.aux is None else self.aux.parameters)
        if self._split is not None:
            self._split.start(trainer, pl_module)
        if self._split_state is not None:
            (self._split or self._window).load_state_dict(self._split_state)
            self._split_state = None

    def rewrite(self, trainer: Trainer, batch: Any) -> tuple[Any, bool]:
        """Returns the batch, or completions of its prompts."""
        if self.sampler is None:
            return batch, False
        done = self.progress(trainer).fraction if self.sampler.how.adaptive else 0.0
        source = self.sampler.choose(done)
        if source == "data":
            return batch, False
        return write(self.sampler, source, self.student_network, self.teacher, batch), source != "teacher"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells adaptive off-policy learning how the validation went."""
        if self.sampler is None or not self.sampler.how.adaptive or trainer.sanity_checking:
            return
        monitor = self.sampler.how.monitor
        if monitor not in trainer.callback_metrics:
            raise LossplugError(
                f"OnPolicy(adaptive=True) watches {monitor!r}, which was not logged",
                where=self.where,
                remedy="Known: " + ", ".join(sorted(trainer.callback_metrics)),
            )
        self.sampler.validated(float(trainer.callback_metrics[monitor]))

    def normalized(self, value: Tensor, trainer: Trainer) -> Tensor:
        """Returns a mean over this process's rows as its part of the mean over the rows of all processes."""
        if self.normalize == "batch" or trainer.accumulate_grad_batches > 1 or not several_processes():
            return value
        assert self._rows is not None
        everywhere = self._rows.detach().double()
        dist.all_reduce(everywhere)
        return value * (self._rows.double() * dist.get_world_size() / everywhere.clamp(min=1)).to(value)

    def count(self, logits: Tensor, mask: Tensor | None, target: Tensor | None) -> None:
        """Keeps how many rows the loss is a mean of."""
        if self.normalize == "batch":
            return
        shape = logits.shape[:-1]
        keep = torch.ones(shape, dtype=torch.bool, device=logits.device) if mask is None else mask.bool()
        if target is not None and target.shape == shape and not target.is_floating_point():
            keep = keep & (target != getattr(self.loss_module, "ignore_index", -100))
        self._rows = keep.sum()

    def on_term(self, trainer: Trainer, term: Tensor) -> None:
        """Takes the distillation's own gradient, where it is asked for."""
        if self._split is not None:
            self._split.take(term, trainer)
        elif self.normalize == "window" and trainer.accumulate_grad_batches > 1:
            assert self._rows is not None
            self._window.take(term, self._rows, trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Steps what the losses train, and gives the module's optimizer its gradients."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._split is not None:
            self._split.act(trainer)
        self._window.act(trainer)

    def after_step(self) -> None:
        """Gives the optimizer its settings back."""
        if self._split is not None:
            self._split.after_step()

    def _detach(self, pl_module: LightningModule) -> None:
        super()._detach(pl_module)
        if self._split is not None:
            self._split.after_step()

    def state_dict(self) -> dict[str, Any]:
        """Also velocities and sums of gradients, and what the student wrote."""
        own = {} if self.sampler is None else {"sampler": self.sampler.state_dict()}
        return {**super().state_dict(), "split": (self._split or self._window).state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps :meth:`state_dict` until the objects exist."""
        super().load_state_dict(state_dict)
        self._split_state = state_dict.get("split")
        if self.sampler is not None and "sampler" in state_dict:
            self.sampler.load_state_dict(state_dict["sampler"])
