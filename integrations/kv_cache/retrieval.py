"""Finding a fact again: pass keys and key-value pairs in a text of any length, read through a shrunk cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache.evaluation import decode_logits
from lightning_lossplug.kv_cache.plan import KVFactors

_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_WORDS = ("apple", "river", "stone", "cloud", "tiger", "lemon", "piano", "chair", "bread", "ocean", "candle", "forest")


@dataclass(frozen=True)
class RetrievalCase:
    """A text with a fact, a question, and its answer.

    Args:
        input_ids: The whole, int64 ``[1, T]``.
        prefill: Tokens of the text, which are processed at once; the question comes after them.
        answer: How many of the last tokens are the answer.
    """

    input_ids: Tensor
    prefill: int
    answer: int


def passkey_case(tokenizer: Any, length: int, depth: float = 0.5, seed: int = 0) -> RetrievalCase:
    """Hides a five-digit number among sentences that say nothing.

    Args:
        tokenizer: Of the model.
        length: Tokens of the text before the question, exactly.
        depth: Where the number stands: 0 at the start, 1 at the end.
        seed: Of the number.

    Raises:
        LossplugError: A depth outside [0, 1], or a length that the fact doesn't fit in.
    """
    key = str(random.Random(seed).randint(10000, 99999))
    return _case(
        tokenizer,
        length,
        depth,
        start="There is important information hidden in this text. Find it and remember it. ",
        fact=f"The pass key is {key}. Remember it: {key} is the pass key. ",
        filler=lambda number: _FILLER,
        question="What is the pass key? The pass key is",
        answer=f" {key}",
        where="passkey_case",
    )


def key_value_case(tokenizer: Any, length: int, depth: float = 0.5, seed: int = 0) -> RetrievalCase:
    """Asks for the value of one of many names; every line of the text could be asked for.

    Args:
        tokenizer: Of the model.
        length: Tokens of the text before the question, exactly.
        depth: Where the line that is asked for stands: 0 at the start, 1 at the end.
        seed: Of names and values.

    Raises:
        LossplugError: A depth outside [0, 1], or a length that the fact doesn't fit in.
    """
    rng = random.Random(seed)
    used: set[str] = set()

    def line(number: int) -> str:
        name = f"{rng.choice(_WORDS)} {rng.choice(_WORDS)} {number}"
        used.add(name)
        return f"The value of {name} is {rng.randint(100, 999)}.\n"

    value = rng.randint(100, 999)
    name = f"{rng.choice(_WORDS)} {rng.choice(_WORDS)} 0"
    return _case(
        tokenizer,
        length,
        depth,
        start="A list of values.\n",
        fact=f"The value of {name} is {value}.\n",
        filler=lambda number: line(number + 1),
        question=f"Question: what is the value of {name}? Answer: the value of {name} is",
        answer=f" {value}",
        where="key_value_case",
    )


def _case(
    tokenizer: Any,
    length: int,
    depth: float,
    *,
    start: str,
    fact: str,
    filler: Callable[[int], str],
    question: str,
    answer: str,
    where: str,
) -> RetrievalCase:
    if not 0 <= depth <= 1:
        raise LossplugError(f"depth is {depth}, allowed is [0, 1]", where=where)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    first, needle = ids(start), ids(fact)
    room = length - len(first) - len(needle)
    if room < 0:
        raise LossplugError(
            f"length is {length}, the fact takes {len(first) + len(needle)} tokens", where=where, remedy="Give more"
        )
    hay: list[int] = []
    pieces = [0]  # a fact stands between whole sentences
    while len(hay) < room:
        hay += ids(filler(len(pieces)))
        pieces.append(min(len(hay), room))
    at = min(pieces, key=lambda piece: abs(piece - depth * room))
    text = first + hay[:at] + needle + hay[at:room]
    ending = ids(answer)
    whole = torch.tensor([text + ids(question) + ending])
    return RetrievalCase(whole, length, len(ending))


def retrieval_accuracy(
    model: Any, factors: KVFactors | None, cases: Iterable[RetrievalCase], window: int | None = None
) -> dict[str, float]:
    """Returns how often a model finds the answers, text from codes and question decoded token by token.

    Args:
        model: A decoder of transformers, in ``eval`` mode.
        factors: Of its shrunk cache; None for the dense cache.
        cases: From :func:`passkey_case` or :func:`key_value_case`.
        window: Recent tokens kept exactly; None: as the factors' settings say.

    Returns:
        ``exact``: share of cases whose answer is what greedy decoding gives; ``tokens``: share of answer tokens that
        are, given the ones before them.

    Raises:
        LossplugError: No cases.
    """
    exact, right, total, count = 0, 0, 0, 0
    for case in cases:
        logits = decode_logits(model, factors, case.input_ids, case.prefill, window)
        wanted = case.input_ids[0, -case.answer :].to(logits.device)
        hit = logits[0, -case.answer - 1 : -1].argmax(-1) == wanted
        exact, right, total, count = exact + int(hit.all()), right + int(hit.sum()), total + len(hit), count + 1
    if not count:
        raise LossplugError("there are no cases", where="retrieval_accuracy")
    return {"exact": exact / count, "tokens": right / total}
