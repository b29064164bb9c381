"""Triton kernel of the attention of a few query rows over packed low-rank codes; for GPUs.

Imported only where Triton is installed and the cache lies on a GPU. A program takes one key-value head of one row of
the batch and some tiles of old tokens: codes are unpacked in registers, the head's keys rebuilt by a matrix product,
rotated and scored, and values summed as codes under a softmax that is kept online. Nothing of it is written but what
:func:`partial_attention` returns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lossplug.kv_cache import pages as paging
from lightning_lossplug.kv_cache.codes import groups_of
from lightning_lossplug.kv_cache.latent import LatentTokens

CHUNK = 64  # channels of key codes that are multiplied at once
WIDEST = 512  # channels of value codes: their sums stay in registers
PROGRAMS = 512  # enough for any GPU of today
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _codes(  # type: ignore[no-untyped-def] # noqa: ANN202
    codes,  # noqa: ANN001
    ranges,  # noqa: ANN001
    place,  # noqa: ANN001
    inside,  # noqa: ANN001
    channel,  # noqa: ANN001
    RANK: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Codes ``[tokens, channels]``; 0 outside."""
    ok = inside[:, None] & (channel < RANK)[None, :]
    if BITS == 16:
        source = codes.to(tl.pointer_type(TYPE))
        return tl.load(source + place[:, None] * RANK + channel[None, :], mask=ok, other=0.0)
    else:
        PER: tl.constexpr = 8 // BITS
        BYTES: tl.constexpr = (GROUPS * SIZE + PER - 1) // PER
        packed = codes.to(tl.pointer_type(tl.uint8))
        byte = tl.load(packed + place[:, None] * BYTES + (channel // PER)[None, :], mask=ok, other=0).to(tl.int32)
        level = (byte >> ((channel % PER) * BITS)[None, :]) & ((1 << BITS) - 1)
        at = ranges.to(tl.pointer_type(tl.float16)) + (place[:, None] * GROUPS + (channel // SIZE)[None, :]) * 2
        low = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        scale = tl.load(at + 1, mask=ok, other=0.0).to(tl.float32)
        return (low + scale * level.to(tl.float32)).to(TYPE)


# what grows from token to token must not compile the kernel anew
@triton.jit(
    do_not_specialize=["old", "table_tokens", "pages", "tiles", "tiles_each", "mask_batch", "mask_head", "mask_row"]
)
def _attend(  # type: ignore[no-untyped-def] # noqa: ANN202
    query,  # noqa: ANN001
    decode,  # noqa: ANN001
    mean,  # noqa: ANN001
    addresses,  # noqa: ANN001
    sinks,  # noqa: ANN001
    mask,  # noqa: ANN001
    tops,  # noqa: ANN001
    masses,  # noqa: ANN001
    sums,  # noqa: ANN001
    old,  # noqa: ANN001
    table_tokens,  # noqa: ANN001
    pages,  # noqa: ANN001
    tiles,  # noqa: ANN001
    tiles_each,  # noqa: ANN001
    scale,  # noqa: ANN001
    mask_batch,  # noqa: ANN001
    mask_head,  # noqa: ANN001
    mask_row,  # noqa: ANN001
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    K_RANK: tl.constexpr,
    V_RANK: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    K_SIZE: tl.constexpr,
    V_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    TABLE_BATCH: tl.constexpr,
    SINKS: tl.constexpr,
    MEAN: tl.constexpr,
    MASK: tl.constexpr,
    TYPE: tl.constexpr,
    TABLE: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // HEADS, pair % HEADS
    row, half = tl.arange(0, ROWS_PAD), tl.arange(0, HALF_PAD)
    rest, value = tl.arange(0, REST_PAD), tl.arange(0, V_PAD)
    turning, still = half < HALF, rest < WIDTH - 2 * HALF
    at = query + (pair * ROWS + row)[:, None] * WIDTH
    q_one = tl.load(at + half[None, :], mask=(row < ROWS)[:, None] & turning[None, :], other=0.0)
    q_two = tl.load(at + HALF + half[None, :], mask=(row < ROWS)[:, None] & turning[None, :], other=0.0)
    q_rest = tl.load(at + 2 * HALF + rest[None, :], mask=(row < ROWS)[:, None] & still[None, :], other=0.0)
    top = tl.full([ROWS_PAD], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS_PAD], tl.float32)
    total = tl.zeros([ROWS_PAD, V_PAD], tl.float32)
    TILES_PER_PAGE: tl.constexpr = (PAGE + BLOCK - 1) // BLOCK
    for tile in range(split * tiles_each, tl.minimum((split + 1) * tiles_each, tiles)):
        page = tile // TILES_PER_PAGE
        token = (tile % TILES_PER_PAGE) * BLOCK + tl.arange(0, BLOCK)
        held = tl.minimum(PAGE, old - page * PAGE)
        inside = token < held
        place = (batch * held + token).to(tl.int64)
        k_codes, k_ranges = tl.load(addresses + page), tl.load(addresses + pages + page)
        one, two = tl.zeros([BLOCK, HALF_PAD], tl.float32), tl.zeros([BLOCK, HALF_PAD], tl.float32)
        other = tl.zeros([BLOCK, REST_PAD], tl.float32)
        for start in range(0, K_RANK, CHUNK):
            channel = start + tl.arange(0, CHUNK)
            z = _codes(k_codes, k_ranges, place, inside, channel, K_RANK, K_BITS, K_GROUPS, K_SIZE, TYPE)
            factor = decode + channel[:, None] * (HEADS * WIDTH) + head * WIDTH
            known = (channel < K_RANK)[:, None]
            b_one = tl.load(factor + half[None, :], mask=known & turning[None, :], other=0.0)
            b_two = tl.load(factor + HALF + half[None, :], mask=known & turning[None, :], other=0.0)
            one = tl.dot(z, b_one, one, input_precision="ieee")
            two = tl.dot(z, b_two, two, input_precision="ieee")
            if 2 * HALF < WIDTH:
                b_rest = tl.load(factor + 2 * HALF + rest[None, :], mask=known & still[None, :], other=0.0)
                other = tl.dot(z, b_rest, other, input_precision="ieee")
        if MEAN:
            own = mean + head * WIDTH
            one += tl.load(own + half, mask=turning, other=0.0).to(tl.float32)[None, :]
            two += tl.load(own + HALF + half, mask=turning, other=0.0).to(tl.float32)[None, :]
            other += tl.load(own + 2 * HALF + rest, mask=still, other=0.0).to(tl.float32)[None, :]
        table_held = tl.minimum(PAGE, table_tokens - page * PAGE)
        table = tl.load(addresses + 4 * pages + page).to(tl.pointer_type(TABLE))
        if TABLE_BATCH > 1:
            angle = (batch * table_held + token)[:, None] * HALF + half[None, :]
        else:
            angle = token[:, None] * HALF + half[None, :]
        known = inside[:, None] & turning[None, :]
        cos = tl.load(table + angle, mask=known, other=0.0).to(tl.float32)
        sin = tl.load(table + TABLE_BATCH * table_held * HALF + angle, mask=known, other=0.0).to(tl.float32)
        turned_one, turned_two = one * cos - two * sin, two * cos + one * sin
        score = tl.dot(q_one, tl.trans(turned_one.to(TYPE)), input_precision="ieee")
        score = tl.dot(q_two, tl.trans(turned_two.to(TYPE)), score, input_precision="ieee")
        if 2 * HALF < WIDTH:
            score = tl.dot(q_rest, tl.trans(other.to(TYPE)), score, input_precision="ieee")
        score *= scale
        column = page * PAGE + token
        if MASK:
            rows = mask + batch.to(tl.int64) * mask_batch + head * mask_head + row[:, None].to(tl.int64) * mask_row
            score += tl.load(rows + column[None, :], mask=(row < ROWS)[:, None] & inside[None, :], other=0.0)
        for sink in range(SINKS):  # they count with the exact tokens
            inside &= column != tl.load(sinks + batch * SINKS + sink)
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(score - anchor[:, None])
        shrink = tl.exp(top - anchor)
        v_codes, v_ranges = tl.load(addresses + 2 * pages + page), tl.load(addresses + 3 * pages + page)
        z = _codes(v_codes, v_ranges, place, token < held, value, V_RANK, V_BITS, V_GROUPS, V_SIZE, TYPE)
        mass = mass * shrink + tl.sum(weight, 1)
        total = tl.dot(weight.to(TYPE), z, total * shrink[:, None], input_precision="ieee")
        top = higher
    out = (pair * tl.num_programs(0) + split) * ROWS + row
    tl.store(tops + out, top, mask=row < ROWS)
    tl.store(masses + out, mass, mask=row < ROWS)
    written = (row < ROWS)[:, None] & (value < V_RANK)[None, :]
    tl.store(sums + out[:, None].to(tl.int64) * V_RANK + value[None, :], total, mask=written)


def partial_attention(
    query: Tensor, tokens: LatentTokens, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns softmax over the old tokens but the sinks, in parts and before the division.

    Args:
        query: Rotated queries with the channels in the order of the decoders' pairing, ``[batch, heads, rows, d]``.
        tokens: What they attend to.
        scale: Of the scores.
        mask: Added to the scores, float32 ``[batch or 1, heads or 1, rows or 1, T]``; None for none.

    Returns:
        Per part its largest score and its mass relative to that, ``[batch, heads, parts, rows]``, and the weighted sum
        of the value codes, ``[batch, heads, parts, rows, r_V]``; float32.
    """
    batch, heads, rows, width = query.shape
    decoders, half = tokens.decoders, tokens.decoders.pairing.half
    keys, values, tables = tokens.key_codes, tokens.value_codes, tokens.tables.tables
    v_pad, block = padded(values.rank), block_of(values.rank)
    tiles = sum(triton.cdiv(part.shape[1], block) for part in keys.forms[0].pages)
    splits = min(tiles, max(1, PROGRAMS // (batch * heads)))
    tiles_each = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, tiles_each)
    forms = (keys.forms[0], keys.forms[-1], values.forms[0], values.forms[-1])
    parts = [*(form.pages for form in forms), tables.pages[: keys.pages]]
    rows_of = [[page.data_ptr() for page in part] for part in parts]
    addresses = torch.tensor(rows_of, dtype=torch.int64).to(query.device, non_blocking=True)
    found = query.new_empty(2, batch, heads, splits, rows, dtype=torch.float32)
    sums = query.new_empty(batch, heads, splits, rows, values.rank, dtype=torch.float32)
    columns = None if tokens.sinks is None else tokens.sinks[0].contiguous()
    strides = [0, 0, 0]
    if mask is not None:
        mask = mask.contiguous()
        strides = [0 if size == 1 else step for size, step in zip(mask.shape[:3], mask.stride(), strict=False)]
    k_groups, k_size = groups_of(keys.rank)
    v_groups, v_size = groups_of(values.rank)
    _attend[(splits, batch * heads)](
        query.contiguous(),
        decoders.keys,
        decoders.keys if decoders.key_mean is None else decoders.key_mean,
        addresses,
        addresses if columns is None else columns,
        found if mask is None else mask,
        found[0],
        found[1],
        sums,
        len(keys),
        len(tables),
        keys.pages,
        tiles,
        tiles_each,
        scale,
        *strides,
        HEADS=heads,
        ROWS=rows,
        WIDTH=width,
        HALF=half,
        K_RANK=keys.rank,
        V_RANK=values.rank,
        K_BITS=keys.bits,
        V_BITS=values.bits,
        K_GROUPS=k_groups,
        V_GROUPS=v_groups,
        K_SIZE=k_size,
        V_SIZE=v_size,
        PAGE=paging.PAGE,
        TABLE_BATCH=tables.pages[0].shape[1],
        SINKS=0 if columns is None else columns.shape[1],
        MEAN=decoders.key_mean is not None,
        MASK=mask is not None,
        TYPE=TYPES[query.dtype],
        TABLE=TYPES[tables.pages[0].dtype],
        ROWS_PAD=padded(rows),
        HALF_PAD=padded(half),
        REST_PAD=padded(width - 2 * half),
        V_PAD=v_pad,
        CHUNK=CHUNK,
        BLOCK=block,
    )
    return found[0], found[1], sums


def padded(count: int) -> int:
    """Returns the power of two, 16 at least, that a matrix product of the kernel takes for so many entries."""
    return max(16, triton.next_power_of_2(count))


def block_of(rank: int) -> int:
    """Returns how many tokens a tile has."""
    return 64 if rank <= 128 else 32
