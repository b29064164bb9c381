"""Rotary position embedding of any layout, and its inverse."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.history import RotaryHistory


@dataclass(frozen=True)
class Pairing:
    """Which channels of a head rotate together.

    Args:
        order: The channels so that i and i + half rotate by one angle for i < half, and the rest doesn't, ``[d]``.
        half: Angles.
    """

    order: Tensor
    half: int

    @cached_property
    def in_halves(self) -> bool:
        """Whether the channels stand in this order already."""
        return torch.equal(self.order, torch.arange(len(self.order), device=self.order.device))

    def turn(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates keys ``[..., d]`` whose channels stand in halves by tables ``[..., half]``."""
        one, two, rest = keys.split([self.half, self.half, keys.shape[-1] - 2 * self.half], dim=-1)
        return torch.cat([torch.addcmul(one * cos, two, sin, value=-1), torch.addcmul(two * cos, one, sin), rest], -1)


class Rotary:
    """Rotates and un-rotates keys with the function of the model's own file, so that every layout is right.

    Only the first ``cos.shape[-1]`` channels rotate. Tables may carry a scale (YaRN, longrope): the inverse divides by
    ``cos^2 + sin^2``.

    Args:
        function: ``function(q, k, cos, sin) -> (q, k)`` on ``[batch, heads, tokens, channels]``, tables
            ``[batch, tokens, rotary channels]``.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def rotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates keys ``[batch, heads, tokens, d]`` by tables ``[batch, tokens, rotary]``."""
        rotary = cos.shape[-1]
        turned = self.function(keys[:, :1, :, :rotary], keys[..., :rotary], cos, sin)[1]
        return turned if rotary == keys.shape[-1] else torch.cat([turned, keys[..., rotary:]], dim=-1)

    def unrotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Undoes :meth:`rotate`."""
        size = cos.square() + sin.square()
        return self.rotate(keys, cos / size, -sin / size)

    def pairing(self, history: RotaryHistory, width: int) -> Pairing | None:
        """Returns how the channels of a head of ``width`` are paired under some tables; None for an unknown way.

        It is tried out on the last tokens of ``history``, whose angles are the largest.
        """
        if history.form not in ("halves", "pairs"):
            return None
        start = max(len(history) - 4, 0)
        cos, sin = (table[:1].float() for table in history.read(start, len(history)))
        rotary = cos.shape[-1]
        half, single = rotary // 2, history.tables.read(start, len(history))[:, :1].float()
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(1, 1, cos.shape[1], width, generator=generator).to(cos.device)
        turned = self.rotate(keys, cos, sin)
        every = torch.arange(width, device=cos.device)
        for order in (every, torch.cat([every[:rotary:2], every[1:rotary:2], every[rotary:]])):
            one, two, rest = keys[..., order].split([half, half, width - rotary], dim=-1)
            parts = [one * single[0] - two * single[1], two * single[0] + one * single[1], rest]
            # a table that turns nothing would fit every order
            if (turned - keys).abs().amax() > 1e-3 and torch.allclose(
                torch.cat(parts, dim=-1), turned[..., order], rtol=1e-5, atol=1e-5
            ):
                return Pairing(order, half)
        return None


def find_rotary(module: nn.Module, where: str) -> Rotary:
    """Returns the rotation of an attention block, after a check that it can be undone.

    Raises:
        LossplugError: The block's file has no ``apply_rotary_pos_emb(q, k, cos, sin)``, or not an invertible one.
    """
    # subclasses live in files of their own; the rotation is where the class with the forward is
    files = [sys.modules.get(cls.__module__) for cls in type(module).__mro__ if "forward" in vars(cls)]
    function = next((f for f in (getattr(file, "apply_rotary_pos_emb", None) for file in files) if f), None)
    if function is None:
        raise _unknown(module, where)
    rotary = Rotary(function)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 3, 8, generator=generator)
    angles = torch.randn(1, 3, 4, generator=generator)
    # a table repeats its angles by halves or one by one, as the model's rotary embedding makes it
    if not any(_undoes(rotary, keys, table) for table in (angles.repeat(1, 1, 2), angles.repeat_interleave(2, -1))):
        raise _unknown(module, where)
    return rotary


def _undoes(rotary: Rotary, keys: Tensor, angles: Tensor) -> bool:
    cos, sin = 1.5 * angles.cos(), 1.5 * angles.sin()
    try:
        turned = rotary.rotate(keys, cos, sin)
        undone = (rotary.unrotate(turned, cos, sin) - keys).abs().amax()
    except (TypeError, RuntimeError, ValueError, IndexError):  # a function of other arguments
        return False
    return float(undone) < 1e-4 < float((turned - keys).abs().amax())


def _unknown(module: nn.Module, where: str) -> LossplugError:
    return LossplugError(
        f"{type(module).__name__} has no rotary layout that is known here",
        where=where,
        remedy="The KV cache is shrunk for models that rotate keys by apply_rotary_pos_emb(q, k, cos, sin)",
    )
