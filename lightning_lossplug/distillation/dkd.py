"""Distillation with the target class decoupled from the others."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.distillation.base import LogitLoss, check_temperature
from lightning_lossplug.distillation.divergences import kl_of_logs, log_probabilities
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register


@register(
    "loss",
    "dkd",
    family="distillation",
    paper="Decoupled Knowledge Distillation",
    arxiv="2203.08679",
    signature="logits_teacher_index",
)
class DKD(LogitLoss):
    r"""Decoupled distillation: :math:`T^2 (\alpha\,TCKD + \beta\,NCKD)`.

    TCKD is the KL of (target, rest), NCKD the KL of the distributions over the classes that are not the target. KL of
    all classes is :math:`TCKD + (1 - p_y) NCKD`: a confident teacher hides NCKD there, ``beta`` brings it back. The
    warm-up of the paper (20 epochs) is a schedule of the weight: ``Linear(0, 1, finish=20, unit="epochs")``. At the
    logits its gradient can be T times ``beta`` (32) times that of a cross-entropy: where training diverges, clip
    gradients or lower the learning rate.

    Use it where the teacher is confident: beta 8 on CIFAR-100, 0.5 to 2 with T = 1 on ImageNet.

    Args:
        alpha: Weight >= 0 of TCKD.
        beta: Weight >= 0 of NCKD.
        temperature: T > 0 of both sides.
        t2_scale: Multiply by :math:`T^2`.
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    needs_target = True

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        t2_scale: bool = True,
        reduction: str = "batchmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(reduction, ignore_index)
        self.alpha = check_number("dkd", "alpha", alpha, least=0)
        self.beta = check_number("dkd", "beta", beta, least=0)
        self.temperature, self.t2_scale = check_temperature("dkd", temperature), t2_scale

    def parts(self, z_s: Tensor, z_t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns TCKD and NCKD [R], without weights."""
        if z_s.shape[1] < 2:
            raise LossplugError("needs at least 2 classes", where="dkd")
        target = torch.nn.functional.one_hot(y, z_s.shape[1]).bool()
        binary, others = [], []
        for z in (z_t, z_s):
            log_p = log_probabilities(z, self.temperature)
            rest = log_p.masked_fill(target, -torch.inf)
            # The mass of the others by logsumexp: 1 - p_y would round to 0.
            mass = rest.logsumexp(dim=1)
            binary.append(torch.stack([log_p.gather(1, y[:, None]).squeeze(1), mass], dim=1))
            others.append(log_probabilities(rest))
        return kl_of_logs(*binary), kl_of_logs(*others)

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Weighted sum of both parts."""
        assert y is not None
        tckd, nckd = self.parts(z_s, z_t, y)
        scale = self.temperature**2 if self.t2_scale else 1.0
        return scale * (self.alpha * tckd + self.beta * nckd)
