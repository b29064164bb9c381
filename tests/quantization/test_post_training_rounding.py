"""Rounding methods: identities of GPTQ, AdaRound and LoRC, and better layers than rounding to nearest."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from lightning_lossplug import LossplugError
from lightning_lossplug.quantization.post import (
    adaround,
    adaround_beta,
    adaround_init,
    adaround_regularizer,
    gptq,
    lorc,
    rectified_sigmoid,
)

DOUBLE = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def pixels():
    """Correlated inputs of real data."""
    return torch.tensor(load_digits().data, dtype=DOUBLE)


def nearest(w, s, low=-7, high=7, z=0.0):
    return ((w / s).round() + z).clamp(low, high).sub(z) * s


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block_size", [4, 128])
def test_gptq_of_uncorrelated_inputs_is_rounding(act_order, block_size):
    w = random(6, 20)
    s = w.abs().amax(1, keepdim=True) / 7
    moments = 3 * torch.eye(20, dtype=DOUBLE)
    q = gptq(w, moments, s, block_size=block_size, act_order=act_order)
    torch.testing.assert_close(q, nearest(w, s), rtol=0, atol=1e-12)
    z = torch.full_like(s, 3.0)
    q = gptq(w, moments, s, z, 0, 15)
    torch.testing.assert_close(q, nearest(w, s, 0, 15, z), rtol=0, atol=1e-12)


def exact_compensation(w, h, s):
    """One column at a time: the best values of the rest, given those that are fixed, by solving for them."""
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    rest, out = w.clone(), torch.empty_like(w)
    for j in range(w.shape[1]):
        out[:, j] = (rest[:, j] / s[:, 0]).round() * s[:, 0]
        if j + 1 < w.shape[1]:
            gap = (rest[:, j] - out[:, j])[:, None]
            rest[:, j + 1 :] += gap @ torch.linalg.solve(h[j + 1 :, j + 1 :], h[j + 1 :, j : j + 1]).T
    return out


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), columns=st.integers(2, 12), block_size=st.integers(1, 8))
def test_gptq_equals_exact_compensation(seed, columns, block_size):
    w, x = random(3, columns, seed=seed), random(40, columns, seed=seed + 1) @ random(columns, columns, seed=seed + 2)
    s = w.abs().amax(1, keepdim=True) / 7
    q = gptq(w, x.T @ x, s, low=-100, high=100, damp=0.01, block_size=block_size)
    torch.testing.assert_close(q, exact_compensation(w, x.T @ x, s), rtol=0, atol=1e-8)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rounding_on_real_inputs(act_order):
    x, w = pixels(), random(32, 64)
    s = w.abs().amax(1, keepdim=True) / 7
    q = gptq(w, x.T @ x, s, act_order=act_order)
    alive = x.abs().sum(0) > 0
    assert (q[:, ~alive] == 0).all()  # pixels that are always black
    codes = q / s
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-9)
    assert codes.abs().max() <= 7 + 1e-9
    error, plain = ((x @ (a - w).T).square().sum() for a in (q, nearest(w, s)))
    assert error < 0.5 * plain


def test_gptq_measures_groups_when_it_reaches_them():
    x, w = pixels()[:, 8:56], random(16, 48)
    s, z = torch.zeros(16, 48, dtype=DOUBLE), torch.zeros(16, 48, dtype=DOUBLE)

    def regrid(group):
        assert group.shape == (16, 16)
        return group.abs().amax(1, keepdim=True) / 7, torch.zeros(16, 1, dtype=DOUBLE)

    whole = gptq(w, x.T @ x, s, z, block_size=128, group_size=16, regrid=regrid)
    torch.testing.assert_close(s[:, :1], w[:, :16].abs().amax(1, keepdim=True) / 7)
    assert (s[:, 16:32] == s[:, 16:17]).all()
    assert (s[:, 16] != w[:, 16:32].abs().amax(1) / 7).any()
    for block_size in (5, 16, 40):
        cut = gptq(w, x.T @ x, s.clone(), z.clone(), block_size=block_size, group_size=16, regrid=regrid)
        torch.testing.assert_close(cut, whole, rtol=0, atol=1e-8)


def test_gptq_of_singular_moments():
    x = torch.ones(5, 4, dtype=DOUBLE)
    w = random(2, 4)
    s = torch.full((2, 1), 0.1, dtype=DOUBLE)
    q = gptq(w, x.T @ x, s, low=-100, high=100, damp=0.0)
    assert q.isfinite().all()
    with pytest.raises(LossplugError, match="no inverse"):
        gptq(w, torch.full((4, 4), math.nan, dtype=DOUBLE), s)
    with pytest.raises(LossplugError, match="damp is -1"):
        gptq(w, x.T @ x, s, damp=-1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), z=st.sampled_from([0.0, 3.0]))
def test_adaround_starts_at_the_weight_and_ends_on_the_grid(seed, z):
    w = random(5, 7, seed=seed)
    s = torch.full((5, 1), 0.2, dtype=DOUBLE)
    zero = torch.full((5, 1), z, dtype=DOUBLE)
    low, high = (-100, 100)
    v = adaround_init(w, s)
    torch.testing.assert_close(rectified_sigmoid(v), w / s - (w / s).floor(), rtol=0, atol=1e-12)
    torch.testing.assert_close(adaround(w, v, s, zero, low, high), w, rtol=0, atol=1e-12)
    hard = adaround(w, v, s, zero, low, high, hard=True)
    fraction = w / s - (w / s).floor()
    up = ((w / s).floor() + (fraction >= 0.5)) * s
    torch.testing.assert_close(hard, up, rtol=0, atol=1e-12)
    moved = adaround(w, random(5, 7, seed=seed + 1), s, zero, low, high, hard=True)
    steps = (moved / s - (w / s).floor()).round(decimals=9)
    assert set(steps.unique().tolist()) <= {0.0, 1.0}
    assert (adaround(w, v, s, zero, -2, 2).abs().max() / 0.2 - 2) <= z + 1e-9


def test_adaround_regularizer_and_schedule():
    ends = torch.tensor([-20.0, 20.0], dtype=DOUBLE)
    assert adaround_regularizer(ends, 2.0) == 0
    assert adaround_regularizer(torch.zeros(3, dtype=DOUBLE), 2.0) == 3
    assert [adaround_beta(f) for f in (0.0, 0.19, 1.0)] == [20.0, 20.0, 2.0]
    assert adaround_beta(0.6) == pytest.approx(11.0)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), rank=st.integers(1, 6))
def test_lorc_leaves_the_tail_of_the_spectrum(seed, rank):
    w = random(6, 9, seed=seed)
    q = nearest(w, w.abs().amax(1, keepdim=True) / 3, -3, 3)
    a, b = lorc(w, q, rank, factor_bits=32)
    singular = torch.linalg.svdvals(w - q)
    assert (w - q - a @ b).norm() == pytest.approx(float(singular[rank:].square().sum().sqrt()), abs=1e-9)
    if rank == 6:
        torch.testing.assert_close(q + a @ b, w, rtol=0, atol=1e-9)
    for bits, bound in ((16, 1e-2), (8, 0.1)):
        a, b = lorc(w, q, rank, factor_bits=bits)
        assert (w - q - a @ b).norm() <= singular[rank:].norm() + bound * singular.norm()


def test_lorc_refuses_a_rank_above_the_width():
    with pytest.raises(LossplugError, match="rank is 7, allowed is 1 to 6"):
        lorc(random(6, 9), random(6, 9), 7)
