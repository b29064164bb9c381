"""Perplexity of the tokens that are decoded after a prompt."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lightning_lossplug.errors import LossplugError

_CHUNK = 1024  # rows whose log-probabilities are held in float32 at once


class DecodePerplexity(Metric):
    r"""Perplexity over the tokens from position ``prefill`` on: :math:`\exp(-\mathrm{mean}\,\log p(x_t | x_{<t}))`.

    For logits of a model whose cache is compressed and that processed the first ``prefill`` tokens exactly
    (:func:`lightning_lossplug.integrations.kv_cache.decode_logits`). The first token that counts is predicted by the
    last row of the prompt, which is exact, as it is in ``generate``.

    Args:
        prefill: Tokens of the prompt, >= 1.
        ignore_index: Target that doesn't count.
        **options: Given to ``torchmetrics.Metric``.

    Raises:
        LossplugError: ``prefill`` is below 1.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, prefill: int = 512, ignore_index: int = -100, **options: Any) -> None:
        super().__init__(**options)
        if prefill < 1:
            raise LossplugError(f"prefill is {prefill}, allowed is 1 or more", where="DecodePerplexity")
        self.prefill, self.ignore_index = prefill, ignore_index
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, input_ids: Tensor) -> None:
        """Counts a text.

        Args:
            logits: ``[B, T, V]``; row t predicts token t + 1.
            input_ids: int64 ``[B, T]``, the text itself.

        Raises:
            LossplugError: The text ends with the prompt.
        """
        if input_ids.shape[1] <= self.prefill:
            raise LossplugError(
                f"the text has {input_ids.shape[1]} tokens and the prompt {self.prefill}, so nothing is decoded",
                where="DecodePerplexity",
                remedy="Give longer texts or a smaller prefill",
            )
        rows = logits[:, self.prefill - 1 : -1].flatten(0, 1)
        targets = input_ids[:, self.prefill :].flatten().to(rows.device)
        for part, wanted in zip(rows.split(_CHUNK), targets.split(_CHUNK), strict=True):
            loss = F.cross_entropy(part.float(), wanted, ignore_index=self.ignore_index, reduction="sum")
            self.total += loss.to(self.total.device)
        self.count += (targets != self.ignore_index).sum().to(self.count.device)

    def compute(self) -> Tensor:
        """Returns the perplexity; NaN before the first update."""
        return (self.total / self.count).exp().float()
