"""Scores that order the weights of a group: magnitude, activation-aware (Wanda), gradient-aware, or one's own.

A score is a function of ``weight`` and, by the names of its arguments, of what training lets it see: ``input_norm``
(root mean square of each input of the layer, shaped to broadcast against the weight) and ``grad_norm`` (root mean
square of the gradient of each weight). It returns one number >= 0 per weight. A registered name or a dotted path to a
function of that kind stands for it in settings and YAML.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.registry import register, registry
from lightning_lossplug.sparsity.nm_mask import group_axis

Score = Callable[..., Tensor]

SIGNALS = ("input_norm", "grad_norm")


@register("score", "magnitude", family="nm_sparsity")
def magnitude_scores(weight: Tensor) -> Tensor:
    """Returns ``|W|``."""
    return weight.detach().abs()


@register(
    "score",
    "wanda",
    family="nm_sparsity",
    paper="A Simple and Effective Pruning Approach for Large Language Models",
    arxiv="2306.11695",
)
def wanda_scores(weight: Tensor, input_norm: Tensor, dim: Literal["in"] | int = "in") -> Tensor:
    """Returns ``|W_ij| * ||x_j||``: a weight counts by what it adds to the output.

    Only the ratios within a group decide a mask, so the 2-norm over tokens and its root mean square are the same.

    Args:
        weight: ``[out, in, ...]``.
        input_norm: One number per input, ``[in]``, or anything that broadcasts against the weight.
        dim: Axis of the inputs, for a vector ``input_norm``.

    Raises:
        LossplugError: Another number of inputs.
    """
    axis = group_axis(weight, dim)
    if input_norm.ndim == 1:
        if len(input_norm) != weight.shape[axis]:
            raise LossplugError(
                f"input_norm has {len(input_norm)} entries, axis {axis} of the weight {weight.shape[axis]}",
                remedy="Give one norm per input",
            )
        input_norm = input_norm.view([-1 if place == axis else 1 for place in range(weight.ndim)])
    return weight.detach().abs() * input_norm


@register(
    "score",
    "gradient",
    family="nm_sparsity",
    paper="Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models",
    arxiv="2311.04902",
)
def gradient_scores(weight: Tensor, grad_norm: Tensor) -> Tensor:
    """Returns ``|W| * ||dL/dW||``: a weight counts by what the loss feels of it.

    The norm is over steps and elementwise; the paper's method adds the input norm of :func:`wanda_scores` with a
    weight of its own, which a function ``score(weight, input_norm, grad_norm)`` can do.

    Args:
        weight: Any shape.
        grad_norm: Of the same shape, >= 0.
    """
    return weight.detach().abs() * grad_norm


def score_path(score: str | Score) -> str:
    """Returns the text that stands for a score in settings: its name, or the dotted path of a function.

    Raises:
        LossplugError: A function that can't be imported by its path (a lambda, say).
    """
    if isinstance(score, str):
        return score
    name = getattr(score, "__qualname__", "")
    if not name or "<" in name or "." in name:
        raise LossplugError(
            f"the score {score!r} has no importable name",
            where="score",
            remedy="Define a function at the top of a module, so that a checkpoint can name it",
        )
    return f"{score.__module__}.{name}"


def find_score(score: str | Score) -> Score:
    """Returns the function of a registered name or a dotted path.

    Raises:
        LossplugError: Unknown, or it asks for something that isn't there.
    """
    name = score_path(score)
    if "." not in name:
        found: Score = registry.get("score", name).load()
    else:
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise LossplugError(f"there is no function {name!r} ({error})", where="score") from None
    score_signals(found, name)
    return found


def score_signals(score: Score, name: str = "score") -> tuple[str, ...]:
    """Returns which of :data:`SIGNALS` a score takes.

    Raises:
        LossplugError: It needs an argument that no layer has.
    """
    try:
        arguments = list(inspect.signature(score).parameters.values())
    except (TypeError, ValueError):  # not callable, or a function of C that doesn't say what it takes
        raise LossplugError(
            "it doesn't say what it takes",
            where=f"score {name}",
            remedy="Write a function: def score(weight): return weight.abs()",
        ) from None
    for argument in arguments[1:]:
        if argument.name not in SIGNALS and argument.default is argument.empty:
            raise LossplugError(
                f"it takes {argument.name!r}", where=f"score {name}", remedy=suggestion(argument.name, SIGNALS)
            )
    return tuple(argument.name for argument in arguments if argument.name in SIGNALS)
