"""Q-VLM: which layers share a search of their ranges, and the search."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.grid import check_bits, check_range
from lightning_lossplug.quantization.observers import affine_parameters, fake_quant
from lightning_lossplug.registry import register


def _shares(x: Tensor) -> Tensor:
    size = x.abs().reshape(-1, x.shape[-1])
    return size / size.sum(0, keepdim=True).clamp_min(1e-12)


def entropy_proxy(x: Tensor) -> Tensor:
    r"""Returns :math:`-\mathrm{mean}_c \sum_t p \ln p`, p being the share of token t in the size of channel c.

    Args:
        x: ``[..., tokens, channels]``.
    """
    p = _shares(x)
    return -(p * p.clamp_min(1e-12).log()).sum(0).mean()


@register(
    "function",
    "q_vlm",
    family="block partition",
    paper="Q-VLM: Post-training Quantization for Large Vision-Language Models",
    arxiv="2410.08119",
)
def q_vlm_blocks(values: Sequence[float], every: int = 3) -> list[list[int]]:
    """Partitions layers into blocks that share a search: a new one starts at or above the running mean.

    It also starts at every third layer, however small the value; with constant values every layer starts one.

    Args:
        values: A number per layer, in order: the entropy (:func:`entropy_proxy`) of the first, and of every next one
            how much it depends on the one before. The paper's estimate of the latter was not at hand in full.
        every: A layer whose number this divides starts a block, >= 1.

    Returns:
        Lists of consecutive indices.

    Raises:
        LossplugError: A value out of range, or one that isn't finite.

    Source: Wang et al., Q-VLM, arXiv 2410.08119; the partition rule alone, as its code has it. The search of its
    vision tower is not here.
    """
    check_range("q_vlm", "every", every, 1)
    blocks: list[list[int]] = []
    total = 0.0
    for i, value in enumerate(values):
        if not torch.tensor(float(value)).isfinite():
            raise LossplugError(f"value {i} is {value}", where="q_vlm")
        total += float(value)
        if not blocks or float(value) >= total / (i + 1) or i % every == 0:
            blocks.append([])
        blocks[-1].append(i)
    return blocks


def q_vlm_range(
    x: Tensor, lo: Tensor, hi: Tensor, bits: int = 4, p: float = 0.5, n_scale: int = 7
) -> tuple[Tensor, Tensor, float]:
    r"""Returns the range shrunk by :math:`1 - 0.1a`, a = 0 ... ``n_scale - 1``, with the least mean :math:`|x - Q|^p`.

    Args:
        x: Data.
        lo: Lower ends that broadcast against ``x``.
        hi: Upper ends.
        bits: 2 to 8.
        p: Power of the error, > 0.
        n_scale: Ranges tried, 1 to 10.

    Returns:
        Lower end, upper end and the error.

    Raises:
        LossplugError: A value out of range.
    """
    bits = check_bits("q_vlm", bits, 2, 8)
    check_range("q_vlm", "p", p, 1e-6)
    check_range("q_vlm", "n_scale", n_scale, 1, 10)
    best, least = (lo, hi), torch.inf
    for a in range(n_scale):
        keep = 1 - 0.1 * a
        error = float((x - fake_quant(x, *affine_parameters(lo * keep, hi * keep, bits))).abs().pow(p).mean())
        if error < least:
            best, least = (lo * keep, hi * keep), error
    return *best, least
