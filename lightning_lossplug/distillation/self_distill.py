"""Generations of self-distillation, and how much of the labels they should keep, in closed form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.distillation.base import LogitLoss
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number, check_same_shape
from lightning_lossplug.registry import register

PAPER = "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation"


@register(
    "loss",
    "self_distill",
    family="distillation",
    paper=PAPER,
    arxiv="2102.13088",
    signature="logits_teacher_index",
)
class SelfDistill(LogitLoss):
    r"""One generation: :math:`\alpha\,\overline{(q - y)^2} + (1 - \alpha)\,\overline{(q - p)^2}` of softmax outputs.

    A fresh network learns from the labels and from the network of the generation before. It contains the task loss:
    in ``Distillation`` set ``ce_weight=0``. ``alpha`` 1 ignores the teacher.

    Use it over a few generations of one architecture; :func:`ground_truth_weight` estimates ``alpha``.

    Args:
        alpha: Weight of the labels in [0, 1].
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    needs_target = True

    def __init__(self, alpha: float = 0.35, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__(reduction, ignore_index)
        self.alpha = check_number("self_distill", "alpha", alpha, least=0, most=1)

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Mean squared differences over the classes."""
        assert y is not None
        q, p = z_s.softmax(dim=1), z_t.softmax(dim=1)
        hard = (q - F.one_hot(y, q.shape[1]).to(q)).square().mean(dim=1)
        return self.alpha * hard + (1 - self.alpha) * (q - p).square().mean(dim=1)


def ground_truth_weight(labels_only: Tensor, teacher_only: Tensor, target: Tensor) -> Tensor:
    r"""Returns the weight of the labels with the least squared error on held-out data, in [0, 1].

    :math:`\alpha^* = \mathrm{clip}(\langle y - b, a - b\rangle / \|a - b\|^2)` of held-out predictions a of a model
    trained on the labels alone and b of one trained on the teacher's outputs alone: exact where fits are linear in
    their targets (kernel ridge), two trainings instead of a grid for networks. Derived here; the paper's own
    expression was not found. Equal predictions give 1.

    Args:
        labels_only: a, any shape.
        teacher_only: b, the same.
        target: y, the same.

    Raises:
        LossplugError: Shapes that differ.
    """
    check_same_shape("self_distill", labels_only=labels_only, teacher_only=teacher_only, target=target)
    gap = labels_only - teacher_only
    square = gap.square().sum()
    if float(square) == 0:
        return torch.ones_like(square)
    return (((target - teacher_only) * gap).sum() / square).clamp(0, 1)


def kernel_generations(kernel: Tensor, y: Tensor, alpha: float, ridge: float, steps: int) -> list[Tensor]:
    r"""Returns the fitted values of each generation of kernel ridge regression, :math:`y_0 = y`.

    :math:`y_k = K (K + \lambda I)^{-1} (\alpha y + (1 - \alpha) y_{k-1})`, the first from the labels alone.

    Args:
        kernel: K [N, N].
        y: Targets [N] or [N, D].
        alpha: Weight of the labels in [0, 1].
        ridge: :math:`\lambda` > 0.
        steps: Generations >= 1.

    Raises:
        LossplugError: A number out of range.
    """
    check_number("self_distill", "alpha", alpha, least=0, most=1)
    check_number("self_distill", "ridge", ridge, above=0)
    check_number("self_distill", "steps", steps, least=1)
    smoother = torch.linalg.solve(kernel + ridge * torch.eye(len(kernel)).to(kernel), kernel, left=False)
    found = [smoother @ y]
    for _ in range(steps - 1):
        found.append(smoother @ (alpha * y + (1 - alpha) * found[-1]))
    return found


def kernel_limit(kernel: Tensor, y: Tensor, alpha: float, ridge: float) -> Tensor:
    r"""Returns what :func:`kernel_generations` converges to: one ridge regression with :math:`\lambda/\alpha`.

    :math:`\alpha K (\alpha K + \lambda I)^{-1} y`; 0 for ``alpha`` 0.
    """
    if alpha == 0:
        return torch.zeros_like(y)
    check_number("self_distill", "alpha", alpha, above=0, most=1)
    if ridge <= 0:
        raise LossplugError(f"ridge is {ridge}, allowed is (0, inf)", where="self_distill")
    return kernel @ torch.linalg.solve(kernel + ridge / alpha * torch.eye(len(kernel)).to(kernel), y)
