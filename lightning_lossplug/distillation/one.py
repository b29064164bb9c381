"""Branches of one network and their gated ensemble."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.distillation.base import DistillationLoss, check_temperature, to_rows
from lightning_lossplug.distillation.divergences import kl_of_logs, log_probabilities
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number, upcast
from lightning_lossplug.registry import register


@register(
    "loss",
    "one",
    family="distillation",
    paper="Knowledge Distillation by On-the-Fly Native Ensemble",
    arxiv="1806.04606",
    signature="branches_gate_index",
)
class ONE(DistillationLoss):
    r"""On-the-fly native ensemble: B branches of one network learn from their gated sum :math:`z_e = \sum_i g_i z_i`.

    :math:`\sum_i CE(z_i, y) + CE(z_e, y) + r \sum_i T^2 KL(p_e^T \| p_i^T)`, the ensemble detached in the last part;
    ramp :math:`r = e^{-5 (1 - e/E)^2}` over the first E epochs, then 1. This is the whole loss, task part included; the
    network has to return branches and gate.

    Use it in a network written with branches; it needs no second network.

    Args:
        temperature: T > 0 of both sides.
        rampup_epochs: E >= 0.
    """

    needs_target = True

    def __init__(self, temperature: float = 3.0, rampup_epochs: float = 80.0) -> None:
        super().__init__()
        self.temperature = check_temperature("one", temperature)
        self.rampup_epochs = check_number("one", "rampup_epochs", rampup_epochs, least=0)

    def ramp(self, epoch: float) -> float:
        """Returns r at an epoch >= 0."""
        left = 1 - epoch / self.rampup_epochs if epoch < self.rampup_epochs else 0.0
        return math.exp(-5 * left**2)

    def forward(self, branches: Sequence[Tensor], gate: Tensor, target: Tensor, epoch: float | None = None) -> Tensor:
        """Computes the loss.

        Args:
            branches: Logits [N, C] of each branch.
            gate: Weights [N, B] of the branches; rows sum to 1.
            target: Class indices [N].
            epoch: For the ramp; None: after it.

        Raises:
            LossplugError: Shapes that don't fit.
        """
        if not branches or gate.shape != (branches[0].shape[0], len(branches)):
            raise LossplugError(f"the gate has shape {tuple(gate.shape)} for {len(branches)} branches", where="one")
        with torch.autocast(gate.device.type, enabled=False):
            batch = to_rows("one", branches, target, None, needs_target=True, names=("first branch", "other branch"))
            g = upcast(gate) if batch.kept is None else upcast(gate).index_select(0, batch.kept)
            y = batch.target
            assert y is not None
            ensemble = torch.einsum("nb,bnc->nc", g, torch.stack(batch.logits))
            task = torch.stack([F.cross_entropy(z, y) for z in (*batch.logits, ensemble)]).sum()
            log_e = log_probabilities(ensemble.detach(), self.temperature)
            apart = [kl_of_logs(log_e, log_probabilities(z, self.temperature)).mean() for z in batch.logits]
            ramp = 1.0 if epoch is None else self.ramp(epoch)
            return task + ramp * self.temperature**2 * torch.stack(apart).sum()
