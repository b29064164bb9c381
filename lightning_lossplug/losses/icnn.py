"""ICNN: minus the logarithm of how well the nearest neighbours of every sample agree with its class."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.embeddings import check_range
from lightning_lossplug.losses.episode import EpisodeLoss, distances
from lightning_lossplug.registry import register

EPS = 1e-7


@register(
    "loss",
    "icnn",
    family="metric",
    paper="SuSana Distancia is all you need: Enforcing class separability in metric learning via two novel "
    "distance-based loss functions for few-shot image classification",
    arxiv="2305.09062",
    signature="embeddings_labels",
    gather=False,
)
class ICNN(EpisodeLoss):
    r"""Inter- and intra-class nearest-neighbour score as a loss, :math:`-\log(\mathrm{score})` (arXiv 2305.09062).

    For few-shot episodes, added to a base loss. Of each query take the ``ipc`` nearest targets, distances :math:`d`.
    With :math:`n_i` the smallest distance to another class among them, :math:`r = d/n_i` over
    :math:`\max(1, \max_{row} r)`; over the first ``k`` neighbours

    * :math:`\lambda_s` = 1 - the mean over rows of the mean :math:`r` of the row's own class,
    * :math:`\lambda_d` = the mean over rows of the mean :math:`d/\max d` of other classes (1 if there are none),
    * :math:`\gamma` = the share of the own class (1 if k + 2 reaches the number of targets),

    and score :math:`= ((\lambda_s + \lambda_d)/2 + \gamma)/2`, in (0, 1]. Denominators carry the 1e-7 of the released
    code. Which neighbours are nearest, and :math:`\gamma`, have no gradient. Fewer than three targets have no score:
    the loss is then 0. Always a scalar.

    Shapes: queries x [Q, D], y [Q]; targets ref_x [S, D], ref_y [S], or the batch itself.

    Args:
        k: Neighbours that are scored, >= 1; lowered to S - 2 when larger.
        ipc: Neighbours that are looked at for :math:`n_i`, k <= ipc < S: the samples per class. None: k + 1.
        drop_self: Leave the nearest target out also when the targets are a set of their own, as the released code
            does; where the targets are the queries it is always left out, being the query.
        normalize: L2-normalise all embeddings inside; off, as published.
    """

    def __init__(self, k: int = 4, ipc: int | None = None, drop_self: bool = True, normalize: bool = False) -> None:
        super().__init__(normalize)
        check_range("icnn", "k", k, ">= 1", k >= 1)
        if ipc is not None:
            check_range("icnn", "ipc", ipc, f">= k = {k}", ipc >= k)
        self.k, self.ipc, self.drop_self = k, ipc, drop_self

    def episode_loss(self, x: Tensor, y: Tensor, ref_x: Tensor, ref_y: Tensor, own: bool) -> Tensor:
        """Minus the log of the score."""
        targets = ref_x.shape[0]
        if targets < 3 or x.shape[0] == 0:
            return x.sum() * 0 + ref_x.sum() * 0
        k = min(self.k, targets - 2)
        ipc = k + 1 if self.ipc is None else self.ipc
        skip = 1 if own or self.drop_self else 0
        if ipc + skip > targets:
            raise LossplugError(f"ipc is {ipc}, but there are only {targets} targets", where="icnn", remedy="Lower ipc")
        d, index = distances(x, ref_x).topk(ipc + skip, dim=1, largest=False)
        d = d[:, skip:]
        same = ref_y[index[:, skip:]] == y[:, None]

        nearest_other = d.masked_fill(same, torch.inf).amin(dim=1, keepdim=True)
        d, same = d[:, :k], same[:, :k]
        ratio = d / (nearest_other + EPS)
        ratio = ratio / ratio.amax(dim=1, keepdim=True).clamp_min(1)
        far = torch.where(same, 0, d)
        inter = mean_of_rows(far / (far.max() + EPS), ~same)
        inter = torch.where(same.all(), (inter - 1).abs(), inter)
        intra = 1 - mean_of_rows(ratio, same)
        agreement = same.to(d).mean() if k + 2 < targets else 1.0
        return -(((intra + inter) / 2 + agreement) / 2).log()


def mean_of_rows(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean, over rows with an entry in ``mask``, of the row's mean over those entries."""
    count = mask.sum(dim=1)
    rows = torch.where(mask, values, 0).sum(dim=1) / (count + EPS)
    return rows.sum() / ((count > 0).sum() + EPS)
