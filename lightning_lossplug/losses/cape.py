"""CaPE: training on the empirical probabilities of samples with similar predictions."""

from __future__ import annotations

import itertools
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import ClassificationLoss, check_index, check_parameter
from lightning_lossplug.registry import register

Mode = Literal["bin", "kde"]


def bin_targets(predictions: Tensor, labels: Tensor, n_bins: int) -> Tensor:
    """Returns for each sample the mean label of its bin; the bins split the sorted predictions [N] evenly."""
    order = predictions.argsort(stable=True)
    size = len(order)
    edges = [i * size // n_bins for i in range(n_bins + 1)]
    means = [labels[order[a:b]].to(predictions.dtype).mean() for a, b in itertools.pairwise(edges) if b > a]
    counts = torch.tensor([b - a for a, b in itertools.pairwise(edges) if b > a], device=order.device)
    return torch.empty_like(predictions).scatter_(0, order, torch.stack(means).repeat_interleave(counts))


def kde_targets(predictions: Tensor, labels: Tensor, sigma: float, window: int, chunk: int = 65536) -> Tensor:
    """Returns for each sample the mean label of the ``2 window`` samples next in rank, itself included.

    Weighted by a normal density of standard deviation ``sigma`` in the difference of the predictions [N].
    """
    order = predictions.argsort(stable=True)
    p, y = predictions[order], labels[order].to(predictions.dtype)
    offsets = torch.arange(-window, window, device=p.device)
    smooth = torch.empty_like(p)
    rows = max(chunk * 64 // (2 * window), 1)  # bounds the [rows, 2 window] temporaries
    for start in range(0, len(p), rows):
        centre = torch.arange(start, min(start + rows, len(p)), device=p.device)
        near = centre[:, None] + offsets
        inside = (near >= 0) & (near < len(p))
        near = near.clamp(0, len(p) - 1)
        w = torch.where(inside, torch.exp(-((p[near] - p[centre, None]) ** 2) / (2 * sigma**2)), 0)
        smooth[centre] = (w * y[near]).sum(dim=1) / w.sum(dim=1)
    return torch.empty_like(p).scatter_(0, order, smooth)


@register(
    "loss",
    "cape",
    family="classification",
    paper="Deep Probability Estimation",
    arxiv="2111.10734",
    signature="logits_index",
    soft=True,
    classes=2,
    needs=("index", "dataset_size"),
    stateful=True,
)
class CaPE(ClassificationLoss):
    r"""Calibrated probability estimation for two classes (arXiv 2111.10734).

    Cross-entropy :math:`-t \log p - (1 - t) \log(1 - p)` whose targets t are, in every (k+1)-th epoch, not the labels
    but the share of positives among training samples with similar predictions. After early stopping of an ordinary
    training, in each epoch::

        if loss.probability_epoch:
            loss.update(p, y)  # predictions of class 1 and labels of the whole training set, in dataset order
        ...  # train with loss(logits, y, index=index)
        loss.advance_epoch()

    Predict for ``update`` in eval mode on data without augmentation, and gather the ranks' predictions first. Targets
    and epoch are saved with the module; in eval mode, and without ``dataset_size``, the loss is plain cross-entropy
    against labels or probabilities.

    When: the probability itself is wanted (weather, survival), and there is no ground truth for it.

    Args:
        mode: ``bin``: mean label of ``n_bins`` bins; ``kde``: a running mean with a Gaussian weight.
        n_bins: Bins, >= 1; 5 to 10.
        sigma: Width of the Gaussian in probability, > 0; 0.05 to 0.1.
        window: Ranks on either side, >= 1; 100 to 500.
        k: Epochs on labels after each epoch on probabilities, >= 0; 2 to 5.
        dataset_size: Number of training samples.
        weight: Class weights [2].
        ignore_index: Label of rows that are left out.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    accepts_soft = True
    row_inputs = ("positive",)

    targets: Tensor | None
    epoch: Tensor

    def __init__(
        self,
        mode: str = "bin",
        n_bins: int = 10,
        sigma: float = 0.1,
        window: int = 500,
        k: int = 5,
        dataset_size: int | None = None,
        weight: Tensor | list[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        check_parameter(mode in get_args(Mode), "cape", "mode", mode, "bin or kde")
        check_parameter(n_bins >= 1, "cape", "n_bins", n_bins, ">= 1")
        check_parameter(sigma > 0, "cape", "sigma", sigma, "> 0")
        check_parameter(window >= 1, "cape", "window", window, ">= 1")
        check_parameter(k >= 0, "cape", "k", k, ">= 0")
        check_parameter(dataset_size is None or dataset_size > 0, "cape", "dataset_size", dataset_size, "> 0 or None")
        self.mode, self.n_bins, self.sigma, self.window, self.k = mode, n_bins, sigma, window, k
        self.register_buffer("targets", None if dataset_size is None else torch.full((dataset_size,), torch.nan))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    @property
    def probability_epoch(self) -> bool:
        """Whether this epoch trains on probabilities."""
        return int(self.epoch) % (self.k + 1) == 0

    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Computes the targets from predictions of class 1 and labels of all training samples.

        Raises:
            LossplugError: No ``dataset_size`` was set, or the number of samples differs from it.
        """
        if self.targets is None or predictions.shape != self.targets.shape or labels.shape != self.targets.shape:
            size = None if self.targets is None else self.targets.numel()
            raise LossplugError(
                f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} for dataset_size {size}",
                where="cape",
                remedy="Give one prediction and one label per training sample, in dataset order",
            )
        p, y = predictions.to(self.targets), labels.to(self.targets.device)
        kde = self.mode == "kde"
        self.targets.copy_(kde_targets(p, y, self.sigma, self.window) if kde else bin_targets(p, y, self.n_bins))

    def advance_epoch(self) -> None:
        """Counts an epoch."""
        self.epoch += 1

    def classes(self, z: Tensor) -> int:
        """Two; the method defines no more."""
        if z.shape[1] != 2:
            raise LossplugError(
                f"the logits have {z.shape[1]} classes", where="cape", remedy="The method is binary: [N, 2]"
            )
        return 2

    def forward(self, logits: Tensor, target: Tensor, *, index: Tensor | None = None, **options: Any) -> Tensor:
        """Computes the loss.

        Args:
            logits: [N, 2, *] or [..., 2].
            target: Class indices, or probabilities of the shape of ``logits``.
            index: Number of each sample in the training set, shape of the class indices; training with
                ``dataset_size`` needs it. Negative: not in it, the label counts.
            options: As in :meth:`ClassificationLoss.forward`.

        Raises:
            LossplugError: More than two classes, ``index`` is missing or doesn't fit, or ``update`` was not called.
        """
        soft = target.is_floating_point() and target.shape == logits.shape
        if self.targets is None or not self.training or soft or not self.probability_epoch:
            return super().forward(logits, target, **options)
        index = check_index(index, target, self.targets.numel(), "cape")
        known = self.kept(target, options.get("ignore_index")) & (index >= 0)
        positive = torch.where(known, self.targets[index.clamp_min(0)], target.to(self.targets))
        if positive.device.type == "cpu" and bool(positive.isnan().any()):
            raise LossplugError(
                "there are no targets yet", where="cape", remedy="Call update(predictions, labels) first"
            )
        return super().forward(logits, target, positive=positive, **options)

    def rows(self, z: Tensor, y: Tensor, *, positive: Tensor | None = None) -> Tensor:
        """Cross-entropy against the labels, or against probabilities of class 1."""
        positive = y.to(z) if positive is None else positive.to(z)
        return self.soft_rows(z, torch.stack([1 - positive, positive], dim=1))

    def soft_rows(self, z: Tensor, q: Tensor) -> Tensor:
        """Cross-entropy against probabilities ``q``."""
        return -torch.linalg.vecdot(q, z.log_softmax(dim=1))
