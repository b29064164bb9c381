"""Self-distillation between views of an image, without labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lossplug.distillation.base import DistillationLoss, check_temperature
from lightning_lossplug.distillation.networks import several_processes
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number, upcast
from lightning_lossplug.registry import register


@register(
    "loss",
    "dino",
    family="distillation",
    paper="Emerging Properties in Self-Supervised Vision Transformers",
    arxiv="2104.14294",
    signature="views_teacher_views",
)
class DINO(DistillationLoss):
    r"""DINO: cross-entropy of each student view to each other teacher view, the teacher sharpened and centred.

    Mean over the pairs (teacher view i, student view j ≠ i) and samples of
    :math:`-\sum_k \mathrm{softmax}((t_i - c)/\tau_t)_k \log \mathrm{softmax}(s_j/\tau_s)_k`. In training mode the
    centre c moves to :math:`m c + (1 - m)` times the mean teacher output (of all processes) after each call. Student
    views start with the teacher's views, in the same order. The centre is a buffer: it is saved with the state.

    Use it with an averaged teacher, two large and several small crops.

    Args:
        out_dim: Width of the outputs.
        student_temperature: :math:`\tau_s` > 0.
        teacher_temperature: :math:`\tau_t` > 0; settable, for a warm-up.
        center_momentum: m in [0, 1].
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        check_number("dino", "out_dim", out_dim, least=1)
        self.student_temperature = check_temperature("dino", student_temperature, "student_temperature")
        self.teacher_temperature = check_temperature("dino", teacher_temperature, "teacher_temperature")
        self.center_momentum = check_number("dino", "center_momentum", center_momentum, least=0, most=1)
        self.register_buffer("center", torch.zeros(out_dim))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Computes the loss of student views, each [N, K], and teacher views, each [N, K].

        Raises:
            LossplugError: Fewer than two student views, or shapes that differ.
        """
        shapes = {tuple(x.shape) for x in (*student, *teacher)}
        if len(student) < 2 or not teacher or len(shapes) != 1 or student[0].shape[-1] != self.center.numel():
            raise LossplugError(
                f"{len(student)} student and {len(teacher)} teacher views of shapes {sorted(shapes)}",
                where="dino",
                remedy=f"Give at least two student views, all [N, {self.center.numel()}]",
            )
        with torch.autocast(student[0].device.type, enabled=False):
            outputs = [upcast(t.detach()) for t in teacher]
            center = self.center.to(outputs[0])
            log_p = [(upcast(s) / self.student_temperature).log_softmax(dim=-1) for s in student]
            q = [((t - center) / self.teacher_temperature).softmax(dim=-1) for t in outputs]
            pairs = [-(q[i] * log_p[j]).sum(dim=-1).mean() for i in range(len(q)) for j in range(len(log_p)) if i != j]
            value = torch.stack(pairs).mean()
            if self.training:
                self._move(torch.cat(outputs).mean(dim=0))
        return value

    @torch.no_grad()
    def _move(self, mean: Tensor) -> None:
        if several_processes():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.center.mul_(self.center_momentum).add_(mean.to(self.center), alpha=1 - self.center_momentum)
