"""Edit-invariant sequence loss: n-grams of the reference may appear anywhere in the output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import Loss, check_labels
from lightning_lossplug.losses.checks import check_floating, check_number, reduce_weighted, row_weights, upcast
from lightning_lossplug.registry import register

FLOOR = -20.0  # log-probabilities below it count as it, and get no gradient


def window_means(scores: Tensor, n: int) -> Tensor:
    """Returns means along diagonals: ``R[t, u] = mean_k A[t+k, u+k]`` of A [B, T, U], shape [B, T-n+1, U-n+1]."""
    rows, columns = scores.shape[1] - n + 1, scores.shape[2] - n + 1
    total = scores[:, :rows, :columns]
    for k in range(1, n):
        total = total + scores[:, k : k + rows, k : k + columns]
    return total / n


@register(
    "loss",
    "eisl",
    family="language",
    paper="Don't Take It Literally: An Edit-Invariant Sequence Loss for Text Generation",
    arxiv="2106.15078",
    signature="seq_logits",
)
class EISL(Loss):
    r"""Edit-invariant sequence loss of log-probabilities [B, T, V] (or logits) and references [B, T'].

    For each n: :math:`R_{tu} = \frac1n \sum_{k<n} \log p_{t+k}(y_{u+k})`, floored at -20 per token;
    :math:`g = \mathrm{softmax}_t(R + \mathrm{Gumbel})`; the value of a sequence is minus the mean over reference
    n-grams u of :math:`\sum_t g_{tu} R_{tu}`, averaged over the list of n. A reference n-gram that touches padding is
    left out (the released function keeps it). The result is ``weights[0]`` times this plus ``weights[1]`` times the
    mean token cross-entropy, which needs T = T'. Memory: B T T' numbers. Use it where targets are shifted or noisy:
    noisy translation pairs, non-autoregressive decoders (arXiv 2106.15078).

    Args:
        ngrams: Values of n. 0 or a negative number stands for the output length plus it; an n longer than output or
            reference is dropped, and if none is left n is the longest that fits.
        gumbel: Add Gumbel noise (from torch's global generator) to the scores of the positions.
        weights: Weights >= 0 of the n-gram loss and of cross-entropy.
        ignore_index: Padding of the reference.
        reduction: ``none`` (one value per sequence), ``mean`` or ``sum``.
    """

    def __init__(
        self,
        ngrams: Sequence[int] = (2, 3, 4),
        gumbel: bool = True,
        weights: tuple[float, float] = (1.0, 0.0),
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction)
        if not len(ngrams) or not all(isinstance(n, int) and not isinstance(n, bool) for n in ngrams):
            raise LossplugError(f"ngrams is {ngrams!r}, expected whole numbers", where="eisl", remedy="Try [2, 3, 4]")
        if len(weights) != 2 or sum(weights) <= 0:
            raise LossplugError(f"weights is {weights!r}, expected two numbers >= 0, not both 0", where="eisl")
        for value in weights:
            check_number("eisl", "weights", value, least=0)
        self.ngrams, self.gumbel, self.weights = tuple(ngrams), gumbel, tuple(weights)
        self.ignore_index = ignore_index

    def lengths(self, outputs: int, references: int) -> list[int]:
        """Returns the n used for an output and a reference length."""
        longest = min(outputs, references)
        found = {n if n > 0 else outputs + n for n in self.ngrams}
        return sorted(n for n in found if 0 < n <= longest) or [longest]

    def forward(
        self,
        log_probs: Tensor,
        reference: Tensor,
        *,
        output_mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
        reduction: str | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            log_probs: [B, T, V]; logits give the same, since they are normalised here.
            reference: Token indices [B, T'].
            output_mask: Bool [B, T]; False marks output positions that are padding.
            sample_weight: Weights >= 0 of the sequences [B].
            denominator: What ``mean`` divides by instead.
            reduction: Overrides the module's for this call.

        Raises:
            LossplugError: Shapes or dtypes that don't fit.
            LabelError: A token outside the vocabulary (checked on CPU).
        """
        check_floating("eisl", log_probs=log_probs)
        if log_probs.ndim != 3 or reference.ndim != 2 or reference.shape[0] != log_probs.shape[0]:
            raise LossplugError(
                f"shapes {tuple(log_probs.shape)} and {tuple(reference.shape)}, expected [B, T, V] and [B, T']",
                where="eisl",
            )
        if reference.is_floating_point() or reference.dtype == torch.bool:
            raise LossplugError(f"references have dtype {reference.dtype}, expected token indices", where="eisl")
        if output_mask is not None and (output_mask.shape != log_probs.shape[:2] or output_mask.dtype != torch.bool):
            raise LossplugError(
                f"output_mask is {tuple(output_mask.shape)} {output_mask.dtype}, expected bool [B, T]", where="eisl"
            )
        if self.weights[1] and log_probs.shape[1] != reference.shape[1]:
            raise LossplugError(
                f"cross-entropy needs equal lengths, got {log_probs.shape[1]} and {reference.shape[1]}",
                where="eisl",
                remedy="Set weights=(1, 0)",
            )
        check_labels(reference.reshape(-1), log_probs.shape[2], self.ignore_index, "eisl")
        with torch.autocast(log_probs.device.type, enabled=False):
            z = upcast(log_probs)
            weight = None if sample_weight is None else row_weights(sample_weight, z.shape[:1], z, "eisl")
            rows = z.new_zeros(z.shape[0])
            if z.numel() and reference.numel():
                valid = reference != self.ignore_index
                index = torch.where(valid, reference, 0)[:, None].expand(-1, z.shape[1], -1)
                scores = z.gather(2, index) - z.logsumexp(dim=2, keepdim=True)
                rows = self.weights[0] * self._ngram_rows(scores.clamp_min(FLOOR), valid, output_mask)
                if self.weights[1]:
                    kept = valid if output_mask is None else valid & output_mask
                    own = torch.where(kept, scores.diagonal(dim1=1, dim2=2), 0)
                    rows = rows - self.weights[1] * own.sum(1) / kept.sum(1).clamp_min(1)
            else:
                rows = rows + z.flatten()[:0].sum()
            return reduce_weighted(rows, weight, reduction or self.reduction, z, denominator)

    def _ngram_rows(self, scores: Tensor, valid: Tensor, output_mask: Tensor | None) -> Tensor:
        lengths = self.lengths(scores.shape[1], scores.shape[2])
        total = scores.new_zeros(scores.shape[0])
        for n in lengths:
            windows = window_means(scores, n)
            counted = valid.unfold(1, n, 1).all(dim=2)
            choice = windows
            if self.gumbel:
                choice = windows - torch.empty_like(windows).exponential_().log()
            if output_mask is not None:
                allowed = output_mask.unfold(1, n, 1).all(dim=2)
                counted = counted & allowed.any(dim=1, keepdim=True)
                choice = choice.masked_fill(~allowed[:, :, None], torch.finfo(choice.dtype).min)
            best = (choice.softmax(dim=1) * windows).sum(dim=1)
            total = total - torch.where(counted, best, 0).sum(1) / counted.sum(1).clamp_min(1)
        return total / len(lengths)
