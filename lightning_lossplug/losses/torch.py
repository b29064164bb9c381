"""Any loss class of torch.nn, under its own name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.modules import loss as torch_losses

from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.losses.base import Loss, upcast
from lightning_lossplug.losses.embeddings import full_precision
from lightning_lossplug.registry import register


@register("loss", "torch", family="adapter", paper="PyTorch, torch.nn", signature="inputs")
class TorchLoss(Loss):
    """Adapter to a loss class of ``torch.nn``: ``loss(input, target)``, or whatever the class takes.

    Floating inputs are upcast from half precision and autocast is off inside; the rest is torch's own, except that an
    empty input gives 0 on the graph where torch gives NaN. When: regression and ranking losses without a card, as
    ``HuberLoss`` or ``GaussianNLLLoss``, in a comparison with others; name their place, ``where="criterion"``.

    Args:
        loss: Class name, as ``HuberLoss``, ``TripletMarginLoss``, ``PoissonNLLLoss``.
        parameters: Its arguments, ``reduction`` too.
    """

    def __init__(self, loss: str, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__((parameters or {}).get("reduction", "mean"))
        classes = {name: found for name, found in vars(torch_losses).items() if _is_loss(name, found)}
        if loss not in classes:
            raise LossplugError(f"there is no loss {loss!r}", where="torch", remedy=suggestion(str(loss), classes))
        try:
            self.loss = classes[loss](**(parameters or {}))
        except TypeError as error:
            raise LossplugError(str(error), where=f"parameters of {loss}") from None

    def forward(self, *inputs: Tensor) -> Tensor:
        """Computes the loss of the tensors that the class takes, in its order.

        Raises:
            LossplugError: Tensors that the class doesn't take, in its own words.
        """
        if not inputs or not all(isinstance(x, Tensor) for x in inputs):
            raise LossplugError("takes tensors", where=type(self.loss).__name__)
        wide = [upcast(x) for x in inputs]
        if wide[0].numel() == 0 and self.reduction != "none":
            return wide[0].sum() * 0.0
        with full_precision(wide[0]):
            try:
                return self.loss(*wide)
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                text = str(error).splitlines()[0]
                raise LossplugError(text, where=type(self.loss).__name__) from error


def _is_loss(name: str, found: object) -> bool:
    return inspect.isclass(found) and issubclass(found, torch_losses._Loss) and not name.startswith("_")
