"""Training for sparse activations: DEFT's density term beside the loss."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.sparsity.activation import DensityPenalty
from lightning_lossplug.surgery.chain import unwrap_method, wrap_method

PENALTY_ORDER = 50  # outside a swapped loss: it is added to whatever the step returns


class ActivationDensity(Callback):
    r"""Adds a smooth count of non-zero feed-forward activations to the loss of every training step (DEFT).

    :math:`L + \alpha \cdot \mathrm{mean}_{B,l,t,d}\; h^2 / (h^2 + \epsilon)`, h the outputs of the activation modules;
    padding (``attention_mask`` of a dict batch) doesn't count, and with an encoder and a decoder both means are added.
    It makes activations sparse, exactly so only with ReLU. That alone makes nothing faster: dense products cost the
    same, a gain needs a decoding kernel that skips zeros.

    Logged: ``density`` (the term), and ``zeros``, the share of activations that are exactly 0.

    Args:
        alpha: Strength >= 0; 1 in the paper. 0 leaves the loss as it is.
        eps: Where the count is soft: activations around its root feel the gradient, those far from it hardly do.
            1e-7 in the paper's code; GELU and SiLU need more, such as 1e-3, to move.
        include: Glob patterns of module paths; None: activation modules beside a linear layer.
        exclude: Glob patterns that are left out.

    Raises:
        LossplugError: A value out of range, manual optimization, no such activation, or none that runs with gradients
            in the step.

    Source: From PEFT to DEFT, arXiv 2402.01911.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        eps: float = 1e-7,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        self.penalty = DensityPenalty(alpha, eps, include, exclude or [])
        self._last: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wraps the training step."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise LossplugError(
                "ActivationDensity needs automatic optimization",
                where="ActivationDensity",
                remedy="Use sparsity.activation.DensityPenalty in the step yourself",
            )
        wrap_method(pl_module, "training_step", self, self._training_step(trainer), order=PENALTY_ORDER)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hooks the activations, those of layers that ``configure_model`` built too."""
        found = self.penalty.attach(pl_module)
        rank_zero_info(f"ActivationDensity: {len(found)} activations, the first is {found[0]}")

    def _training_step(self, trainer: Trainer) -> Any:
        def training_step(inner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            if self.penalty.alpha == 0:
                return inner(batch, *args, **kwargs)
            every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
            self.penalty.measure = bool(every) and (trainer.global_step + 1) % every == 0
            with self.penalty.armed(batch):
                output = inner(batch, *args, **kwargs)
            if output is None:  # the module skips this batch
                return None
            term = self.penalty.term()
            self._last = term.detach()
            if isinstance(output, Tensor):
                return output + self.penalty.alpha * term
            return {**output, "loss": output["loss"] + self.penalty.alpha * term}

        return training_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the term and the share of zeros when the Trainer's loggers are due."""
        if self.penalty.measure and self._last is not None and self.penalty.zeros:
            zeros = sum(self.penalty.zeros) / len(self.penalty.zeros)
            values = {"ActivationDensity/density": self._last, "ActivationDensity/zeros": zeros}
            pl_module.log_dict(values, on_step=True, on_epoch=False)  # type: ignore[arg-type]

    def _clean_up(self, pl_module: LightningModule) -> None:
        unwrap_method(pl_module, "training_step", self)
        self.penalty.detach()
        self._last = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes hooks and wrapper off."""
        self._clean_up(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an exception, when ``teardown`` is not called."""
        self._clean_up(pl_module)
