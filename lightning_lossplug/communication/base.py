"""What every compressor of gradients shares: where its random numbers come from, its message, its guarantee."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Message = tuple[Tensor, ...]


@dataclass(frozen=True)
class Draw:
    """Where the random numbers of one message come from; nothing but the step has to be saved to repeat them.

    Args:
        seed: Of the run, equal on all ranks.
        step: Exchanges done before this one.
        name: The parameter.
        rank: The sender.
    """

    seed: int = 0
    step: int = 0
    name: str = ""
    rank: int = 0

    def shared(self, device: torch.device) -> torch.Generator:
        """Returns a generator that gives every rank the same numbers."""
        return self._generator(device, "")

    def own(self, device: torch.device) -> torch.Generator:
        """Returns a generator whose numbers are independent between ranks."""
        return self._generator(device, f"/{self.rank}")

    def _generator(self, device: torch.device, suffix: str) -> torch.Generator:
        text = f"{self.seed}/{self.step}/{self.name}{suffix}"
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
        return torch.Generator(device).manual_seed(number)


class Compressor(ABC):
    r"""A map :math:`C: R^d \to R^d` whose result has a short message.

    Contractive: :math:`E\|C(v)-v\|^2 \le (1-a)\|v\|^2`. Unbiased: :math:`E\,C(v) = v` and
    :math:`E\|C(v)-v\|^2 \le \omega\|v\|^2`; then :math:`C/(1+\omega)` is contractive with :math:`a = 1/(1+\omega)`.

    The length of a message depends on the shape alone, so that all ranks agree on it beforehand.
    """

    name: ClassVar[str]
    reducible: ClassVar[bool] = False  # one tensor, linear in v: messages of all ranks can be summed
    homogeneous: ClassVar[bool] = True  # C(s v) = s C(v) for s > 0
    unbiased: bool = False

    @abstractmethod
    def encode(self, v: Tensor, draw: Draw) -> Message:
        """Returns what is sent for a finite tensor, float32 or float64, of any shape."""

    @abstractmethod
    def decode(self, message: Message, like: Tensor, draw: Draw) -> Tensor:
        """Returns C(v) from its message, with the shape, dtype and device of ``like``."""

    @abstractmethod
    def message_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Returns the bytes of the message of a tensor."""

    def omega(self, numel: int) -> float:
        """Returns the variance bound of the unbiased form; infinite where there is none."""
        return float("inf")

    @abstractmethod
    def contraction(self, numel: int) -> float | None:
        """Returns a, the share of the squared norm that surely survives on average; None: it depends on the data."""

    def __call__(self, v: Tensor, draw: Draw | None = None) -> Tensor:
        """Returns C(v) as every receiver sees it."""
        draw = draw or Draw()
        return self.decode(self.encode(v, draw), v, draw)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs uint8 codes below 2^bits into bytes, the first in the lowest bits.

    Args:
        codes: uint8, one axis.
        bits: 1, 2, 4 or 8.
    """
    per_byte = 8 // bits
    rows = torch.nn.functional.pad(codes, (0, -codes.numel() % per_byte)).reshape(-1, per_byte)
    packed = rows[:, 0].clone()
    for place in range(1, per_byte):
        packed |= rows[:, place] << (bits * place)
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undoes :func:`pack_bits`; returns ``count`` uint8 codes."""
    columns = [(packed >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(columns, dim=1).flatten()[:count]
