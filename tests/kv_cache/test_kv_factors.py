"""Moments, factors, training and allocation: the identities of the method in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache import (
    Factors,
    KVShrinkSettings,
    Moments,
    allocate_ranks,
    asvd_init,
    balanced,
    encoder_of,
    gram_loss,
    rank_of_ratio,
    reconstruction_loss,
    svd_init,
    train_factors,
    whitened_init,
)

H, C, T = 12, 8, 200
SEEDS = st.integers(0, 10_000)


def problem(seed=0, width=H):
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=g, dtype=torch.float64)
    x = torch.randn(T, width, generator=g, dtype=torch.float64) @ mixing * torch.logspace(0, 1.5, width)
    return x, torch.randn(width, C, generator=g, dtype=torch.float64)


def inits(x, w, rank):
    return {
        "svd": svd_init(w, rank),
        "asvd": asvd_init(w, x.abs().mean(0), rank),
        "whitened": whitened_init(x.T @ x, w, rank),
    }


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, parts=st.integers(1, 5), centred=st.booleans())
def test_moments_do_not_depend_on_how_the_stream_is_cut(seed, parts, centred):
    x, _ = problem(seed)
    moments = Moments(H)
    for part in x.float().chunk(parts):
        moments.update(part[None])
    x = x.float().double()
    torch.testing.assert_close(moments.mean(), x.mean(0), rtol=1e-12, atol=1e-12)
    expected = torch.cov(x.T, correction=0) if centred else x.T @ x / T
    torch.testing.assert_close(moments.second(centred=centred), expected, rtol=1e-9, atol=1e-9)
    again = Moments.from_state(moments.state_dict())
    assert again.count == moments.count == T
    assert torch.equal(again.gram, moments.gram)


def test_moments_take_what_is_valid_only():
    x, _ = problem()
    valid = torch.arange(T) % 3 > 0
    one, two = Moments(H), Moments(H)
    one.update(x.view(2, T // 2, H), valid.view(2, T // 2))
    two.update(x[valid])
    torch.testing.assert_close(one.gram, two.gram)
    with pytest.raises(LossplugError, match="not finite"):
        one.update(torch.full((1, H), math.inf))


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, rank=st.integers(1, C))
def test_every_code_is_a_function_of_the_key(seed, rank):
    x, w = problem(seed)
    for name, (a, b) in inits(x, w, rank).items():
        torch.testing.assert_close(x @ a, (x @ w) @ encoder_of(b), rtol=1e-7, atol=1e-7, msg=name)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_full_rank_is_exact(seed):
    x, w = problem(seed)
    for name, (a, b) in inits(x, w, C).items():
        torch.testing.assert_close(x @ a @ b, x @ w, rtol=1e-8, atol=1e-8, msg=name)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, rank=st.integers(1, C - 1))
def test_whitened_is_the_optimum_and_its_error_the_tail(seed, rank):
    x, w = problem(seed)
    errors = {name: float((x @ w - x @ a @ b).square().sum()) for name, (a, b) in inits(x, w, rank).items()}
    tail = float(torch.linalg.svdvals(x @ w)[rank:].square().sum())
    assert errors["whitened"] == pytest.approx(tail, rel=1e-8)
    assert errors["whitened"] <= min(errors["svd"], errors["asvd"]) * (1 + 1e-9)
    # SVD-LLM's way: whiten by Cholesky, truncate, undo
    root = torch.linalg.cholesky(x.T @ x)
    u, s, v = torch.linalg.svd(root.T @ w, full_matrices=False)
    product = torch.linalg.solve(root.T, u[:, :rank] * s[:rank]) @ v[:rank]
    a, b = whitened_init(x.T @ x, w, rank)
    torch.testing.assert_close(a @ b, product, rtol=1e-6, atol=1e-6)
    # and from the keys alone
    e, d = whitened_init((x @ w).T @ (x @ w), None, rank)
    torch.testing.assert_close(x @ w @ e @ d, x @ a @ b, rtol=1e-6, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, rank=st.integers(1, C - 1))
def test_a_metric_counts_the_error_where_it_arrives(seed, rank):
    x, w = problem(seed)
    out = torch.randn(C, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = x.T @ x
    a, b = whitened_init(gram, w, rank, out @ out.T)
    error = float(((x @ w - x @ a @ b) @ out).square().sum())
    assert error == pytest.approx(float(torch.linalg.svdvals(x @ w @ out)[rank:].square().sum()), rel=1e-3)
    plain = torch.matmul(*whitened_init(gram, w, rank))
    assert error <= float(((x @ w - x @ plain) @ out).square().sum()) * (1 + 1e-6)
    even = torch.matmul(*whitened_init(gram, w, rank, 3.0 * torch.eye(C)))
    torch.testing.assert_close(even, plain, rtol=1e-6, atol=1e-6)


def test_svd_is_the_best_for_white_inputs_and_asvd_for_diagonal_ones():
    x, w = problem()
    white = torch.linalg.qr(x)[0]
    a, b = svd_init(w, 3)
    assert float((white @ (w - a @ b)).square().sum()) == pytest.approx(
        float(torch.linalg.svdvals(white @ w)[3:].square().sum())
    )
    scale = torch.linspace(0.5, 4, H, dtype=torch.float64)
    a, b = asvd_init(w, scale - 1e-6, 3, alpha=1.0)
    diagonal = white * scale
    assert float((diagonal @ (w - a @ b)).square().sum()) == pytest.approx(
        float(torch.linalg.svdvals(diagonal @ w)[3:].square().sum())
    )


def test_asvd_ignores_a_factor_of_the_scale():
    x, w = problem()
    scale = x.abs().mean(0)
    a, b = asvd_init(w, scale - 1e-6, 3)
    c, d = asvd_init(w, 7 * scale - 1e-6, 3)
    torch.testing.assert_close(a @ b, c @ d, rtol=1e-9, atol=1e-9)
    a, b = asvd_init(w, scale, 3, alpha=0.0)
    torch.testing.assert_close(a @ b, torch.matmul(*svd_init(w, 3)), rtol=1e-9, atol=1e-9)


def test_a_mean_never_hurts_and_balancing_changes_nothing():
    x, _ = problem(width=C)
    x = x + 30
    moments = Moments(C)
    moments.update(x)

    def error(centred):
        second = moments.second(centred=centred)
        made = Factors(*whitened_init(second, None, 3), moments.mean() if centred else None)
        even = balanced(made, second)
        torch.testing.assert_close(even.rebuild(even.code(x)), made.rebuild(made.code(x)), rtol=1e-7, atol=1e-7)
        code = even.code(x)
        torch.testing.assert_close(code.square().mean(0), torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=1e-6)
        return float((x - made.rebuild(made.code(x))).square().sum())

    assert error(True) <= error(False)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, rank=st.integers(1, C))
def test_the_loss_from_moments_is_the_streamed_one(seed, rank):
    x, w = problem(seed)
    a, b = (t.requires_grad_() for t in asvd_init(w, x.abs().mean(0), rank))
    streamed, formed = reconstruction_loss(x, w, a, b), gram_loss(x.T @ x / T, w, a, b)
    torch.testing.assert_close(formed, streamed, rtol=1e-8, atol=1e-10)
    for one, two in zip(torch.autograd.grad(streamed, (a, b)), torch.autograd.grad(formed, (a, b)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


def test_training_ends_between_its_start_and_the_closed_form():
    x, w = problem()
    gram, rank = x.T @ x / T, 3
    start = asvd_init(w, x.abs().mean(0), rank)
    end = train_factors(gram, w, *start, steps=3000, lr=1e-2)
    best = gram_loss(gram, w, *whitened_init(gram, w, rank))
    first, last = gram_loss(gram, w, *start), gram_loss(gram, w, *end)
    assert best * (1 - 1e-9) <= last < first
    assert last <= best * 1.05
    # a batch of layers trains as each alone, and no steps change nothing
    both = [torch.stack([t, t]) for t in (gram, w, *start)]
    pair = train_factors(*both, steps=5, lr=1e-2)
    alone = train_factors(gram, w, *start, steps=5, lr=1e-2)
    torch.testing.assert_close(pair[0][1], alone[0])
    assert torch.equal(train_factors(gram, w, *start, steps=0)[0], start[0])


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, budget=st.integers(3, 24))
def test_allocation_is_optimal_for_equal_costs(seed, budget):
    g = torch.Generator().manual_seed(seed)
    spectra = [torch.rand(8, generator=g).sort(descending=True).values for _ in range(3)]
    ranks = allocate_ranks(spectra, [1.0] * 3, budget)
    assert sum(ranks) == budget
    assert min(ranks) >= 1

    def error(split):
        return sum(float(s[r:].sum() / s.sum()) for s, r in zip(spectra, split, strict=True))

    others = ((i, j, budget - i - j) for i in range(1, 9) for j in range(1, 9))
    assert error(ranks) <= min(error(o) for o in others if 1 <= o[2] <= 8) + 1e-6


def test_allocation_spends_by_cost_and_weight():
    even = [torch.ones(8)] * 2
    assert allocate_ranks(even, [1.0, 1.0], 8, weights=[10.0, 1.0]) == [7, 1]
    assert allocate_ranks(even, [4.0, 1.0], 12)[1] == 8
    with pytest.raises(LossplugError, match=r"budget of 1 bytes per token is too small.*takes 5 bytes"):
        allocate_ranks(even, [4.0, 1.0], 1)


def test_ranks_of_ratios():
    assert [rank_of_ratio(192, r) for r in (0.0, 0.5, 0.8, 0.99)] == [192, 96, 38, 1]
    assert rank_of_ratio(10, 0.8) == 2  # not 1, which 10 * (1 - 0.8) < 2 would round to
    with pytest.raises(LossplugError, match=r"the rank rounds to 0.*Remove less"):
        rank_of_ratio(192, 0.999)
    with pytest.raises(LossplugError, match=r"ratio is 1, allowed is \[0, 1\)"):
        rank_of_ratio(192, 1)
    with pytest.raises(LossplugError, match=r"the rank is 9, allowed is 1 to the width of 8 channels"):
        svd_init(torch.ones(H, 8), 9)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"k_ratio": 1.0}, "k_ratio is 1.0"),
        ({"v_ratio": -0.1}, "v_ratio is -0.1"),
        ({"budget": 0.0}, "budget is 0.0"),
        ({"budget": 0.2, "bytes_per_token": 100.0}, "both budget and bytes_per_token"),
        ({"window": 0}, "window is 0, allowed are whole numbers from 1"),
        ({"init": "random"}, "init is 'random'"),
        ({"k_bits": 3}, "bits is 3, allowed are 16, 8, 4, 2"),
        ({"allocation": "even"}, "allocation is 'even'"),
        ({"steps": -1}, "steps is -1"),
    ],
)
def test_bad_settings(bad, words):
    with pytest.raises(LossplugError, match=words.replace("[", r"\[")):
        KVShrinkSettings(**bad)
