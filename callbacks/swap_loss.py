"""Another loss in a training step that stays as it is."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import FusableLoss, Loss, create
from lightning_lossplug.losses.fused import FusedHead, attach
from lightning_lossplug.losses.fused.engines import describe
from lightning_lossplug.losses.fused.linear import Backend, check_backend
from lightning_lossplug.losses.number_values import attach_values, tokenizer_of
from lightning_lossplug.losses.swap import LossSwap
from lightning_lossplug.losses.token_values import TokenValueLoss
from lightning_lossplug.registry import registry
from lightning_lossplug.schedules import AnySchedule, Constant, Progress, Step, as_schedule
from lightning_lossplug.surgery.chain import unwrap_method, wrap_method

LOSS_ORDER = 100  # inside the distillation terms and penalties that other techniques add around the step
CHILD = "lossplug_loss"


class SwapLoss(Callback):
    """Trains with another loss: found where the step computes one, swapped in training only.

    Validation and test losses stay what the module computes, so runs with different losses are compared on the same
    numbers. Works in manual optimization too, since the swap happens inside the step. A loss with parameters becomes a
    child of the module, so that the optimizer and DDP see it; a loss with buffers only is kept in the callback's state.

    Args:
        loss: Registry name (``lossplug list losses``), or a loss object.
        parameters: Parameters of a loss given by name, as on its card.
        mode: ``replace``: ``w new + (1 - w) old``; ``add``: ``old + w new``.
        weight: The weight ``w``: a number, a schedule, or ``{point: value}`` in fractions of the run.
        where: ``auto``, ``functional``, ``loss_function`` (of a Hugging Face model), or an attribute's path.
        call: Which of the step's functional calls, counted from 0 among those the loss fits; default: all. For
            models with several heads, each with a ``SwapLoss`` of its own.
        sample_index: Key or position of the sample ids in the batch, for losses that keep a value per sample.
        fused: For Hugging Face models with a language-modelling head: compute the loss from the hidden states, in
            chunks, so that the logits of a training step are never held. They are computed where something else reads
            them; evaluation and ``generate`` are untouched. The loss has to be fusable (``lossplug show NAME``). A name
            instead of True is the ``backend`` of ``fused_linear``: ``rows``, ``tiles``, ``liger`` or ``cce``. Which one
            computes is said at the first step.

    Raises:
        LossplugError: Unknown loss or parameter; nothing to swap (at the first step, naming what was looked for).
    """

    def __init__(
        self,
        loss: str | Loss = "cross_entropy",
        parameters: dict[str, Any] | None = None,
        mode: Literal["replace", "add"] = "replace",
        weight: float | AnySchedule | dict[float, float] = 1.0,
        where: str = "auto",
        sample_index: int | str | None = None,
        fused: bool | Backend = False,
        call: int | None = None,
    ) -> None:
        if isinstance(loss, str):
            entry = registry.get("loss", loss)
            self.loss, self.loss_name, signature = create(loss, **(parameters or {})), entry.name, entry.signature
        else:
            if parameters:
                raise LossplugError(
                    "parameters go with a loss given by name", where="SwapLoss", remedy="Set them on the loss"
                )
            entry = next((e for e in registry if e.kind == "loss" and e.load() is type(loss)), None)  # type: ignore[assignment]
            self.loss, self.loss_name = loss, entry.name if entry else type(loss).__name__
            signature = entry.signature if entry else "logits_index"
        self.weight = Step(weight) if isinstance(weight, dict) else as_schedule(weight)
        self.sample_index, self.fused = sample_index, fused
        if isinstance(fused, str):
            check_backend(fused, None)
        self.head: FusedHead | None = None
        if fused and not (
            isinstance(self.loss, FusableLoss) and where == "auto" and sample_index is None and call is None
        ):
            raise LossplugError(
                f"fused={fused!r} doesn't go with the loss {self.loss_name!r}, where={where!r}, index={sample_index!r}",
                where="SwapLoss",
                remedy="It takes a fusable loss, where='auto' and no sample_index",
            )
        self.swap = LossSwap(self.loss, signature or "logits_index", mode, where, call)
        takes = {*inspect.signature(self.loss.forward).parameters, *getattr(self.loss, "row_inputs", ())}
        if sample_index is not None and "index" not in takes:
            raise LossplugError(f"the loss {self.loss_name!r} takes no sample index", where="SwapLoss")

    @property
    def state_key(self) -> str:
        """Identifies the instance by loss, mode and place."""
        call = {} if self.swap.call is None else {"call": self.swap.call}
        return self._generate_state_key(loss=self.loss_name, mode=self.swap.mode, where=self.swap.where, **call)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the loss and puts this one in its place for the steps of a fit."""
        if any(True for _ in self.loss.parameters()):
            taken = getattr(pl_module, CHILD, None)
            if taken is not None and taken is not self.loss:
                raise LossplugError(
                    "two losses with parameters in one run", where="SwapLoss", remedy="Keep one of them"
                )
            setattr(pl_module, CHILD, self.loss)
        if stage != "fit":
            return
        if isinstance(self.loss, TokenValueLoss) and self.loss.values is None:
            self._find_values(trainer, pl_module)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, SwapLoss) and other is not self and self.swap.rivals(other.swap):
                raise LossplugError(
                    f"{self.loss_name!r} and {other.loss_name!r} both replace the loss",
                    where="SwapLoss",
                    remedy="Give one of them mode='add', or each its own call= or where=",
                )
        if self.fused:
            backend: Backend = "auto" if self.fused is True else self.fused  # type: ignore[assignment]
            self.head = attach(pl_module, self.loss, combine=self._combine, backend=backend)
            sites = f"the fused head {', '.join(self.head.paths)}"
        else:
            self.swap.attach(pl_module)
            sites = ", ".join(self.swap.sites)
        self._checked = False
        wrap_method(pl_module, "training_step", self, self._training_step(trainer), order=LOSS_ORDER)
        rank_zero_info(f"SwapLoss: {self.loss_name} ({self.swap.mode}) in {sites}")

    def _find_values(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives a loss on tokens with values the table of the run's tokenizer, as wide as the model's logits."""
        tokenizer = tokenizer_of(trainer.datamodule, pl_module)  # type: ignore[attr-defined]
        if tokenizer is None:
            raise LossplugError(
                f"{self.loss_name} needs to know which tokens are numbers, and neither the data module nor the module "
                "has a tokenizer",
                where="SwapLoss",
                remedy="Give the loss object: SwapLoss(attach_values(create(...), tokenizer), mode='add')",
            )
        configs = (getattr(m, "config", None) for m in pl_module.modules())
        widths = [w for c in configs if isinstance(w := getattr(c, "vocab_size", None), int)]
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
        attach_values(self.loss, tokenizer, vocab_size=max([size, *widths]))  # type: ignore[arg-type]

    def _training_step(self, trainer: Trainer) -> Any:
        def training_step(inner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            site: LossSwap | FusedHead = self.swap if self.head is None else self.head
            if self.head is None:
                armed: Any = self.swap.armed(self._weight(trainer), self._index(batch))
            else:
                self.swap.weight = self._weight(trainer)
                armed = self.head.armed()
            with armed:
                output = inner(batch, *args, **kwargs)
            if not self._checked:
                site.require_calls()
                self._checked = True
                if self.head is not None:
                    rank_zero_info(f"SwapLoss: the head's loss is computed by {describe(self.head.engine)}")
                if site.dropped_smoothing:
                    rank_zero_info(
                        f"SwapLoss: the replaced call's label_smoothing={site.dropped_smoothing} went with it; "
                        "set parameters={'label_smoothing': ...} if the new loss should smooth"
                    )
            return output

        return training_step

    def _combine(self, compute: Any) -> Tensor:
        """The value of a fused call: the new loss, or its mix with the one that was called."""
        new, weight = compute(self.loss), self.swap.weight
        self.swap.last = {"new": new.detach().mean()}
        if self.swap.mode == "replace" and weight == 1:
            return new
        old = compute(None)
        self.swap.last["old"] = old.detach().mean()
        return old + weight * new if self.swap.mode == "add" else weight * new + (1 - weight) * old

    def _weight(self, trainer: Trainer) -> float:
        if isinstance(self.weight, Constant):
            return self.weight.value
        total = trainer.estimated_stepping_batches
        batches, window = trainer.num_training_batches, trainer.accumulate_grad_batches
        return self.weight(
            Progress(
                trainer.global_step,
                int(total) if total != float("inf") and trainer.lightning_module.automatic_optimization else None,
                batches / window if batches != float("inf") else None,
            )
        )

    def _index(self, batch: Any) -> Tensor | None:
        if self.sample_index is None:
            return None
        try:
            return batch[self.sample_index]
        except (KeyError, IndexError, TypeError):
            raise LossplugError(
                f"the batch ({type(batch).__name__}) has no {self.sample_index!r}",
                where="SwapLoss",
                remedy="Let the data set return the sample's index, and name its place with sample_index",
            ) from None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the buffers of the loss to the module's device."""
        self.loss.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the terms of the loss when the Trainer's loggers are due."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0 and self.swap.last:
            names = {"new": self.loss_name, "old": "replaced"}
            values = {f"SwapLoss/{names[key]}": value for key, value in self.swap.last.items()}
            pl_module.log_dict(values, on_step=True, on_epoch=False)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Buffers of the loss (values per sample, running statistics)."""
        if any(True for _ in self.loss.parameters()):
            return {}  # the module holds it, with its weights
        return dict(self.loss.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.loss.load_state_dict(state_dict)

    def _clean_up(self, pl_module: LightningModule) -> None:
        unwrap_method(pl_module, "training_step", self)
        self.swap.detach()
        if self.head is not None:
            self.head.remove()
            self.head = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts the training step and the criteria back."""
        self._clean_up(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an exception, when ``teardown`` is not called."""
        self._clean_up(pl_module)
