"""Cross-entropy of a linear classifier, taken from its input."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import FusableLoss, Loss
from lightning_lossplug.losses.cross_entropy import CrossEntropy
from lightning_lossplug.losses.fused.linear import Backend, check_backend, fusable, fused_linear
from lightning_lossplug.losses.stats import LogitStats
from lightning_lossplug.registry import register

WHERE = "linear_cross_entropy"


class LsePenalised(FusableLoss):
    r"""A fusable loss plus :math:`\lambda\, \mathrm{lse}^2` per row, weighted and reduced like the loss.

    Args:
        base: The loss.
        lse_penalty: :math:`\lambda \ge 0`.
    """

    def __init__(self, base: FusableLoss, lse_penalty: float) -> None:
        super().__init__(base.weight, base.ignore_index, base.reduction)
        if not lse_penalty >= 0:
            raise LossplugError(f"lse_penalty is {lse_penalty}, allowed is >= 0", where=WHERE)
        self.base, self.lse_penalty, self.needs = base, lse_penalty, base.needs

    def from_stats(self, stats: LogitStats) -> Tensor:
        """Unweighted rows."""
        return self.base.from_stats(stats) + self.lse_penalty * stats.lse.square()

    def sum_weights(self, weight: Tensor | None) -> Tensor | None:
        """Those of the base loss."""
        return self.base.sum_weights(weight)

    def weighted_from_stats(self, stats: LogitStats, y: Tensor, weight: Tensor | None) -> Tensor:
        """Weighted rows of the base loss plus the penalty times the weight of the label."""
        penalty = self.lse_penalty * stats.lse.square()
        rows = self.base.weighted_from_stats(stats, y, weight)
        return rows + (penalty if weight is None else penalty * weight[y])


@register(
    "loss",
    "linear_cross_entropy",
    family="language",
    paper="Cut Your Losses in Large-Vocabulary Language Models",
    arxiv="2411.09009",
    signature="hidden_classifier",
)
class LinearCrossEntropy(Loss):
    r"""Cross-entropy of ``hidden @ head.T + bias`` without the logits: ``loss(hidden, head, target, bias)``.

    The same numbers as the materialised loss, with the memory of one chunk of logits; see
    :func:`lightning_lossplug.losses.fused.fused_linear`. The idea of not holding the logits is the paper's; its
    gradient filtering pays only inside a GPU kernel and drops the gradients of rare tokens: ``filter_eps`` is for the
    authors' package (``backend="cce"``).

    Args:
        label_smoothing: In [0, 1]; only with ``base="cross_entropy"``.
        softcap: :math:`c > 0` of :math:`c \tanh(z / c)`; None: plain logits.
        lse_penalty: :math:`\lambda \ge 0` of :math:`\lambda\, \mathrm{lse}^2` added to every row.
        weight: Class weights [V].
        ignore_index: Label of rows that are left out, before any matrix product.
        reduction: ``none``, ``mean`` or ``sum``.
        tile: Rows of a chunk, or columns of a vocabulary tile; None: chosen by the sizes.
        return_lse: Return ``(loss, lse)``.
        base: Another fusable loss in the place of cross-entropy: a registry name or an object, which then brings its
            own class weights unless ``weight`` is given.
        backend: As for ``fused_linear``.
        filter_eps: As for ``fused_linear``: None or 0 for exact gradients.
    """

    weight: Tensor | None

    def __init__(
        self,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        lse_penalty: float = 0.0,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        tile: int | None = None,
        return_lse: bool = False,
        base: str | FusableLoss = "cross_entropy",
        backend: Backend = "auto",
        filter_eps: float | Literal["auto"] | None = None,
    ) -> None:
        super().__init__(reduction)
        if base == "cross_entropy":
            loss: FusableLoss = CrossEntropy(label_smoothing)
        elif label_smoothing:
            raise LossplugError(
                f"label_smoothing={label_smoothing} with base={base!r}", where=WHERE, remedy="Set it on the base loss"
            )
        else:
            loss = fusable(base)
        if softcap is not None and not softcap > 0:
            raise LossplugError(f"softcap is {softcap}, allowed is > 0", where=WHERE)
        if tile is not None and tile < 1:
            raise LossplugError(f"tile is {tile}, allowed is >= 1", where=WHERE)
        self.register_buffer("weight", loss.weight if weight is None else CrossEntropy(weight=weight).weight, False)
        self.loss = LsePenalised(loss, lse_penalty) if lse_penalty else loss
        self.softcap, self.ignore_index, self.tile = softcap, ignore_index, tile
        check_backend(backend, filter_eps)
        self.return_lse, self.backend, self.filter_eps = return_lse, backend, filter_eps

    def forward(
        self,
        hidden: Tensor,
        head: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
        reduction: str | None = None,
        ignore_index: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Computes the loss.

        Args:
            hidden: Input of the classifier, [..., D].
            head: Classifier [V, D].
            target: Class indices [...].
            bias: [V].
            sample_weight: Weight of each row, shape of ``target``.
            denominator: What ``mean`` divides by instead of the summed weights of the kept rows.
            reduction: Overrides the module's for this call.
            ignore_index: Overrides the module's for this call.

        Raises:
            LabelError: A label outside [0, V).
            LossplugError: Shapes or dtypes that don't fit.
        """
        return fused_linear(
            hidden,
            head,
            target,
            self.loss,
            bias=bias,
            softcap=self.softcap,
            ignore_index=self.ignore_index if ignore_index is None else ignore_index,
            reduction=self.reduction if reduction is None else reduction,
            sample_weight=sample_weight,
            denominator=denominator,
            class_weight=self.weight,
            backend=self.backend,
            tile=self.tile,
            filter_eps=self.filter_eps,
            return_lse=self.return_lse,
        )
