"""Value decoders folded into the output projection of an attention block."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.attention import AttentionBlock, output_heads
from lightning_lossplug.kv_cache.factors import Factors


def folded_output(block: AttentionBlock, values: Factors) -> Tensor:
    r"""Returns a projection from weighted value codes to the output of the block, ``[query heads * r, hidden]``.

    For query head h that reads key-value head k: :math:`F_h = B_V^{(k)} W_O^{(h)}`, so
    :math:`\sum_h (p_h Z)\, F_h = \sum_h (p_h Z B_V^{(k)})\, W_O^{(h)}` and values are never rebuilt (Palu, arXiv
    2407.21118; keys can't be folded, since they rotate). :class:`ChannelShrunkCache` does the same in two products, as
    its exact recent tokens need the unfolded one.

    Args:
        block: The block; its projection is ``o_proj``, ``dense`` or ``out_proj``.
        values: Factors of its values, without a mean.

    Raises:
        LossplugError: Factors with a mean, or a projection that is not found or of another width.
    """
    if values.mean is not None:
        raise LossplugError("the values are coded about a mean, which does not fold", where="folded_output")
    heads = output_heads(block, values.width)
    if heads is None:
        raise LossplugError("the output projection is not found", where=block.path)
    decode = values.decode.to(heads).unflatten(1, (heads.shape[0], -1))  # [r, key-value heads, d]
    return torch.einsum("rkd,kgdo->kgro", decode, heads).flatten(0, 2)
