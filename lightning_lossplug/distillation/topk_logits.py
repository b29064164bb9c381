"""Teachers stored as their few largest probabilities per row."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_lossplug.distillation.base import (
    DistillationLoss,
    check_reduction,
    check_temperature,
    reduce_rows,
    to_rows,
)
from lightning_lossplug.distillation.divergences import log_probabilities
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_choice, upcast
from lightning_lossplug.registry import register

Missing = Literal["tail", "zero"]


def top_logits(logits: Tensor, k: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    """Returns the ids [..., k] and log-probabilities [..., k] of the largest entries, to store.

    Raises:
        LossplugError: ``k`` is not in [1, classes].
    """
    if not 1 <= k <= logits.shape[-1]:
        raise LossplugError(f"k is {k}, allowed is [1, {logits.shape[-1]}]", where="topk_logits")
    found = upcast(logits).log_softmax(dim=-1).topk(k, dim=-1)
    return found.indices, found.values.to(dtype)


@register(
    "loss",
    "topk_logits",
    family="distillation",
    paper="DistillKit (stored top-k logits of a teacher)",
    signature="logits_ids_logprobs",
)
class TopKLogits(DistillationLoss):
    r"""KL to a teacher of which k probabilities per row are stored, :math:`T^2` not applied.

    ``tail``: the mass m the teacher gives to all others is one more class,
    :math:`\sum_k p_k \log\frac{p_k}{q_k} + m \log\frac{m}{1 - \sum_k q_k}`; never more than the full KL, growing to it
    with k. ``zero``: the k probabilities are scaled to sum to 1, against the student's full distribution. With a
    temperature the stored probabilities and m are raised to 1/T and renormalised, which is exact only for ``zero``.

    Use it with a teacher that was run once over the data; k of 64 to 128 for language models.

    Args:
        missing: What becomes of the mass that was not stored: ``tail`` or ``zero``.
        temperature: T > 0 of both sides.
        reduction: ``tokenmean``, ``batchmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    def __init__(
        self,
        missing: Missing = "tail",
        temperature: float = 1.0,
        reduction: str = "tokenmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        check_choice("topk_logits", "missing", missing, get_args(Missing))
        self.missing, self.temperature = missing, check_temperature("topk_logits", temperature)
        self.reduction, self.ignore_index = check_reduction("topk_logits", reduction), ignore_index

    def forward(
        self,
        student: Tensor,
        ids: Tensor,
        log_probs: Tensor,
        target: Tensor | None = None,
        *,
        rest: Tensor | None = None,
        mask: Tensor | None = None,
        denominator: Tensor | float | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            student: Logits [..., V].
            ids: Stored classes [..., k].
            log_probs: Their log-probabilities [..., k] at temperature 1.
            target: Class indices [...], for ``ignore_index``.
            rest: Log of the mass of all other classes [..., 1]; None: what the stored ones leave, which is less exact.
            mask: Rows to keep, bool [...].
            denominator: What the sum is divided by instead of the number of kept rows.

        Raises:
            LossplugError: Shapes that don't fit, or an id outside the student's classes (checked on CPU).
        """
        k = ids.shape[-1]
        if ids.shape != log_probs.shape or ids.shape[:-1] != student.shape[:-1] or not 1 <= k <= student.shape[-1]:
            raise LossplugError(
                f"ids {tuple(ids.shape)} and log_probs {tuple(log_probs.shape)} don't fit logits "
                f"{tuple(student.shape)}",
                where="topk_logits",
            )
        if ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= student.shape[-1]:
            raise LossplugError(
                f"a stored id is {int(ids.max())}, the student has {student.shape[-1]} classes",
                where="topk_logits",
                remedy="The store was made with a larger vocabulary",
            )
        with torch.autocast(student.device.type, enabled=False):
            batch = to_rows("topk_logits", (student,), target, mask, ignore_index=self.ignore_index)
            z = batch.logits[0]
            ids, stored = ids.reshape(-1, k), log_probs.reshape(-1, k).to(z)
            if batch.kept is not None:
                ids, stored = ids.index_select(0, batch.kept), stored.index_select(0, batch.kept)
            rest = None if rest is None else rest.reshape(-1, 1).to(z)
            if rest is not None and batch.kept is not None:
                rest = rest.index_select(0, batch.kept)
            rows = self._rows(z, ids, stored, rest)
            return reduce_rows("topk_logits", rows, batch, self.reduction, None, denominator)

    def _rows(self, z: Tensor, ids: Tensor, stored: Tensor, mass: Tensor | None) -> Tensor:
        log_q = log_probabilities(z, self.temperature)
        ours = log_q.gather(1, ids)
        if self.missing == "tail":
            if mass is None:
                mass = (1 - stored.exp().sum(dim=1, keepdim=True)).clamp(min=0).log()
            rest = log_q.scatter(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True)
            # With every class stored there is no rest, and a mass of rounding must not be compared with it.
            stored = torch.cat([stored, mass.masked_fill(rest == -torch.inf, -torch.inf)], dim=1)
            ours = torch.cat([ours, rest.clamp(min=torch.finfo(z.dtype).min / 4)], dim=1)
        log_p = log_probabilities(stored, self.temperature)
        return (log_p.exp() * (log_p - ours)).sum(dim=1)
