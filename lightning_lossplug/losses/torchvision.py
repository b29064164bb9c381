"""Any loss function of torchvision, under its own name; registered where the package is installed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lossplug.errors import LossplugError, require, suggestion
from lightning_lossplug.losses.base import Loss
from lightning_lossplug.losses.checks import check_floating, check_same_shape, reduce_weighted, upcast
from lightning_lossplug.losses.embeddings import full_precision
from lightning_lossplug.registry import register


@register("loss", "torchvision", family="adapter", paper="TorchVision, torchvision.ops", signature="boxes")
class TorchvisionLoss(Loss):
    """Adapter to a loss function of ``torchvision.ops``: predictions and targets of one shape.

    Half precision is upcast, autocast is off inside, and the reductions are this library's: without a row the result
    is 0 on the graph. When: ``generalized_box_iou_loss``; for the others there is ``diou``, ``ciou``,
    ``sigmoid_focal``, which take weights as well.

    Args:
        loss: Function name, as ``generalized_box_iou_loss``.
        parameters: Its arguments besides inputs and ``reduction``.
        reduction: ``none`` (torchvision's default), ``mean`` or ``sum``.
    """

    def __init__(
        self,
        loss: str = "generalized_box_iou_loss",
        parameters: Mapping[str, Any] | None = None,
        reduction: str = "none",
    ) -> None:
        super().__init__(reduction)
        ops = require("torchvision.ops", "vision", "the loss 'torchvision'")
        known = {n: f for n, f in vars(ops).items() if n.endswith("_loss") and inspect.isfunction(f)}
        if loss not in known:
            raise LossplugError(f"there is no loss {loss!r}", where="torchvision", remedy=suggestion(str(loss), known))
        self.function, self.parameters_ = known[loss], dict(parameters or {})
        takes = set(inspect.signature(self.function).parameters) - {"reduction"}
        for name in self.parameters_:
            if name not in takes:
                raise LossplugError(f"has no parameter {name!r}", where=loss, remedy=suggestion(name, takes))

    def forward(self, prediction: Tensor, target: Tensor, *, reduction: str | None = None) -> Tensor:
        """Computes the loss.

        Args:
            prediction: Boxes [..., 4] as (x1, y1, x2, y2), or logits.
            target: The same shape.
            reduction: Overrides the module's for this call.

        Raises:
            LossplugError: Shapes or dtypes that don't fit.
        """
        where = self.function.__name__
        check_floating(where, prediction=prediction)
        check_same_shape(where, prediction=prediction, target=target)
        if "box" in where and prediction.shape[-1:] != (4,):
            raise LossplugError(f"boxes have shape {tuple(prediction.shape)}, expected [..., 4]", where=where)
        with full_precision(prediction):
            x = upcast(prediction)
            rows = self.function(x, target.to(x), **self.parameters_, reduction="none")
            return reduce_weighted(rows, None, reduction or self.reduction, x)
