"""Sequence losses of speech by their libraries: CTC (torch) and RNN-T (torchaudio)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.losses.base import Loss, check_labels
from lightning_lossplug.losses.checks import check_floating, reduce_weighted, row_weights, upcast
from lightning_lossplug.registry import register


def check_targets(targets: Tensor, lengths: Tensor, classes: int, where: str) -> None:
    """Raises an error for targets that are no class indices (beyond the lengths of [N, S] anything may stand)."""
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.ndim not in (1, 2):
        raise LossplugError(
            f"targets are {tuple(targets.shape)} of {targets.dtype}, expected class indices [N, S] or one row of all",
            where=where,
        )
    if targets.ndim == 2 and len(targets) != len(lengths):
        raise LossplugError(f"targets {tuple(targets.shape)} for {len(lengths)} sequences", where=where)
    if targets.device.type == "cpu" and targets.ndim == 2:
        places = torch.arange(targets.shape[1])
        targets = targets[places < lengths.cpu()[:, None]]
    check_labels(targets.reshape(-1), classes, 0, where)


@register(
    "loss",
    "ctc",
    family="speech",
    paper="Connectionist Temporal Classification: Labelling Unsegmented Sequence Data with Recurrent Neural Networks",
    signature="ctc",
)
class CTC(Loss):
    """Connectionist temporal classification, by ``torch.nn.functional.ctc_loss``.

    Log-probabilities [T, N, C], targets [N, S] (or all concatenated), lengths [N]. ``mean`` divides each value by its
    target length first, as torch does. Use it to train recognisers without alignments.

    Args:
        blank: Index of the blank.
        zero_infinity: Value and gradient 0 where the target is longer than the input (torch's own default is False).
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(self, blank: int = 0, zero_infinity: bool = True, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.blank, self.zero_infinity = blank, zero_infinity

    def forward(
        self,
        log_probs: Tensor,
        targets: Tensor,
        input_lengths: Tensor,
        target_lengths: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
        reduction: str | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            log_probs: Log-softmax outputs [T, N, C].
            targets: Class indices without blanks [N, S] or [sum of lengths].
            input_lengths: Frames of each sequence [N].
            target_lengths: Labels of each sequence [N].
            sample_weight: Weights >= 0 of the sequences [N].
            denominator: What ``mean`` divides by instead of the number of sequences.
            reduction: Overrides the module's for this call.

        Raises:
            LossplugError: Shapes or dtypes that don't fit.
            LabelError: A target outside the classes (checked on CPU).
        """
        check_floating("ctc", log_probs=log_probs)
        if log_probs.ndim != 3:
            raise LossplugError(f"log_probs {tuple(log_probs.shape)}, expected [T, N, C]", where="ctc")
        count = log_probs.shape[1]
        lengths = torch.as_tensor(target_lengths, device=log_probs.device)
        frames = torch.as_tensor(input_lengths)
        if lengths.shape != (count,) or frames.shape != (count,):
            raise LossplugError(
                f"lengths {tuple(frames.shape)} and {tuple(lengths.shape)}, expected [{count}]", where="ctc"
            )
        if not 0 <= self.blank < log_probs.shape[2]:
            raise LossplugError(f"blank is {self.blank} for {log_probs.shape[2]} classes", where="ctc")
        check_targets(targets, lengths, log_probs.shape[2], "ctc")
        with torch.autocast(log_probs.device.type, enabled=False):
            lp = upcast(log_probs)
            how = reduction or self.reduction
            if count == 0:
                return reduce_weighted(lp.new_zeros(0), None, how, lp)
            rows = F.ctc_loss(lp, targets, frames, lengths, self.blank, "none", self.zero_infinity)
            if how == "mean":
                rows = rows / lengths.clamp_min(1)
            weight = None if sample_weight is None else row_weights(sample_weight, rows, rows, "ctc")
            return reduce_weighted(rows, weight, how, lp, denominator)


@register(
    "loss",
    "rnnt",
    family="speech",
    paper="Sequence Transduction with Recurrent Neural Networks",
    arxiv="1211.3711",
    signature="rnnt",
)
class RNNT(Loss):
    """RNN transducer loss, by ``torchaudio.functional.rnnt_loss`` (the extra ``speech``).

    Joiner outputs [N, T, S + 1, C], targets [N, S], lengths [N]. Use it to train streaming recognisers.

    Args:
        blank: Index of the blank; -1 is the last class.
        clamp: Bound > 0 of the gradients; -1: none.
        reduction: ``none``, ``mean`` or ``sum``.
    """

    def __init__(self, blank: int = -1, clamp: float = -1, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.blank, self.clamp = blank, clamp

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        input_lengths: Tensor,
        target_lengths: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
        reduction: str | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            logits: Joiner outputs [N, T, S + 1, C]; torchaudio applies the softmax. float64 is computed in float32.
            targets: Class indices [N, S].
            input_lengths: Frames of each sequence [N].
            target_lengths: Labels of each sequence [N].
            sample_weight: Weights >= 0 of the sequences [N].
            denominator: What ``mean`` divides by instead of the number of sequences.
            reduction: Overrides the module's for this call.

        Raises:
            LossplugError: Shapes or dtypes that don't fit, or torchaudio is not installed.
        """
        check_floating("rnnt", logits=logits)
        if logits.ndim != 4:
            raise LossplugError(f"logits {tuple(logits.shape)}, expected [N, T, S + 1, C]", where="rnnt")
        if len(logits) == 0:
            return reduce_weighted(upcast(logits).new_zeros(0), None, reduction or self.reduction, upcast(logits))
        check_targets(targets, torch.as_tensor(target_lengths), logits.shape[3], "rnnt")
        functional = require("torchaudio.functional", "speech", "rnnt")
        with torch.autocast(logits.device.type, enabled=False):
            rows = functional.rnnt_loss(
                logits.float().contiguous(),
                targets.to(torch.int32).contiguous(),
                torch.as_tensor(input_lengths, dtype=torch.int32, device=logits.device),
                torch.as_tensor(target_lengths, dtype=torch.int32, device=logits.device),
                blank=self.blank,
                clamp=self.clamp,
                reduction="none",
            )
            weight = None if sample_weight is None else row_weights(sample_weight, rows, rows, "rnnt")
            return reduce_weighted(rows, weight, reduction or self.reduction, logits, denominator)
