"""The base class of the methods that round one layer after the other, and the simplest of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from lightning_lossplug.quantization.post.layer import LayerProblem
from lightning_lossplug.registry import register


class PostTrainingMethod(ABC):
    """Chooses the rounding of one layer's weight; the model-level function brings the layers one by one."""

    name: ClassVar[str]
    needs_data: ClassVar[bool] = True  # inputs of the layer
    needs_float_model: ClassVar[bool] = False  # what the layer computes in the model as it was

    @abstractmethod
    def solve(self, problem: LayerProblem) -> Tensor:
        """Returns the quantised weight (values of the grid, which may be moved) for a layer."""


@register("post_training", "rtn", family="rounding", paper="Quantizing deep convolutional networks", arxiv="1806.08342")
class RTN(PostTrainingMethod):
    """Rounds to nearest on the grid that the weights themselves give (min-max, or of least squared error).

    The baseline of every other method; it needs no data unless inputs are quantised too, and takes any quantiser of
    weights, block formats too.
    """

    name: ClassVar[str] = "rtn"
    needs_data: ClassVar[bool] = False

    def solve(self, problem: LayerProblem) -> Tensor:
        """Rounds."""
        return problem.rounded()
