"""Logits, targets and masks, found in what networks return and batches hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError

LABELS = ("labels", "label", "target", "targets", "y")


class Signals(NamedTuple):
    """What a loss of logits is computed from.

    Args:
        student: Logits.
        teachers: Logits of each teacher, of the same shape.
        target: Class indices (or probabilities) of the rows, or None.
        mask: Rows to keep, or None.
        tokens: Whether the rows are tokens or other places inside a sample.
    """

    student: Tensor
    teachers: list[Tensor]
    target: Tensor | None
    mask: Tensor | None
    tokens: bool


def logits_of(output: Any, pick: int | str | Callable[[Any], Tensor] | None, who: str) -> Tensor:
    """Returns the logits in what a network returned.

    Args:
        output: A tensor, a tuple or list, a mapping, or an object with ``logits``.
        pick: Position, key or function; None: the first of a sequence, ``logits`` of the others.
        who: Whose output it is, for messages.

    Raises:
        LossplugError: There are no logits in it.
    """
    value = output
    if callable(pick):
        value = pick(output)
    elif isinstance(output, Tensor):
        value = output
    elif pick is not None:
        value = getattr(output, pick) if isinstance(pick, str) and hasattr(output, pick) else output[pick]
    elif getattr(output, "logits", None) is not None:
        value = output.logits
    elif isinstance(output, Mapping):
        value = output.get("logits")
    elif isinstance(output, (tuple, list)) and output:
        value = output[0]
    if not isinstance(value, Tensor):
        raise LossplugError(
            f"{who} returned {type(output).__name__}, in which no logits were found",
            remedy="Say output=KEY or output=POSITION",
        )
    return value


def targets_of(batch: Any, kwargs: Mapping[str, Any], pick: int | str | Callable[[Any], Any] | None) -> Tensor | None:
    """Returns the targets of a batch, or None.

    They are, in this order: what ``pick`` says; ``labels`` among the arguments of the student's call; the first of
    ``labels``, ``label``, ``target``, ``targets``, ``y`` in a mapping; the second part of a sequence.

    Raises:
        LossplugError: ``pick`` names nothing.
    """
    if callable(pick):
        return pick(batch)
    if pick is not None:
        try:
            return batch[pick]
        except (KeyError, IndexError, TypeError):
            raise LossplugError(f"the batch ({type(batch).__name__}) has no {pick!r}", where="targets") from None
    if isinstance(kwargs.get("labels"), Tensor):
        return kwargs["labels"]
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABELS if isinstance(batch.get(key), Tensor)), None)
    if isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return batch[1]
    return None


def predicts_next_token(network: nn.Module) -> bool:
    """Tells by its class name whether position t of a network's logits stands for token t + 1 of the labels."""
    names = [cls.__name__ for cls in type(network).__mro__]
    return any("CausalLM" in name or "LMHead" in name for name in names)


def align(
    student: Tensor, teachers: list[Tensor], target: Tensor | None, attention: Any, shift: bool, classes_last: bool
) -> Signals:
    """Puts logits, targets and mask in step: causal language models predict the next position.

    Args:
        student: Logits.
        teachers: Logits of each teacher.
        target: Targets, or None.
        attention: The attention mask of the student's call, or None.
        shift: Whether position t stands for target t + 1.
        classes_last: Whether rows are all dimensions but the last (else all but the second).
    """
    tokens = student.ndim > 2
    mask = attention.bool() if isinstance(attention, Tensor) and tokens and classes_last else None
    if mask is not None and mask.shape != student.shape[:-1]:
        mask = None
    if shift and tokens:
        student, teachers = student[:, :-1], [z[:, :-1] for z in teachers]
        target = target[:, 1:] if target is not None and target.ndim > 1 else target
        mask = mask[:, 1:] if mask is not None else None
    return Signals(student, teachers, target, mask, tokens)


def check_not_nan(x: Tensor, what: str) -> None:
    """Raises for numbers of a teacher that are NaN.

    Raises:
        LossplugError: They are.
    """
    if bool(torch.isnan(x.sum())) and bool(torch.isnan(x).any()):  # the sum alone costs one pass
        raise LossplugError(f"{what} hold NaN", remedy="Check its weights and the inputs it gets")


def check_teacher_logits(z: Tensor, who: str, frozen: bool) -> None:
    """Raises for logits that are NaN, or (of a frozen teacher) the same for every sample.

    Raises:
        LossplugError: They are.
    """
    check_not_nan(z, f"the logits of {who}")
    rows = z.flatten(0, -2)
    if frozen and len(rows) > 1 and bool((rows == rows[:1]).all()):
        raise LossplugError(
            f"the logits of {who} are the same for every sample",
            remedy="Its trained weights may not have been loaded, or it gets constant inputs",
        )
