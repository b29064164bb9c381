"""Base class of losses at tokens that stand for a value: a digit, a coordinate, a code of a codebook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import Loss, check_labels
from lightning_lossplug.losses.checks import check_floating, reduce_weighted, row_weights, upcast


class TokenValueLoss(Loss, ABC):
    """A term added to cross-entropy, computed only where the label is a token with a value.

    The value table has one entry per token of the vocabulary, NaN for tokens without a value: [V], or [V, D] for
    vectors. It belongs to a tokenizer and not to a checkpoint, so it is a buffer that is not saved; give it at
    construction, by :meth:`set_values`, or in the call.
    ``lightning_lossplug.losses.number_values`` builds it from a tokenizer.

    Args:
        values: Value table, or None.
        ignore_index: Label of positions that are left out.
        reduction: ``none``, ``mean`` (over the positions whose label has a value) or ``sum``.
    """

    values: Tensor | None  # the whole table
    ids: Tensor | None  # tokens with a value, [S]
    slots: Tensor | None  # token -> place in ids, or -1, [V]

    def __init__(
        self, values: Tensor | Sequence[float] | None = None, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__(reduction)
        self.ignore_index = ignore_index
        for name in ("values", "ids", "slots"):
            self.register_buffer(name, None, persistent=False)
        if values is not None:
            self.set_values(values)

    def set_values(self, values: Tensor | Sequence[float]) -> None:
        """Sets the value table.

        Raises:
            LossplugError: No token has a value, or the shape is not [V] or [V, D].
        """
        self.values = self.check_values(torch.as_tensor(values, dtype=torch.get_default_dtype()))
        self.ids, self.slots = _index(self.values)

    def check_values(self, values: Tensor) -> Tensor:
        """Returns the table, or raises for one that the loss can't use."""
        where = type(self).__name__
        if values.ndim != 1:
            raise LossplugError(f"the value table has shape {tuple(values.shape)}, expected [V]", where=where)
        if not values.is_floating_point() or not bool(values.isfinite().any()):
            raise LossplugError(
                "the value table has no token with a value",
                where=where,
                remedy="Expected floats [V], NaN for tokens without a value; is this the right tokenizer?",
            )
        return values

    @abstractmethod
    def rows(self, z: Tensor, outside: Tensor | None, values: Tensor, slot: Tensor) -> Tensor:
        """Returns the loss [R] of value tokens.

        Args:
            z: Logits of the S tokens with a value, [R, S].
            outside: ``logsumexp`` over the whole vocabulary [R], where :meth:`wants_mass` says so.
            values: Values of the S tokens, [S] or [S, D].
            slot: Which of the S tokens is the label, [R].
        """

    def wants_mass(self) -> bool:
        """Whether :meth:`rows` needs the log-partition over the whole vocabulary."""
        return False

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        values: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
        ignore_index: int | None = None,
        reduction: str | None = None,
    ) -> Tensor:
        """Computes the term; without a value token in the batch it is 0, attached to the graph.

        Args:
            logits: [..., V], usually [B, T, V].
            target: Token indices [...].
            values: Value table that replaces the module's for this call.
            sample_weight: Weights >= 0 of the positions [...].
            denominator: What ``mean`` divides by instead.
            ignore_index: Overrides the module's for this call.
            reduction: Overrides the module's for this call.

        Raises:
            LossplugError: No value table, or shapes and dtypes that don't fit.
            LabelError: A label outside the vocabulary (checked on CPU).
        """
        where = type(self).__name__
        check_floating(where, logits=logits)
        table, ids, slots = self.values, self.ids, self.slots
        if values is not None:
            table = self.check_values(values)
            ids, slots = _index(table)
        if table is None or ids is None or slots is None:
            raise LossplugError(
                "has no value table",
                where=where,
                remedy="Call set_values(table), or attach_values(loss, tokenizer) of losses.number_values",
            )
        if logits.ndim == 0 or target.shape != logits.shape[:-1]:
            raise LossplugError(
                f"targets {tuple(target.shape)} don't fit logits {tuple(logits.shape)}",
                where=where,
                remedy="Expected targets [...] for logits [..., V]",
            )
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise LossplugError(f"targets have dtype {target.dtype}, expected token indices", where=where)
        vocabulary = logits.shape[-1]
        if table.shape[0] != vocabulary:
            raise LossplugError(
                f"the value table has {table.shape[0]} tokens, the logits have {vocabulary}",
                where=where,
                remedy="Pad the table with NaN to the vocabulary of the model (vocab_size=...)",
            )
        ignore = self.ignore_index if ignore_index is None else ignore_index
        with torch.autocast(logits.device.type, enabled=False):
            y = target.reshape(-1)
            check_labels(y, vocabulary, ignore, where)
            table, ids, slots = table.to(y.device), ids.to(y.device), slots.to(y.device)
            kept = y != ignore
            slot = torch.where(kept, slots[torch.where(kept, y, 0)], -1)
            keep = slot >= 0
            flat = logits.reshape(-1, vocabulary)
            # Only the columns of value tokens are upcast; rows that don't count are blanked before the softmax.
            z = torch.where(keep[:, None], upcast(flat[:, ids]), 0)
            outside = torch.where(keep, upcast(flat).logsumexp(dim=1), 0) if self.wants_mass() else None
            rows = self.rows(z, outside, table[ids].to(z), slot.clamp_min(0))
            weight = keep.to(z)
            if sample_weight is not None:
                weight = weight * row_weights(sample_weight, target.shape, z, where).reshape(-1)
            rows = torch.where(keep, rows, 0).reshape(target.shape)
            return reduce_weighted(rows, weight.reshape(target.shape), reduction or self.reduction, logits, denominator)


def _index(table: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the tokens that have a value [S], and for every token its place among them or -1 [V]."""
    ids = table.reshape(len(table), -1).isfinite().all(dim=1).nonzero().squeeze(1)
    places = torch.arange(len(ids), device=table.device)
    return ids, torch.full((len(table),), -1, device=table.device).scatter(0, ids, places)
