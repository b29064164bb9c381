"""Online distillation with balanced divergences."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_lossplug.distillation.base import OnlineLoss, check_temperature
from lightning_lossplug.distillation.divergences import entropy_of_logs, kl_of_logs, log_probabilities
from lightning_lossplug.losses.checks import check_choice, check_number
from lightning_lossplug.registry import register

TeacherTerm = Literal["reverse", "forward", "none"]


@register(
    "loss",
    "bdkd",
    family="distillation",
    paper="BD-KD: Balancing the Divergences for Online Knowledge Distillation",
    arxiv="2212.12965",
    aliases=("bd_kd",),
    signature="online",
)
class BDKD(OnlineLoss):
    r"""BD-KD: forward and reverse KL of the student, balanced per sample by who is more certain.

    Student: :math:`\alpha_s T^2 [w_F KL(p\|q) + w_R KL(q\|p)]`, teacher: :math:`\alpha_t T^2 KL(q\|p)`, each in its own
    network (the other side is detached). With entropies H: :math:`w_F = \delta` where H(p) > H(q) (the student is
    over-confident), :math:`w_R = \delta` where H(q) > H(p), else 1. The weights have no gradient. Both networks also
    have their own task loss. With several teachers the student's terms are averaged over them, and a teacher's terms
    over the other networks.

    The paper's values of delta and T could not be found; the defaults here are choices, not its settings.

    Use it when teacher and student are trained together and the student's probabilities have to be right.

    Args:
        delta: Emphasis >= 1; 1 is the symmetric sum of both divergences.
        temperature: T > 0 of both sides.
        alpha_student: Weight >= 0 of the student's term.
        alpha_teacher: Weight >= 0 of the teacher's term.
        entropy_temperature: T of the entropies; None: ``temperature``.
        teacher_term: ``reverse``: KL(q‖p) in the teacher's p; ``forward``: KL(p‖q); ``none``.
        reverse_cap: Largest value of a row's reverse KL in the student's term (its gradient is 0 above); None: no cap.
        reduction: ``batchmean``, ``tokenmean``, ``pixelmean``, ``global_tokens`` or ``none``.
        ignore_index: Label of rows that are left out.
    """

    def __init__(
        self,
        delta: float = 2.0,
        temperature: float = 1.0,
        alpha_student: float = 1.0,
        alpha_teacher: float = 1.0,
        entropy_temperature: float | None = None,
        teacher_term: TeacherTerm = "reverse",
        reverse_cap: float | None = None,
        reduction: str = "batchmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(reduction, ignore_index)
        check_choice("bdkd", "teacher_term", teacher_term, get_args(TeacherTerm))
        self.delta = check_number("bdkd", "delta", delta, least=1)
        self.temperature = check_temperature("bdkd", temperature)
        self.alpha_student = check_number("bdkd", "alpha_student", alpha_student, least=0)
        self.alpha_teacher = check_number("bdkd", "alpha_teacher", alpha_teacher, least=0)
        if entropy_temperature is not None:
            check_temperature("bdkd", entropy_temperature, "entropy_temperature")
        if reverse_cap is not None:
            check_number("bdkd", "reverse_cap", reverse_cap, above=0)
        self.entropy_temperature, self.teacher_term, self.reverse_cap = entropy_temperature, teacher_term, reverse_cap

    def weights(self, z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the weights of the forward and the reverse part and the entropies of student and teacher, [R]."""
        t = self.temperature if self.entropy_temperature is None else self.entropy_temperature
        with torch.no_grad():
            h_s, h_t = (entropy_of_logs(log_probabilities(z, t)) for z in (z_s, z_t))
            # Entropies closer than rounding are a tie, or equal logits would be weighed by noise.
            near = 8 * torch.finfo(h_s.dtype).eps * (1 + h_s.abs())
            forward = torch.where(h_t - h_s > near, self.delta, 1.0).to(h_s)
            reverse = torch.where(h_s - h_t > near, self.delta, 1.0).to(h_s)
        return forward, reverse, h_s, h_t

    def student_rows(self, z_s: Tensor, z_t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the student's term [R] against one teacher, and what is worth logging."""
        w_f, w_r, h_s, h_t = self.weights(z_s, z_t)
        log_q, log_p = log_probabilities(z_s, self.temperature), log_probabilities(z_t.detach(), self.temperature)
        forward, reverse = kl_of_logs(log_p, log_q), kl_of_logs(log_q, log_p)
        logs = {"kd_fkl": forward, "kd_rkl": reverse, "frac_reverse_branch": w_r > w_f, "H_s": h_s, "H_t": h_t}
        if self.reverse_cap is not None:
            logs["frac_capped"] = reverse > self.reverse_cap
            reverse = reverse.clamp(max=self.reverse_cap)
        scale = self.alpha_student * self.temperature**2
        return scale * (w_f * forward + w_r * reverse), {k: v.detach().to(h_s).mean() for k, v in logs.items()}

    def terms(self, logits: list[Tensor], y: Tensor | None) -> tuple[list[Tensor], dict[str, Tensor], Tensor | None]:
        """The student's term against every teacher, every teacher's against the others."""
        z_s, *teachers = logits
        found = [self.student_rows(z_s, z_t) for z_t in teachers]
        rows = [torch.stack([r for r, _ in found]).mean(dim=0)]
        scale = self.alpha_teacher * self.temperature**2
        for z_t in teachers:
            log_p = log_probabilities(z_t, self.temperature)
            total = z_t.new_zeros(len(z_t))
            for z in logits:
                if z is z_t or self.teacher_term == "none":
                    continue
                log_q = log_probabilities(z.detach(), self.temperature)
                pair = kl_of_logs(log_q, log_p) if self.teacher_term == "reverse" else kl_of_logs(log_p, log_q)
                total = total + pair
            rows.append(scale * total / len(teachers))
        logs = {key: torch.stack([log[key] for _, log in found]).mean() for key in found[0][1]}
        return rows, logs, None
