"""Few-bit codes: packing, error bounds, bytes, the growing store."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.codes import (
    check_bits,
    code_bytes,
    dequantize_codes,
    groups_of,
    pack,
    quantize_codes,
    unpack,
)
from lightning_lossplug.kv_cache.size import BranchSize, cache_bytes, dense_token_bytes, shrunk_token_bytes
from lightning_lossplug.kv_cache.store import CodeStore, nbytes

BITS = st.sampled_from([2, 4, 8])
RANKS = st.integers(1, 150)


@settings(max_examples=40, deadline=None)
@given(bits=BITS, count=st.integers(1, 40), seed=st.integers(0, 1000))
def test_packing_is_exact(bits, count, seed):
    values = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(values, bits)
    assert packed.shape[-1] == -(-count * bits // 8)
    assert torch.equal(unpack(packed, count, bits), values)


@settings(max_examples=40, deadline=None)
@given(bits=BITS, rank=RANKS, seed=st.integers(0, 1000), offset=st.sampled_from([0.0, 3.0, -20.0]))
def test_error_is_at_most_half_a_step_wherever_zero_is(bits, rank, seed, offset):
    codes = torch.randn(2, 3, rank, generator=torch.Generator().manual_seed(seed)) + offset
    packed, ranges = quantize_codes(codes, bits)
    assert packed.dtype is torch.uint8
    assert packed.shape[-1] + 2 * ranges[0, 0].numel() == code_bytes(rank, bits, 4)
    back = dequantize_codes(packed, ranges, rank, bits, torch.float32)
    step = ranges[..., 1].float().amax(-1, keepdim=True)
    rounding = 1e-3 * (codes.abs().amax() + 1)  # of the float16 range
    assert bool(((back - codes).abs() <= step / 2 + rounding * 2**bits / 8 + rounding).all())
    again = dequantize_codes(*quantize_codes(back, bits), rank, bits, torch.float32)
    assert (again - back).abs().max() <= 3 * rounding


def test_constant_groups_and_single_channels_are_exact():
    for codes in (torch.full((1, 2, 70), 0.5), torch.tensor([[[-2.0]]])):
        for bits in (2, 4, 8):
            back = dequantize_codes(*quantize_codes(codes, bits), codes.shape[-1], bits, torch.float32)
            torch.testing.assert_close(back, codes)


def test_groups_are_even_and_at_most_64_wide():
    assert [groups_of(r) for r in (1, 64, 65, 192)] == [(1, 1), (1, 64), (2, 33), (3, 64)]


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_a_store_grows_token_by_token(bits):
    codes = torch.randn(2, 9, 70, generator=torch.Generator().manual_seed(0))
    whole, pieces = CodeStore(70, bits), CodeStore(70, bits)
    whole.append(codes)
    for part in codes.split([4, 1, 1, 3], dim=1):
        pieces.append(part)
    assert len(pieces) == 9
    assert torch.equal(whole.read(torch.float32), pieces.read(torch.float32))
    assert nbytes(*pieces.parts) == 2 * 9 * code_bytes(70, bits, 4)
    if bits == 16:
        assert torch.equal(pieces.read(torch.float32), codes)
    pieces.apply(lambda t: t[1:])
    assert torch.equal(pieces.read(torch.float32), whole.read(torch.float32)[1:])
    pieces.clear()
    assert len(pieces) == 0


def test_bytes_of_the_card():
    branches = [BranchSize(192, 38, 16), BranchSize(192, 38, 4)] * 30
    assert dense_token_bytes(branches, 2) == 30 * 384 * 2
    assert shrunk_token_bytes(branches, 2) == 30 * (76 + 19 + 4)
    full = cache_bytes(branches, tokens=1024, window=32, element_bytes=2, batch=3, rotary=128)
    assert full == 3 * (992 * 30 * 99 + 32 * 30 * 768) + 1024 * 128
    more = cache_bytes(branches, tokens=1024, window=32, element_bytes=2, batch=3, rotary=128, sinks=4)
    assert more - full == 3 * 4 * (30 * 768 + 8)
    assert cache_bytes(branches, 20, 32, 2) == 20 * 30 * 768  # nothing is old yet


def test_bad_bits():
    with pytest.raises(LossplugError, match="bits is 5"):
        check_bits("here", 5)
