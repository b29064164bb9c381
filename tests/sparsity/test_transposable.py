"""The identities of the transposable card, against brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug import LossplugError
from lightning_lossplug.sparsity import mvue24, nm_mask, tile_patterns, transposable_mask
from lightning_lossplug.sparsity.transposable import _flow

PATTERNS = [(1, 2), (1, 3), (1, 4), (2, 4), (3, 4), (2, 6), (4, 8), (1, 8)]


def weight_of(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def counts(mask, m):
    rows = mask.reshape(mask.shape[0], -1, m).sum(2)
    columns = mask.t().reshape(mask.shape[1], -1, m).sum(2)
    return rows, columns


def mass(weight, mask):
    return float((weight.abs() * mask).sum())


def test_numbers_of_patterns():
    assert [len(tile_patterns(n, 4)) for n in (1, 2, 3)] == [24, 90, 24]


@settings(max_examples=25, deadline=None)
@given(
    pattern=st.sampled_from([(1, 2), (1, 3), (1, 4), (2, 4), (3, 4), (2, 6), (4, 8), (1, 8)]), seed=st.integers(0, 999)
)
def test_counts_masses_and_the_transpose(pattern, seed):
    n, m = pattern
    weight = weight_of((2 * m, 3 * m), seed)
    exact, greedy = transposable_mask(weight, n, m), transposable_mask(weight, n, m, "greedy")
    for found in counts(exact, m):
        assert bool((found == n).all())
    for found in counts(greedy, m):
        assert bool((found <= n).all())
    # A greedy mask that is short of N somewhere may keep a little more than any mask with exactly N everywhere.
    assert 1.02 * mass(weight, exact) >= mass(weight, greedy) >= 0.5 * mass(weight, exact)
    assert torch.equal(transposable_mask(weight.t(), n, m), exact.t())
    assert mass(weight, exact) <= mass(weight, nm_mask(weight, n, m)) + 1e-12


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 3), seed=st.integers(0, 999))
def test_the_flow_finds_the_best_of_all_patterns(n, seed):
    weight = weight_of((8, 4, 4), seed).abs()
    patterns = tile_patterns(n, 4).double()
    best = torch.einsum("bij,pij->bp", weight, patterns).amax(1)
    assert torch.allclose((weight * _flow(weight, n)).sum((1, 2)), best, rtol=1e-9)


def test_the_flow_on_larger_tiles_is_an_assignment():
    # With N = 1 a tile is the assignment problem: brute force over permutations.
    weight = weight_of((6, 6, 6), 3).abs()
    rows = torch.arange(6)
    best = torch.stack([weight[:, rows, list(p)].sum(1) for p in itertools.permutations(range(6))]).amax(0)
    assert torch.allclose((weight * _flow(weight, 1)).sum((1, 2)), best, rtol=1e-9)


@pytest.mark.parametrize("m", [4, 8])
def test_greedy_takes_entries_in_descending_order_while_there_is_room(m):
    weight = weight_of((4 * m, 4 * m), 0)
    mask = transposable_mask(weight, m // 2, m, "greedy")
    for tile, found in (
        (weight[i : i + m, j : j + m].abs(), mask[i : i + m, j : j + m])
        for i, j in itertools.product(range(0, 4 * m, m), repeat=2)
    ):
        expected = torch.zeros(m, m, dtype=torch.bool)
        for place in tile.flatten().argsort(descending=True).tolist():
            i, j = divmod(place, m)
            expected[i, j] = int(expected[i].sum()) < m // 2 and int(expected[:, j].sum()) < m // 2
        assert torch.equal(found, expected)
    exact = transposable_mask(weight, m // 2, m)
    assert 0.97 < mass(weight, mask) / mass(weight, exact) < 1


def test_axes_of_convolutions_and_experts():
    weight = weight_of((8, 12, 3, 3), 1)
    mask = transposable_mask(weight, 2, 4)
    for i, j in itertools.product(range(3), repeat=2):
        assert torch.equal(mask[:, :, i, j], transposable_mask(weight[:, :, i, j], 2, 4))
    experts = weight_of((3, 8, 12), 2)
    assert torch.equal(transposable_mask(experts, 2, 4, axes=(1, 2))[1], transposable_mask(experts[1], 2, 4))
    scores = weight.abs() + 1
    assert torch.equal(transposable_mask(weight, 2, 4, scores=scores), transposable_mask(scores, 2, 4))
    assert torch.equal(transposable_mask(experts[0], 2, 4, "exhaustive24"), transposable_mask(experts[0], 2, 4))
    assert bool(transposable_mask(experts[0], 4, 4).all())
    half = weight_of((8, 8), 4, torch.bfloat16)
    assert torch.equal(transposable_mask(half, 2, 4), transposable_mask(half.double(), 2, 4))


def test_mvue_keeps_two_of_four_and_its_mean_is_the_input():
    torch.manual_seed(0)
    x = torch.tensor([[0.1, -2.0, 0.7, 1.3], [5.0, 0.0, 0.0, 0.0], [1.0, 0.0, -3.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    x = x.double()
    draws = torch.stack([mvue24(x) for _ in range(8_000)])
    assert int((draws != 0).sum(-1).max()) == 2
    assert torch.equal(draws[:, 1:3], x[1:3].expand(8_000, 2, 4))
    spread = draws.std(0) / 8_000**0.5
    assert bool(((draws.mean(0) - x).abs() <= 4.5 * spread + 1e-12).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: transposable_mask(torch.randn(8, 8), solver="best"), "solver is 'best'"),
        (lambda: transposable_mask(torch.randn(8, 8), 1, 4, "exhaustive24"), "exhaustive24 can't search 1:4"),
        (lambda: transposable_mask(torch.randn(6, 8)), "tiles of 4 x 4 don't divide"),
        (lambda: transposable_mask(torch.randn(8)), "has no axes"),
        (lambda: transposable_mask(torch.full((4, 4), float("nan"))), "NaN"),
        (lambda: mvue24(torch.randn(6)), "no multiple of 4"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(LossplugError, match=message):
        call()
