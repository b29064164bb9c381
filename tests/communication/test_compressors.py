"""Compressors: their guarantees, the values that travel, and the bytes they take."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.communication import (
    Draw,
    block_topk,
    create,
    lowrank,
    natural,
    pack_bits,
    qsgd,
    randk,
    scaled_sign,
    topk,
    unpack_bits,
)
from lightning_lossplug.errors import LossplugError

few = settings(max_examples=25, deadline=None)
vectors = st.lists(st.integers(-6, 6), min_size=1, max_size=70).map(lambda x: torch.tensor(x, dtype=torch.float64) / 4)

COMPRESSORS = {
    "identity": create("identity"),
    "topk": create("topk", ratio=0.2),
    "block_topk": create("block_topk", block_size=7),
    "randk": create("randk", ratio=0.2),
    "randk unbiased": create("randk", ratio=0.2, unbiased=True),
    "scaled_sign": create("scaled_sign"),
    "natural": create("natural"),
    "natural unbiased": create("natural", unbiased=True),
    "qsgd 1": create("qsgd", levels=1),
    "qsgd 7": create("qsgd", levels=7),
    "qsgd 100 unbiased": create("qsgd", levels=100, unbiased=True),
    "lowrank": create("lowrank", rank=2),
}


def matrix(seed=0, dtype=torch.float64):
    return torch.randn(12, 9, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def many(compressor, v, draws=1500):
    return torch.stack([compressor(v, Draw(step=step)) for step in range(draws)])


def by_definition(v, k):
    order = sorted(range(len(v)), key=lambda i: (-abs(float(v[i])), i))[:k]
    return torch.stack([v[i] if i in order else torch.zeros_like(v[i]) for i in range(len(v))])


@few
@given(v=vectors, share=st.floats(0.01, 1.0))
def test_topk_keeps_the_largest_and_ties_go_to_the_lowest_position(v, share):
    k = max(1, round(share * len(v)))
    kept = topk(v, k)
    assert torch.equal(kept, by_definition(v, k))
    assert torch.equal(topk(kept, k), kept)
    assert (kept - v).square().sum() <= (1 - k / len(v)) * v.square().sum() + 1e-12


@few
@given(v=vectors, block=st.integers(1, 20))
def test_block_topk_keeps_the_first_largest_of_every_block(v, block):
    expected = torch.cat([by_definition(part, 1) for part in v.split(block)])
    assert torch.equal(block_topk(v, block), expected)
    assert (expected - v).square().sum() <= (1 - 1 / min(block, len(v))) * v.square().sum() + 1e-12


@few
@given(v=vectors)
def test_scaled_sign_loses_exactly_what_its_formula_says(v):
    scale, signed = v.abs().sum() / len(v), scaled_sign(v)
    torch.testing.assert_close(signed.abs(), scale.expand_as(v))
    assert bool((signed * v >= 0).all())
    lost = v.square().sum() - v.abs().sum() ** 2 / len(v)
    torch.testing.assert_close((signed - v).square().sum(), lost)


@few
@given(codes=st.lists(st.integers(0, 255), min_size=1, max_size=40), bits=st.sampled_from([1, 2, 4, 8]))
def test_bits_come_back(codes, bits):
    codes = (torch.tensor(codes) % 2**bits).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.numel() == -(-len(codes) * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, len(codes)), codes)


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("shape", [(12, 9), (5, 3, 4), (61,), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_messages_have_the_announced_size_and_say_what_the_function_returns(name, shape, dtype):
    compressor, draw = COMPRESSORS[name], Draw(3, 4, "w", 1)
    v = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    message = compressor.encode(v, draw)
    assert sum(part.nbytes for part in message) == compressor.message_bytes(shape, dtype.itemsize)
    found = compressor.decode(message, torch.empty_like(v), draw)
    assert (found.shape, found.dtype) == (v.shape, v.dtype)
    own, shared = draw.own(v.device), draw.shared(v.device)
    k, scale = max(1, round(0.2 * v.numel())), 1.0
    if not compressor.unbiased and compressor.name in ("natural", "qsgd"):
        scale = 1 / (1 + compressor.omega(v.numel()))
    expected = {
        "identity": lambda: v,
        "topk": lambda: topk(v, k),
        "block_topk": lambda: block_topk(v, 7),
        "randk": lambda: randk(v, k, shared, compressor.unbiased),
        "scaled_sign": lambda: scaled_sign(v),
        "natural": lambda: scale * natural(v, own),
        "qsgd": lambda: scale * qsgd(v, compressor.levels, own),
        "lowrank": lambda: lowrank(v, 2, shared),
    }[compressor.name]()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_guarantee_on_average(name):
    compressor, v = COMPRESSORS[name], matrix()
    found = many(compressor, v)
    lost = float((found - v).square().sum((1, 2)).mean() / v.square().sum())
    if compressor.unbiased:
        assert lost <= compressor.omega(v.numel()) * 1.05
        spread = found.std(0) / math.sqrt(len(found))
        assert bool(((found.mean(0) - v).abs() <= 5 * spread + 1e-12).all())
    else:
        assert lost <= 1 - (compressor.contraction(v.numel()) or 0) + 0.02


@pytest.mark.parametrize("name", [name for name, c in COMPRESSORS.items() if c.homogeneous])
def test_scaling_goes_through(name):
    compressor, v = COMPRESSORS[name], matrix()
    torch.testing.assert_close(compressor(3.7 * v, Draw(1)), 3.7 * compressor(v, Draw(1)))


@pytest.mark.parametrize("name", COMPRESSORS)
def test_zero_stays_zero(name):
    v = torch.zeros(12, 9)
    assert torch.equal(COMPRESSORS[name](v), v)


def test_natural_picks_the_powers_of_two_around():
    v = torch.tensor([3.0, -5.0, 1.0, -0.25, 1e-30, 1e-42, 3e38])
    found = torch.stack([natural(v, torch.Generator().manual_seed(seed)) for seed in range(200)])
    assert set(found[:, 0].tolist()) == {2.0, 4.0}
    assert set(found[:, 1].tolist()) == {-4.0, -8.0}
    assert bool((found[:, 2] == 1).all() and (found[:, 3] == -0.25).all())
    assert bool((found[:, 5] == 0).all() and (found[:, 6] == 2.0**127).all())
    assert float((found[:, 0] == 4).float().mean()) == pytest.approx(0.5, abs=0.12)


def test_lowrank_is_exact_on_matrices_of_that_rank():
    v = matrix()[:, :2] @ matrix(1)[:2]
    torch.testing.assert_close(COMPRESSORS["lowrank"](v), v)


def test_draws_are_shared_or_own_and_differ_between_steps_and_names():
    def numbers(generator):
        return torch.rand(4, generator=generator).tolist()

    cpu = torch.device("cpu")
    assert numbers(Draw(rank=0).shared(cpu)) == numbers(Draw(rank=1).shared(cpu))
    drawn = [Draw(rank=0), Draw(rank=1), Draw(step=1), Draw(name="w"), Draw(seed=1)]
    assert len({tuple(numbers(draw.own(cpu))) for draw in drawn}) == len(drawn)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("topk", {"ratio": 0.0}),
        ("randk", {"ratio": 1.5}),
        ("block_topk", {"block_size": 0}),
        ("qsgd", {"levels": 128}),
        ("lowrank", {"rank": 0}),
        ("topk", {"levels": 3}),
        ("topc", {}),
    ],
)
def test_bad_options(name, options):
    with pytest.raises(LossplugError):
        create(name, **options)
