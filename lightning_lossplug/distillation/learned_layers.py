"""Which layers of the teacher teach which of the student, learned with the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.distillation.base import FeatureLoss, check_floating
from lightning_lossplug.distillation.layer_pairs import depth_prior
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number, upcast
from lightning_lossplug.registry import register, registry


@register(
    "loss",
    "learned_layers",
    family="distillation",
    paper="Cross-Layer Distillation with Semantic Calibration",
    arxiv="2012.03236",
    signature="features_teacher",
)
class LearnedLayers(FeatureLoss):
    r"""A loss of features between all layers of both sides, with learned weights for who teaches whom.

    :math:`\sum_i \sum_j a_{ij}\, d(s_i, t_j) + \rho \sum_i KL(a_i \| p_i)` with
    :math:`a_i = \mathrm{softmax}(\log p_i + \theta_i)`: every layer i of the student spreads a weight of 1 over the
    layers j of the teacher, beginning at p, a bell around the layer at the same depth. :math:`\theta` starts at 0 and
    learns with the student. Without ``pull`` the weights move to the layers that are easiest to follow; with it they
    have their minimum at :math:`a_{ij} \propto p_{ij} \exp(-d_{ij}/\rho)`. ``spread`` 0 is the mapping by depth,
    exactly, and stays it. The paper's weights come from the similarity of each batch; these belong to the network, so
    no parity is claimed.

    Use it where no one knows which layers correspond, with distances on one scale, as those of ``hidden_cosine`` and
    ``at``; those of ``fitnet`` favour layers of small numbers. In ``Distillation``: ``layers="learned"``.

    Args:
        loss: Name of the loss of features d, or an object.
        parameters: Its parameters, if given by name.
        spread: Width >= 0 of the bell to begin with, as a share of the teacher's depth.
        pull: Weight >= 0 of what holds the weights near where they began.
    """

    def __init__(
        self,
        loss: str | FeatureLoss = "hidden_cosine",
        parameters: dict[str, Any] | None = None,
        spread: float = 0.15,
        pull: float = 0.0,
    ) -> None:
        super().__init__()
        where = "learned_layers"
        inner = registry.create("loss", loss, **(parameters or {})) if isinstance(loss, str) else loss
        if not isinstance(inner, FeatureLoss) or isinstance(inner, LearnedLayers) or hasattr(inner, "read_teacher"):
            raise LossplugError(
                f"{loss!r} is no loss of any two layers' features",
                where=where,
                remedy="Use hidden_cosine, fitnet, at or rkd",
            )
        if type(inner).forward is not FeatureLoss.forward:
            raise LossplugError(f"{loss!r} takes more than two features", where=where, remedy="Use fitnet, at or rkd")
        self.inner = inner
        self.spread = check_number(where, "spread", spread, least=0)
        self.pull = check_number(where, "pull", pull, least=0)
        self.register_buffer("prior", None, persistent=False)
        self.register_parameter("offsets", None)
        self._pairs: list[tuple[int, int]] = []

    prior: Tensor | None
    offsets: nn.Parameter | None

    def start(self, prior: Tensor) -> None:
        """Sets where the weights begin: their logarithms [S, T], normalised in each row, -inf for never."""
        self.prior = prior.double()
        self.offsets = nn.Parameter(torch.zeros(prior.shape, device=prior.device))
        self._pairs = [(int(i), int(j)) for i, j in prior.isfinite().nonzero()]

    def build(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        """Makes the weights, at equal depths, unless :meth:`start` has, and what the inner loss trains."""
        if self.prior is None:
            self.start(depth_prior(len(student), len(teacher), self.spread))
        assert self.offsets is not None
        self.to(student[0].device)
        make = getattr(self.inner, "build", None)
        if make is not None:
            make([student[i] for i, _ in self._pairs], [teacher[j] for _, j in self._pairs])

    def log_weights(self) -> Tensor:
        """Returns the logarithms of the weights [S, T], in float64; -inf where they are 0 for good.

        Raises:
            LossplugError: The features have not been seen yet.
        """
        if self.prior is None or self.offsets is None:
            raise LossplugError("the weights don't exist yet", where="learned_layers", remedy="Call build() first")
        return (self.prior + self.offsets.double()).log_softmax(dim=1)

    def pair(self, student: Tensor, teacher: Tensor, position: int) -> Tensor:
        """The inner loss of one pair."""
        return self.inner.pair(student, teacher, position)

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        """Computes the loss of all layers of both sides.

        Raises:
            LossplugError: Other numbers of layers than before, or shapes the inner loss doesn't take.
        """
        ours = [student] if isinstance(student, Tensor) else list(student)
        theirs = [teacher] if isinstance(teacher, Tensor) else list(teacher)
        check_floating("learned_layers", **{f"feature {i}": f for i, f in enumerate((*ours, *theirs))})
        if self.prior is None:
            self.build(ours, theirs)
        assert self.prior is not None
        if (len(ours), len(theirs)) != self.prior.shape:
            raise LossplugError(
                f"{len(ours)} layers of the student and {len(theirs)} of the teacher, the weights are "
                f"{tuple(self.prior.shape)}",
                where="learned_layers",
            )
        log_a = self.log_weights()
        rows, columns = map(list, zip(*self._pairs, strict=True))
        with torch.autocast(ours[0].device.type, enabled=False):
            s, t = [upcast(f) for f in ours], [upcast(f.detach()) for f in theirs]
            distances = torch.stack([self.pair(s[i], t[j], k) for k, (i, j) in enumerate(self._pairs)])
            log_a = log_a[rows, columns]
            value = (log_a.exp().to(distances) * distances).sum()
            if self.pull:
                value = value + self.pull * (log_a.exp() * (log_a - self.prior[rows, columns])).sum().to(value)
        return value

    def logs(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Returns the mean teacher layer (from 0) of each of the student's layers, and the rows' mean entropy."""
        log_a = self.log_weights().detach()
        a = log_a.exp()
        mean = (a * torch.arange(a.shape[1], device=a.device)).sum(dim=1)
        entropy = -(a * log_a.nan_to_num(neginf=0.0)).sum(dim=1).mean()
        return {**{f"layers/{name}": m for name, m in zip(names, mean, strict=True)}, "layers_entropy": entropy}

    def table(self, student: Sequence[str], teacher: Sequence[str], most: int = 3) -> str:
        """Returns, line by line, a layer of the student and the teacher's layers with most weight."""
        width = max(map(len, student))
        lines = []
        for name, row in zip(student, self.log_weights().detach().exp().cpu(), strict=True):
            order = row.argsort(descending=True, stable=True)[:most].tolist()
            found = ", ".join(f"{teacher[j]} {row[j]:.2f}" for j in order if row[j] >= 0.005)
            lines.append(f"{name:<{width}}  <- {found}")
        return "\n".join(lines)
