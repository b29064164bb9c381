"""How far a student is behind its teacher, and where."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.metrics.reliability import bin_sums, calibration_error, check_least_one, confidence_bins

_CHUNK = 4096  # rows whose probabilities are held at once
SIDES = ("student", "teacher")


class CapacityGap(Metric):
    r"""Student and teacher side by side on the same samples: accuracy, calibration, agreement, divergence.

    :meth:`compute` returns, as scalars in [0, 1] where not said otherwise:

    * ``agreement``: share of rows with the same likeliest class;
    * ``kl``: mean :math:`KL(p_t \| p_s)` at T = 1, in nats, and ``reverse_kl``: mean :math:`KL(p_s \| p_t)`;
    * with labels also ``student_accuracy``, ``teacher_accuracy``, ``gap`` (teacher's minus student's), ``lost`` and
      ``won``: share of rows only the teacher, or only the student, has right (``gap`` is their difference);
      ``student_ece``, ``teacher_ece``: expected calibration errors; ``student_nll``, ``teacher_nll`` in nats.

    :meth:`per_class`, :meth:`per_confidence` and :meth:`curve` say where. States are sums, over processes too.

    Args:
        bins: Bins of the confidence, >= 1.
        classes: Count per class; None: not (vocabularies).
        ignore_index: Label of rows that don't count.
        **options: Given to ``torchmetrics.Metric``.

    Raises:
        LossplugError: Numbers below 1.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    rows: Tensor
    labelled: Tensor
    bin_state: Tensor
    class_state: Tensor
    confidence_state: Tensor

    def __init__(self, bins: int = 15, classes: int | None = None, ignore_index: int = -100, **options: Any) -> None:
        super().__init__(**options)
        self.bins = check_least_one("CapacityGap", "bins", bins)
        self.classes = None if classes is None else check_least_one("CapacityGap", "classes", classes)
        self.ignore_index = ignore_index
        states = {
            "rows": (4,),  # rows, agreeing ones, KL, reverse KL
            "labelled": (7,),  # rows, the student's hits, the teacher's, only the teacher's, only the student's, 2 NLL
            "bin_state": (2, 3, self.bins),
            "class_state": (3, self.classes or 1),  # rows, the student's hits, the teacher's
            "confidence_state": (3, self.bins),  # the same per bin of the teacher's confidence
        }
        for name, shape in states.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> None:
        """Counts logits [..., C] of one shape, at class indices [...] where there are any, on the rows of the mask.

        Raises:
            LossplugError: Shapes that don't fit, or more classes than ``classes``.
        """
        rows = student.shape[:-1]
        odd = student.shape != teacher.shape or any(x is not None and x.shape != rows for x in (target, mask))
        if odd:
            given = [student.shape, teacher.shape, *(x.shape for x in (target, mask) if x is not None)]
            raise LossplugError(
                "got " + ", ".join(str(tuple(shape)) for shape in given),
                where="CapacityGap",
                remedy="Logits of both need one shape, targets and mask that of the rows",
            )
        if self.classes is not None and student.shape[-1] > self.classes:
            raise LossplugError(f"{student.shape[-1]} classes, expected {self.classes}", where="CapacityGap")
        keep = torch.ones(rows, dtype=torch.bool, device=student.device) if mask is None else mask.bool()
        if target is not None:
            keep = keep & (target != self.ignore_index)
        parts = [student[keep], teacher[keep]] + ([] if target is None else [target[keep]])
        for part in zip(*(x.split(_CHUNK) for x in parts), strict=True):
            self._count(*part)

    def _count(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> None:
        logs = [z.float().log_softmax(dim=-1) for z in (student, teacher)]
        log_s, log_t = logs
        (sure_s, top_s), (sure_t, top_t) = (log_p.max(dim=-1) for log_p in logs)
        difference = (log_t - log_s).nan_to_num(nan=0.0)  # classes that are impossible for both
        kl = torch.where(log_t == -torch.inf, 0.0, log_t.exp() * difference).sum()
        reverse = torch.where(log_s == -torch.inf, 0.0, -log_s.exp() * difference).sum()
        count = kl.new_tensor(float(len(log_s)))
        self.rows += torch.stack([count, (top_s == top_t).sum().to(kl), kl, reverse]).to(self.rows)
        if target is None:
            return
        right_s, right_t = top_s == target, top_t == target
        hits = [right_s, right_t, right_t & ~right_s, right_s & ~right_t]
        losses = [-log_p.gather(-1, target[:, None]).sum() for log_p in logs]
        sums = [count, *(h.sum().to(kl) for h in hits), *losses]
        self.labelled += torch.stack(sums).to(self.labelled)
        for k, (sure, right) in enumerate(((sure_s, right_s), (sure_t, right_t))):
            self.bin_state[k] += bin_sums(sure.exp(), right, self.bins).to(self.bin_state)
        table = torch.stack([torch.ones_like(sure_s), right_s, right_t]).double()
        place = confidence_bins(sure_t.exp(), self.bins)
        self.confidence_state += table.new_zeros(3, self.bins).index_add_(1, place, table).to(self.confidence_state)
        if self.classes is not None:
            self.class_state += table.new_zeros(3, self.classes).index_add_(1, target, table).to(self.class_state)

    def compute(self) -> dict[str, Tensor]:
        """Returns the numbers above; NaN before the first update, without those that need labels where none came."""
        total, agree, kl, reverse = self.rows
        found = {"agreement": agree / total, "kl": kl / total, "reverse_kl": reverse / total}
        if self.labelled[0] > 0:
            count, right_s, right_t, lost, won, nll_s, nll_t = self.labelled
            found |= {"student_accuracy": right_s / count, "teacher_accuracy": right_t / count}
            found |= {"gap": (right_t - right_s) / count, "lost": lost / count, "won": won / count}
            found |= {f"{side}_ece": calibration_error(sums) for side, sums in zip(SIDES, self.bin_state, strict=True)}
            found |= {"student_nll": nll_s / count, "teacher_nll": nll_t / count}
        return {name: value.float() for name, value in found.items()}

    def per_class(self) -> dict[str, Tensor]:
        """Returns ``count`` and both accuracies of each class [C]; NaN where there was no row.

        Raises:
            LossplugError: Classes are not counted.
        """
        if self.classes is None:
            raise LossplugError("counts no classes", where="CapacityGap", remedy="Say classes=NUMBER")
        return _accuracies(self.class_state)

    def per_confidence(self) -> dict[str, Tensor]:
        """Returns ``count`` and both accuracies of each bin [B] of the teacher's confidence."""
        return _accuracies(self.confidence_state)

    def curve(self, side: str) -> dict[str, Tensor]:
        """Returns ``count``, mean ``confidence`` and ``accuracy`` of each bin of ``student`` or ``teacher``."""
        count, confidence, hits = self.bin_state[SIDES.index(side)]
        return {"count": count, "confidence": confidence / count, "accuracy": hits / count}


def _accuracies(state: Tensor) -> dict[str, Tensor]:
    count, student, teacher = state
    return {"count": count, "student": student / count, "teacher": teacher / count}
