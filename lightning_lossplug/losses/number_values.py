"""Value tables of number tokens from any tokenizer, for ``number_token`` and ``dist2``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.number_token import NumberToken
from lightning_lossplug.losses.token_values import TokenValueLoss

# How vocabularies write a word boundary: byte-level BPE, SentencePiece, a plain space; WordPiece marks the inside.
MARKERS = ("Ġ", "▁", " ", "##")


def token_value(token: str | bytes, digit_level: bool = True, markers: bool = False) -> float:
    """Returns the number that a token of the vocabulary stands for, or NaN.

    Args:
        token: Token as the vocabulary writes it.
        digit_level: Only single ASCII digits; False: every ASCII token that reads as a finite number.
        markers: At digit level, also digits with a word-boundary marker.
    """
    text = token.decode("latin-1") if isinstance(token, bytes) else token
    if markers or not digit_level:
        text = next((text[len(m) :] for m in MARKERS if text.startswith(m)), text)
    if digit_level:
        return float(text) if len(text) == 1 and text in "0123456789" else math.nan
    if not text.isascii() or "_" in text or text != text.strip():
        return math.nan
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def number_values(
    tokenizer: Any, digit_level: bool = True, vocab_size: int | None = None, markers: bool = False
) -> Tensor:
    """Returns the value table [V] of a tokenizer, NaN for tokens that are no number; the tokenizer is only read.

    Args:
        tokenizer: Anything with ``get_vocab()``: a tokenizer of transformers or of tokenizers, from GGUF files as well.
        digit_level: Only the digits 0 to 9 as tokens of one character; False: every token that reads as a number, after
            its leading space marker is removed.
        vocab_size: Size of the model's vocabulary, where it is padded beyond the tokenizer's.
        markers: At digit level, also count digits with a word-boundary marker (``Ġ7``, ``▁7``, ``##7``), with which
            many vocabularies begin or continue a number.

    Raises:
        LossplugError: Not all digits are tokens (or, at number level, no token is a number), or the size is too small.
    """
    vocabulary: dict[Any, int] = tokenizer.get_vocab()
    size = max(vocabulary.values(), default=-1) + 1
    if vocab_size is not None and vocab_size < size:
        raise LossplugError(
            f"vocab_size is {vocab_size}, the tokenizer has {size} tokens",
            where="number_values",
            remedy="Give the size of the model's logits",
        )
    table = torch.full((size if vocab_size is None else vocab_size,), math.nan)
    for token, index in vocabulary.items():
        table[index] = token_value(token, digit_level, markers)
    found = {int(v) for v in table[table.isfinite()].tolist()} if digit_level else set()
    if digit_level and len(found) < 10:
        missing = ", ".join(str(d) for d in range(10) if d not in found)
        marked = not markers and any(math.isfinite(token_value(t, True, True)) for t in vocabulary)
        raise LossplugError(
            f"the tokenizer has no token for the digits {missing}",
            where=type(tokenizer).__name__,
            remedy="Set markers=True, it has digits with a word marker" if marked else "Set digit_level=False",
        )
    if not bool(table.isfinite().any()):
        raise LossplugError("no token of the tokenizer is a number", where=type(tokenizer).__name__)
    return table


def attach_values(
    loss: TokenValueLoss, tokenizer: Any, vocab_size: int | None = None, markers: bool = False
) -> TokenValueLoss:
    """Gives a loss the value table of a tokenizer, at the level that the loss asks for; returns the loss.

    Args:
        loss: ``number_token`` (its ``digit_level`` decides) or ``dist2`` on values (digits).
        tokenizer: See :func:`number_values`.
        vocab_size: See :func:`number_values`.
        markers: See :func:`number_values`.
    """
    digit_level = loss.digit_level if isinstance(loss, NumberToken) else True
    loss.set_values(number_values(tokenizer, digit_level, vocab_size, markers))
    return loss


def tokenizer_of(*owners: Any) -> Any | None:
    """Returns the first tokenizer among objects and their ``tokenizer`` attributes, or None."""
    for owner in owners:
        for candidate in (getattr(owner, "tokenizer", None), owner):
            if callable(getattr(candidate, "get_vocab", None)):
                return candidate
    return None
