"""Any loss of pytorch-metric-learning, under its own class name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_lossplug.errors import LossplugError, require, suggestion
from lightning_lossplug.losses.base import Loss
from lightning_lossplug.losses.embeddings import check_embeddings, check_sample_labels, full_precision, upcast
from lightning_lossplug.registry import register


@register(
    "loss",
    "pytorch_metric_learning",
    family="metric",
    paper="PyTorch Metric Learning",
    arxiv="2008.09164",
    signature="embeddings_labels",
    gather=False,
)
class PytorchMetricLearning(Loss):
    """Adapter to a loss class of the package pytorch-metric-learning, in the calling order of this library.

    When: a metric loss or a miner's pairs that have no card here. Embeddings are upcast from half precision and
    autocast is off inside; reduction, distance and regularisers are the
    package's own. A loss that owns weights (``ArcFaceLoss`` ...) has to reach the optimizer.

    Shapes: x [B, D], y [B].

    Args:
        loss: Class name, as ``TripletMarginLoss``.
        parameters: Its arguments.
    """

    def __init__(self, loss: str, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        losses = require("pytorch_metric_learning.losses", "metric", "the loss 'pytorch_metric_learning'")
        base = losses.BaseMetricLossFunction
        classes = {
            name: found for name, found in vars(losses).items() if isinstance(found, type) and issubclass(found, base)
        }
        if loss not in classes:
            raise LossplugError(
                f"there is no loss {loss!r}", where="pytorch_metric_learning", remedy=suggestion(str(loss), classes)
            )
        try:
            self.loss = classes[loss](**(parameters or {}))
        except TypeError as error:
            raise LossplugError(str(error), where=f"parameters of {loss}") from None

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        ref_x: Tensor | None = None,
        ref_y: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Computes the loss; arguments as :meth:`~lightning_lossplug.losses.embeddings.PairLoss.forward`."""
        check_embeddings(x, "pytorch_metric_learning", "x")
        check_sample_labels(y, x, "pytorch_metric_learning", "y")
        with full_precision(x):
            ref_x = None if ref_x is None else upcast(ref_x)
            return self.loss(upcast(x), y, indices_tuple, ref_x, ref_y)
