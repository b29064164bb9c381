"""Gradients in few bytes: compressors, error feedback, and their exchange between processes.

Compressors and rules are registered under the names on their method cards::

    create("topk", ratio=0.01)(gradient)
    average, states = create_rule("ef21").step([None, None], gradients, create("topk"))
"""

from __future__ import annotations

from typing import Any

from lightning_lossplug.communication.base import Compressor, Draw, pack_bits, unpack_bits
from lightning_lossplug.communication.exchange import GradientExchange, compression_hook
from lightning_lossplug.communication.local_updates import LocalUpdate, Scafcom, Scallion
from lightning_lossplug.communication.lowrank import LowRank, lowrank, lowrank_factors
from lightning_lossplug.communication.quantised import QSGD, Natural, ScaledSign, natural, qsgd, scaled_sign
from lightning_lossplug.communication.rules import (
    EF14,
    EF21,
    EF21SGDM,
    EF21W,
    EControl,
    ErrorFeedback,
    NoFeedback,
    ef21_step_size,
)
from lightning_lossplug.communication.sparse import (
    BlockTopK,
    Identity,
    RandK,
    TopK,
    block_topk,
    block_topk_indices,
    randk,
    topk,
    topk_indices,
)
from lightning_lossplug.registry import registry

__all__ = [
    "EF14",
    "EF21",
    "EF21SGDM",
    "EF21W",
    "QSGD",
    "BlockTopK",
    "Compressor",
    "Draw",
    "EControl",
    "ErrorFeedback",
    "GradientExchange",
    "Identity",
    "LocalUpdate",
    "LowRank",
    "Natural",
    "NoFeedback",
    "RandK",
    "Scafcom",
    "ScaledSign",
    "Scallion",
    "TopK",
    "block_topk",
    "block_topk_indices",
    "compression_hook",
    "create",
    "create_rule",
    "ef21_step_size",
    "lowrank",
    "lowrank_factors",
    "natural",
    "pack_bits",
    "qsgd",
    "randk",
    "scaled_sign",
    "topk",
    "topk_indices",
    "unpack_bits",
]


def create(name: str, /, **parameters: Any) -> Compressor:
    """Builds a compressor from its registered name; see :meth:`Registry.create`."""
    return registry.create("compressor", name, **parameters)


def create_rule(name: str, /, **parameters: Any) -> ErrorFeedback:
    """Builds a rule of error feedback from its registered name; see :meth:`Registry.create`."""
    return registry.create("error_feedback", name, **parameters)
