"""Directional losses of return forecasts: MADL and its differentiable form GMADL."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.losses.regression import RegressionLoss
from lightning_lossplug.registry import register


@register(
    "loss",
    "madl",
    family="regression",
    paper="Mean Absolute Directional Loss as a New Loss Function for Machine Learning Problems in Algorithmic "
    "Investment Strategies",
    arxiv="2309.10546",
    signature="regression",
    differentiable=False,
)
class MADL(RegressionLoss):
    r"""Mean absolute directional loss :math:`l = -\mathrm{sign}(R\,\hat R)\,|R|` of returns R (not prices).

    Its gradient is 0 almost everywhere: use it to select models, and ``gmadl`` to train them; a call on predictions
    that want a gradient warns once (arXiv 2309.10546).

    Args:
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self._warned = False

    def elements(self, pred: Tensor, target: Tensor, timestep: Tensor | None) -> Tensor:
        """The size of the move, negative where its direction was forecast."""
        if pred.requires_grad and torch.is_grad_enabled() and not self._warned:
            self._warned = True
            warnings.warn("madl has no gradient to train with; use it as a metric, and gmadl as the loss", stacklevel=2)
        return -torch.sign(pred) * torch.sign(target) * target.abs()


@register(
    "loss",
    "gmadl",
    family="regression",
    paper="Generalized Mean Absolute Directional Loss as a Solution to Overfitting and High Transaction Costs in "
    "Machine Learning Models Used in High-Frequency Algorithmic Investment Strategies",
    arxiv="2412.18405",
    signature="regression",
)
class GMADL(RegressionLoss):
    r"""Generalised directional loss :math:`l = -(\sigma(a R \hat R) - 1/2)\,|R|^b` of returns R (not prices).

    The derivative in the forecast is :math:`-a R\,\sigma(1-\sigma)|R|^b`; for large ``a`` and b = 1 it is MADL/2. Use
    it to train forecasters of returns whose sign decides the trade (arXiv 2412.18405).

    Args:
        a: Steepness > 0; 100 to 1000 for daily returns. The sources give ranges, the defaults are chosen here.
        b: Exponent >= 0 of the size of the move, 1 to 2.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(self, a: float = 100.0, b: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.a = check_number("gmadl", "a", a, above=0)
        self.b = check_number("gmadl", "b", b, least=0)

    def elements(self, pred: Tensor, target: Tensor, timestep: Tensor | None) -> Tensor:
        """``sigmoid(u) - 1/2 = tanh(u/2)/2``, exact near 0."""
        return -0.5 * torch.tanh(0.5 * self.a * target * pred) * target.abs() ** self.b
