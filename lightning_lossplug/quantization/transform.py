"""The quantisation stage of a plugged weight or input: a quantiser in the stack."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.surgery.plug import WeightTransform


class QuantTransform(WeightTransform):
    """Reads a weight (or an input) through a quantiser, after every mask.

    Args:
        quantizer: One of the registered quantisers.
    """

    stage: ClassVar[str] = "quantization"

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Returns the quantised value."""
        return self.quantizer(x)

    def check_fold(self) -> str | None:
        """Refuses scales that were never set or have left the positive numbers."""
        try:
            self.quantizer.check_ready()
        except LossplugError as error:
            return f"{error.what}. {error.remedy}"
        return None

    def weight_replaced(self) -> None:
        """The scales of another weight are worth nothing: the next tensor sets them."""
        self.quantizer.forget()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Nothing of its own to load; the quantiser does."""
