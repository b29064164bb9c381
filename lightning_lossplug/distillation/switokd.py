"""Online distillation that lets the teacher wait."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.distillation.base import OnlineLoss, check_temperature
from lightning_lossplug.distillation.divergences import kl_of_logs, log_probabilities
from lightning_lossplug.registry import register


@register(
    "loss",
    "switokd",
    family="distillation",
    paper="Switchable Online Knowledge Distillation (ECCV 2022)",
    signature="online_index",
)
class SwitOKD(OnlineLoss):
    r"""Switchable online distillation: the teacher pauses while the student is too far behind.

    With batch means G of :math:`\|p_s - p_t\|_1`, :math:`l_s`, :math:`l_t` of :math:`\|p - \mathrm{onehot}\|_1` and
    :math:`r = e^{-l_t/(l_s + l_t)}`: if :math:`G > l_s - r\,l_t` and :math:`l_t < l_s` the student alone learns, with
    KL(p‖q) (expert mode); else the teacher learns too, with KL(q‖p). One decision per batch; between processes the
    three means are averaged first, so that all decide the same.

    Use it when the teacher is much larger than the student.

    Args:
        temperature: T > 0 of the divergences (the paper has 1); the decision is at 1.
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    needs_target = True
    single = True

    def __init__(self, temperature: float = 1.0, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__(reduction, ignore_index)
        self.temperature = check_temperature("switokd", temperature)

    @torch.no_grad()
    def decision(self, z_s: Tensor, z_t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns whether the teacher learns, the gap G and its threshold."""
        q, p = z_s.softmax(dim=1), z_t.softmax(dim=1)
        one_hot = F.one_hot(y, q.shape[1]).to(q)
        sums = torch.stack([(q - p).abs().sum(), (q - one_hot).abs().sum(), (p - one_hot).abs().sum()])
        sums = torch.cat([sums, sums.new_tensor([float(len(q))])])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        gap, l_s, l_t = (sums[:3] / sums[3].clamp(min=1)).unbind()
        threshold = l_s - torch.exp(-l_t / (l_s + l_t).clamp(min=torch.finfo(q.dtype).tiny)) * l_t
        return ~((gap > threshold) & (l_t < l_s)), gap, threshold

    def terms(self, logits: list[Tensor], y: Tensor | None) -> tuple[list[Tensor], dict[str, Tensor], Tensor | None]:
        """The student's forward KL; the teacher's, times 0 in expert mode so that it stays in the graph."""
        assert y is not None
        z_s, z_t = logits
        learn, gap, threshold = self.decision(z_s, z_t, y)
        log_q, log_p = log_probabilities(z_s, self.temperature), log_probabilities(z_t, self.temperature)
        scale = self.temperature**2
        student = scale * kl_of_logs(log_p.detach(), log_q)
        teacher = scale * kl_of_logs(log_q.detach(), log_p) * learn
        logs = {"kd_fkl": student.detach().mean(), "gap": gap, "threshold": threshold, "teacher_learns": learn.float()}
        return [student, teacher], logs, learn
