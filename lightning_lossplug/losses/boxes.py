"""Box losses: distance and complete IoU, by torchvision, with sample weights and boxes without an area."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.losses.base import Loss
from lightning_lossplug.losses.checks import (
    check_floating,
    check_number,
    check_same_shape,
    reduce_weighted,
    row_weights,
    upcast,
)
from lightning_lossplug.registry import register


class BoxLoss(Loss):
    """A loss of boxes [..., 4] as (x1, y1, x2, y2), one row per box.

    ``reduction`` is ``none`` by default, as in torchvision. A side that is not positive (torchvision: NaN) counts as a
    tiny length, so that gradients stay finite.

    Args:
        eps: Keeps divisions finite, > 0.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    name: ClassVar[str]  # of the function in torchvision.ops

    def __init__(self, eps: float = 1e-7, reduction: str = "none") -> None:
        super().__init__(reduction)
        self.eps = check_number(type(self).__name__, "eps", eps, above=0)
        self.function = getattr(require("torchvision.ops", "vision", type(self).__name__), self.name)

    def rows(self, boxes: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of every box, by torchvision."""
        return self.function(boxes, target, reduction="none", eps=self.eps)

    def forward(
        self,
        boxes: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
        reduction: str | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            boxes: Predicted boxes [..., 4].
            target: True boxes, the same shape.
            sample_weight: Weights >= 0 of the boxes [...]; a box of weight 0 is left out, even where it is NaN.
            denominator: What ``mean`` divides by instead of the number of boxes or the summed weights (detectors: the
                number of positive anchors).
            reduction: Overrides the module's for this call.

        Raises:
            LossplugError: Shapes or dtypes that don't fit.
        """
        where = type(self).__name__
        check_floating(where, boxes=boxes)
        check_same_shape(where, boxes=boxes, target=target)
        if boxes.ndim == 0 or boxes.shape[-1] != 4:
            raise LossplugError(
                f"boxes have shape {tuple(boxes.shape)}, expected [..., 4] as x1, y1, x2, y2", where=where
            )
        with torch.autocast(boxes.device.type, enabled=False):
            b = upcast(boxes)
            t = target.to(b)
            weight = None
            if sample_weight is not None:
                weight = row_weights(sample_weight, b.shape[:-1], b, where)
                blank = b.new_tensor([0.0, 0.0, 1.0, 1.0])
                b = torch.where(weight[..., None] == 0, blank, b)
                t = torch.where(weight[..., None] == 0, blank, t)
            rows = self.rows(self._with_area(b), self._with_area(t))
            return reduce_weighted(rows, weight, reduction or self.reduction, b, denominator)

    def _with_area(self, boxes: Tensor) -> Tensor:
        low, high = boxes[..., :2], boxes[..., 2:]
        least = self.eps + 4 * torch.finfo(boxes.dtype).eps * low.detach().abs()
        return torch.cat([low, torch.where(high - low >= least, high, low + least)], dim=-1)


@register(
    "loss",
    "diou",
    family="detection",
    paper="Distance-IoU Loss: Faster and Better Learning for Bounding Box Regression",
    arxiv="1911.08287",
    signature="boxes",
)
class DIoU(BoxLoss):
    r"""Distance-IoU loss :math:`1 - \mathrm{IoU} + \rho^2/c^2` of boxes [..., 4].

    :math:`\rho` is the distance of the centres, c the diagonal of the enclosing box; the range is [0, 2), and disjoint
    boxes still have a gradient. Computed by ``torchvision.ops.distance_box_iou_loss`` (arXiv 1911.08287). Use it to
    train box regressors directly on overlap.

    Args:
        eps: Keeps divisions finite, > 0.
        reduction: ``none`` (default), ``mean`` or ``sum``.
    """

    name = "distance_box_iou_loss"


@register(
    "loss",
    "ciou",
    family="detection",
    paper="Distance-IoU Loss: Faster and Better Learning for Bounding Box Regression",
    arxiv="1911.08287",
    signature="boxes",
)
class CIoU(BoxLoss):
    r"""Complete-IoU loss of boxes [..., 4]: DIoU plus :math:`\alpha v` for the aspect ratio.

    :math:`v = \frac{4}{\pi^2}(\arctan\frac{w^*}{h^*} - \arctan\frac{w}{h})^2`;
    :math:`\alpha = v/((1-\mathrm{IoU})+v)` is a constant in backward. Computed by
    ``torchvision.ops.complete_box_iou_loss`` (arXiv 1911.08287), which uses ``eps`` only in :math:`\alpha`. Use it
    where the aspect ratio matters as well.

    Args:
        eps: Keeps divisions finite, > 0.
        reduction: ``none`` (default), ``mean`` or ``sum``.
    """

    name = "complete_box_iou_loss"
