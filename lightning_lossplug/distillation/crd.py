"""Contrast of embeddings against a memory of all samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.distillation.base import FeatureLoss, check_temperature
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number, upcast
from lightning_lossplug.registry import register


def nce(scores: Tensor, negatives: int, n_data: int) -> Tensor:
    r"""Returns the noise-contrastive loss of normalised scores [N, 1 + K], the positive first; sum over K, mean over N.

    :math:`-\log\frac{P_0}{P_0 + K/n + 10^{-7}} - \sum_k \log\frac{K/n}{P_k + K/n + 10^{-7}}`.
    """
    noise = negatives / n_data
    positive = scores[:, 0] / (scores[:, 0] + noise + 1e-7)
    others = noise / (scores[:, 1:] + noise + 1e-7)
    return -(positive.log().sum() + others.log().sum()) / len(scores)


@register(
    "loss",
    "crd",
    family="distillation",
    paper="Contrastive Representation Distillation",
    arxiv="1910.10699",
    signature="embeddings_teacher_index",
)
class CRD(FeatureLoss):
    r"""Contrastive representation distillation of penultimate features.

    Both features go through a linear layer to ``feat_dim`` and are normalised. Two memories hold the last embedding of
    every sample; a student's embedding is told from K others of the teacher's memory and the other way round, by
    :func:`nce` of :math:`\exp(v \cdot m / \tau)/Z`, with Z set from the first batch as its mean score times
    ``n_data``. The loss comes first, then the memories move. Gradients reach the current embeddings only. Memories, Z
    and the linear layers are in the state; every process has memories of its own. The benchmarks weigh it 0.8.

    In ``Distillation`` a sample is found again by its content, or by its id where the data set is wrapped in
    ``WithSampleIds`` (needed with random augmentation); negatives are then any other samples.

    Use it where features matter more than logits, with what the classifiers get (``layers={"input:fc": "input:fc"}``).

    Args:
        n_data: Number of training samples.
        feat_dim: Width of the embeddings.
        k: Negatives K per sample.
        temperature: :math:`\tau` > 0.
        momentum: In [0, 1), of the memories.
        labels: Class of every sample [n_data], for indices given by hand; negatives are of other classes only.
        student_dim: Width of the student's features; None: taken from the first ones (:meth:`build`).
        teacher_dim: Width of the teacher's; None: likewise.
    """

    needs_index = True

    memory_student: Tensor
    memory_teacher: Tensor
    z: Tensor
    known: Tensor
    count: Tensor

    def __init__(
        self,
        n_data: int,
        feat_dim: int = 128,
        k: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        labels: Tensor | None = None,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"n_data": n_data, "feat_dim": feat_dim, "k": k}.items():
            check_number("crd", name, value, least=1)
        self.temperature = check_temperature("crd", temperature)
        self.momentum = check_number("crd", "momentum", momentum, least=0, below=1)
        self.n_data, self.k = n_data, k
        self.feat_dim = feat_dim
        self.embeddings = nn.ModuleDict()
        for name, width in {"student": student_dim, "teacher": teacher_dim}.items():
            if width is not None:
                self.embeddings[name] = nn.Linear(width, feat_dim)
        for name in ("memory_student", "memory_teacher"):
            self.register_buffer(name, F.normalize(torch.rand(n_data, feat_dim) * 2 - 1, dim=1))
        self.register_buffer("z", torch.full((2,), -1.0))  # of the student's and the teacher's anchors; -1: not set
        self.register_buffer("known", torch.zeros(n_data, dtype=torch.int64))  # id of the sample in each place
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._places: dict[int, int] = {}
        self.labels = labels
        if labels is not None:
            if len(labels) != n_data:
                raise LossplugError(f"{len(labels)} labels for {n_data} samples", where="crd")
            self._by_class = labels.argsort(stable=True)
            counts = labels.bincount()
            if int(counts.max()) == n_data:
                raise LossplugError("all samples are of one class, so there are no negatives", where="crd")
            self._counts, self._starts = counts, counts.cumsum(0) - counts

    def build(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        """Makes the linear layers."""
        for name, features in {"student": student, "teacher": teacher}.items():
            if name not in self.embeddings:
                self.embeddings[name] = nn.Linear(features[0].flatten(1).shape[1], self.feat_dim).to(features[0].device)

    def places(self, sample_ids: Tensor) -> Tensor:
        """Returns the place [N] in the memories of samples by id; new ones get the next.

        Raises:
            LossplugError: There are more samples than ``n_data``.
        """
        if len(self._places) != int(self.count):  # restored
            self._places = {int(i): place for place, i in enumerate(self.known[: int(self.count)].tolist())}
        found = []
        for i in sample_ids.tolist():
            if i not in self._places:
                place = len(self._places)
                if place >= self.n_data:
                    raise LossplugError(
                        f"there are more samples than n_data={self.n_data}",
                        where="crd",
                        remedy="Give their number; with random augmentation wrap the data set: WithSampleIds(dataset)",
                    )
                self._places[i] = place
                self.known[place] = i
            found.append(self._places[i])
        self.count.fill_(len(self._places))
        return torch.tensor(found, device=self.known.device)

    def pair(self, student: Tensor, teacher: Tensor, position: int) -> Tensor:
        """There is no value of features alone."""
        raise LossplugError("needs the indices of the samples", where="crd", remedy="Call it with index=")

    def negatives(self, index: Tensor) -> Tensor:
        """Draws K samples [N, K] for each sample of a batch: any, or of other classes."""
        if self.labels is None:
            return torch.randint(self.n_data, (len(index), self.k), device=index.device)
        y = self.labels[index.cpu()]
        count, start = self._counts[y][:, None], self._starts[y][:, None]
        drawn = (torch.rand(len(index), self.k) * (self.n_data - count)).long()
        # samples lie sorted by class: those of the own class are jumped over
        place = torch.where(drawn >= start, drawn + count, drawn)
        return self._by_class[place].to(index.device)

    def forward(  # type: ignore[override]
        self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], index: Tensor
    ) -> Tensor:
        """Computes the loss of features [N, D] and [N, D'] of the samples ``index`` [N], then moves the memories.

        Raises:
            LossplugError: An index outside the data, another number of samples, or more than one pair of features.
        """
        if not isinstance(student, Tensor) or not isinstance(teacher, Tensor):
            if len(student) != 1 or len(teacher) != 1:
                raise LossplugError(f"{len(student)} features of the student, it takes one", where="crd")
            student, teacher = student[0], teacher[0]
        if len(self.embeddings) != 2:
            raise LossplugError("has no linear layers yet", where="crd", remedy="Call build(), or give the widths")
        if len(student) != len(teacher) or index.shape != student.shape[:1]:
            raise LossplugError(
                f"{len(student)} features of the student, {len(teacher)} of the teacher, {tuple(index.shape)} indices",
                where="crd",
            )
        if index.device.type == "cpu" and not 0 <= int(index.min()) <= int(index.max()) < self.n_data:
            raise LossplugError(f"index {int(index.max())} is outside the {self.n_data} samples", where="crd")
        with torch.autocast(student.device.type, enabled=False):
            v_s = F.normalize(self.embeddings["student"](upcast(student).flatten(1)), dim=1)
            v_t = F.normalize(self.embeddings["teacher"](upcast(teacher.detach()).flatten(1)), dim=1)
            chosen = torch.cat([index[:, None], self.negatives(index)], dim=1)
            value = self._contrast(v_s, self.memory_teacher, chosen, 0) + self._contrast(
                v_t, self.memory_student, chosen, 1
            )
        if self.training:
            self._move(self.memory_student, v_s, index)
            self._move(self.memory_teacher, v_t, index)
        return value

    def _contrast(self, anchors: Tensor, memory: Tensor, chosen: Tensor, side: int) -> Tensor:
        scores = ((memory[chosen] @ anchors[:, :, None]).squeeze(2) / self.temperature).exp()
        if float(self.z[side]) < 0:
            with torch.no_grad():
                self.z[side] = scores.mean() * self.n_data
        return nce(scores / self.z[side].clone(), self.k, self.n_data)

    @torch.no_grad()
    def _move(self, memory: Tensor, now: Tensor, index: Tensor) -> None:
        mixed = self.momentum * memory[index] + (1 - self.momentum) * now.to(memory)
        memory[index] = F.normalize(mixed, dim=1)
