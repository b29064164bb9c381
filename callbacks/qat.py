"""Quantisation-aware training by a callback."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_lossplug.callbacks.technique import TechniqueCallback
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.groups import scale_groups
from lightning_lossplug.quantization.technique import QATSettings, QATTechnique
from lightning_lossplug.surgery.chain import unwrap_method, wrap_method

QATTechniqueT = TypeVar("QATTechniqueT", bound=QATTechnique[Any])


class ScaleCallback(TechniqueCallback[QATTechniqueT]):
    """What every QAT callback does besides carrying its technique: it gets the scales into the optimizer."""

    told = ("bits_w", "bits_a")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Converts the layers and, for a fit, makes optimizers that know the scales."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            wrap_method(pl_module, "configure_optimizers", self, self._configure_optimizers)

    def _attach(self, pl_module: LightningModule, may_be_empty: bool) -> None:
        known = len(self.technique.attention)
        super()._attach(pl_module, may_be_empty)
        taken, left = self.technique.attention, self.technique.attention_left
        settings = self.technique.settings
        if settings.attention_bits is None or (len(taken) == known and taken):
            return
        if taken:
            soft = settings.attention_bits if settings.softmax_bits is None else settings.softmax_bits
            rank_zero_info(
                f"{type(self).__name__}: attention of {len(taken)} modules in {settings.attention_bits} bits, softmax "
                f"in {soft}" + "".join(f"\n{name}: left out, {why}" for name, why in left.items())
            )
        elif not may_be_empty:
            name, why = next(iter(left.items()), ("the model", "no module calls F.scaled_dot_product_attention"))
            raise LossplugError(
                f"no attention can be quantised: {why}",
                where=f"{type(self).__name__}: {name}",
                remedy="Set attention_bits to null, or let a module's forward call that function",
            )

    def _configure_optimizers(self, inner: Any) -> Any:
        settings = self.technique.settings
        if not settings.scale_group:
            return inner()
        try:
            with scale_groups(self.technique.owners(), settings.scale_lr, settings.scale_weight_decay):
                return inner()
        except LossplugError:
            raise
        except ValueError as error:
            raise LossplugError(
                f"configure_optimizers failed with the scales in parameter groups of their own: {error}",
                where=type(self).__name__,
                remedy="A list with one entry per group needs one more for scales; or set scale_group=False",
            ) from error

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hooks the optimizers; every trained scale has to be in one."""
        if isinstance(trainer.strategy, FSDPStrategy):
            raise LossplugError(
                "the parameters are flattened by FSDPStrategy, scales among them",
                where=type(self).__name__,
                remedy="Use FSDP2 (ModelParallelStrategy), DDP or one device",
            )
        super().on_fit_start(trainer, pl_module)
        held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        for name, scale in self.technique.named_scales().items():
            if id(scale) not in held:
                raise LossplugError(
                    "no optimizer holds the scale, so it would never learn",
                    where=name,
                    remedy="Build the optimizer in configure_optimizers, from the layer's weight or all parameters",
                )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keeps scales that the forward pass has set from its batch."""
        self.technique.after_forward(pl_module)

    def _clean_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._clean_up(trainer, pl_module)
        unwrap_method(pl_module, "configure_optimizers", self)


class QAT(ScaleCallback[QATTechnique[QATSettings]]):
    """Trains the selected layers with quantised weights and inputs; scales are learned with them.

    Works with sparsity in one run, in any order of the list: the mask comes before the quantiser. After the fit
    ``technique.fold(module)`` gives plain layers with quantised weights (and float inputs),
    :func:`lightning_lossplug.quantization.integer_model` an int8 model that quantises inputs too, and
    :func:`lightning_lossplug.integrations.packed.save_packed` a file of packed codes. Under FSDP2
    (``ModelParallelStrategy``) scales are sharded and averaged as weights are; FSDPStrategy is refused.

    Start from a trained model. A learned step cuts a weight off where it started, and follows it by the learning rate
    only; a network that still has to grow its weights trains better with ``weight="fake_quant"`` and
    ``activation="fake_quant"``, whose ranges are those of the data at every step.

    Args:
        bits_w: Bits of the weights: 1, 1.58 or 2 to 8; null leaves them as they are.
        bits_a: Bits of each layer's input, 2 to 8; null leaves it as it is.
        weight: Quantiser of the weights; null: ``paretoq`` up to 2 bits, ``lsq`` above (``lossplug list quantizers``).
        activation: Quantiser of the inputs.
        granularity: ``tensor``, ``channel`` or ``group``: what shares a scale of the weights.
        group_size: Weights per group, for ``group``.
        include: Glob patterns of layer paths; null takes every product but embeddings and depthwise convolutions. A
            mapping gives every pattern its own bits: ``{"*.mlp.*": "w4a8", "*.attn.*": "w8"}``.
        exclude: Glob patterns that are left out.
        first_last_bits: Bits of the first convolution and the output layer; null leaves them as they are. The step of
            the first convolution's input is the range of the first batches; it isn't learned.
        weight_options: Further parameters of the weights' quantiser. Up to 4 bits the steps of ``lsq`` and
            ``lsq_plus`` start at the least squared error (``init="mse"``), which SmolLM2 in 4 bits needs; the papers'
            starts are ``init="lsq"`` and ``init="lsq_plus"``.
        activation_options: Further parameters of the inputs' quantiser; they start likewise.
        init_batches: Training batches that set the scales of inputs.
        scale_update: ``multiplicative`` (an optimizer's step d makes a scale s exp(d)), ``additive``, or ``auto``:
            multiplicative with optimizers of the Adam kind, whose steps don't shrink with the scale.
        scale_lr: Learning rate of the scales, as a factor of their layer's.
        scale_weight_decay: Weight decay of the scales.
        scale_group: Give scales optimizer groups of their own, in the optimizers that ``configure_optimizers`` builds.
        attention_bits: Bits of the queries, keys and values of every attention module whose ``forward`` calls
            ``F.scaled_dot_product_attention`` (timm, transformers with ``sdpa``, your own), 1 to 8 (1 are signs); null
            leaves attention as it is. ``exclude`` counts here, ``include`` doesn't. While the module runs, the fused
            kernel is replaced by an explicit softmax, which takes memory for the probabilities. Folding takes these
            quantisers off.
        softmax_bits: Bits of the probabilities, 1 to 8; null: as ``attention_bits``. 1 is BiViT's binary attention.

    Raises:
        LossplugError: Bits out of range, unknown quantisers or options, layers the granularity doesn't fit.
    """

    def __init__(
        self,
        bits_w: float | None = 8,
        bits_a: int | None = 8,
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
        settings = QATSettings(
            bits_w=bits_w,
            bits_a=bits_a,
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
        super().__init__(QATTechnique(settings))
