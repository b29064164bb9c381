"""S-STE, MaskLLM, transposable recipes and the search for patterns: the identities of their cards in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import (
    NMTSRSTE,
    NMMaskLLM,
    NMSettings,
    NMTechnique,
    NMTransposable,
    add_prior,
    nm_mask,
    nm_patterns,
    rescale,
    sampled_mask,
    search_patterns,
    soft_threshold,
)
from lightning_lossplug.sparsity.budget import allocate, kept_mass
from lightning_lossplug.surgery import fold

PATTERNS = [(2, 4), (1, 4), (3, 4), (2, 8), (1, 16)]


def weight_of(shape=(6, 16), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# S-STE


@settings(max_examples=30, deadline=None)
@given(pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 999), scale=st.floats(0.1, 10))
def test_soft_threshold(pattern, seed, scale):
    n, m = pattern
    weight = weight_of(seed=seed)
    soft = soft_threshold(weight, n, m)
    groups = weight.reshape(-1, m)
    largest_pruned = groups.abs().sort(dim=1).values[:, m - n - 1]
    expected = groups.sign() * (groups.abs() - largest_pruned[:, None]).clamp_min(0)
    assert torch.allclose(soft.reshape(-1, m), expected, rtol=1e-14)
    assert int((soft.reshape(-1, m) != 0).sum(1).max()) <= n
    assert torch.allclose(soft_threshold(weight * scale, n, m), soft * scale, rtol=1e-12)
    assert torch.equal(soft_threshold(weight, m, m), weight)
    assert rescale(weight, soft_threshold(weight, m, m)) == pytest.approx(1.0)
    near = weight + 1e-3 * weight_of(seed=seed + 1).clamp(-1, 1)
    assert float((soft_threshold(near, n, m) - soft).abs().max()) <= 2 * float((near - weight).abs().max()) + 1e-15


def test_soft_threshold_is_continuous_where_the_mask_jumps_and_zero_where_all_are_equal():
    a, b = torch.tensor([[[1.0, 2.0, 3.0, 2.0 + 1e-9]], [[1.0, 2.0 + 1e-9, 3.0, 2.0]]], dtype=torch.float64)
    assert not torch.equal(nm_mask(a, 2, 4), nm_mask(b, 2, 4))
    assert float((soft_threshold(a) - soft_threshold(b)).abs().max()) <= 2e-9
    assert torch.equal(soft_threshold(torch.full((1, 4), 0.3)), torch.zeros(1, 4))


def test_the_scale_is_the_best_one():
    weight = weight_of()
    soft = soft_threshold(weight)
    beta = float(rescale(weight, soft))
    error = [float((weight - b * soft).square().sum()) for b in (beta * 0.99, beta, beta * 1.01)]
    assert error[1] == min(error)
    assert rescale(torch.zeros(4), torch.zeros(4)) == 1


def attached(recipe, n=2, m=4, shape=(16, 8), **options):
    torch.manual_seed(0)
    layer = nn.Linear(shape[0], shape[1], bias=False).double()
    technique = NMTechnique(NMSettings(n, m, recipe, include=[""], **options))
    technique.attach(layer)
    technique.advance(Progress(0, 10))
    return technique, layer


@pytest.mark.parametrize("scale", ["fixed", "none"])
def test_sste_freezes_its_scale_and_folds(scale):
    technique, layer = attached("nm_sste", rescale=scale)
    transform = technique.layers[""].transform
    latent = layer._parameters["weight"]
    beta = rescale(latent, soft_threshold(latent)) if scale == "fixed" else 1.0
    assert float(transform.beta) == pytest.approx(float(beta), rel=1e-6)
    assert torch.allclose(layer.weight, transform.beta * soft_threshold(latent), rtol=1e-6)
    effective = layer.weight
    effective.retain_grad()
    F.linear(torch.randn(3, 16).double(), effective).square().sum().backward()
    assert torch.equal(latent.grad, effective.grad)
    with torch.no_grad():
        latent.mul_(3).add_(weight_of(latent.shape))
    before = float(transform.beta)
    technique.advance(Progress(1, 10))
    assert float(transform.beta) == before
    assert torch.equal(fold(layer).weight, layer.weight)
    technique.reset()
    assert float(transform.beta) == 1


# MaskLLM


@settings(max_examples=20, deadline=None)
@given(pattern=st.sampled_from([(2, 4), (1, 4), (2, 6), (4, 8)]), seed=st.integers(0, 999))
def test_sampled_masks(pattern, seed):
    n, m = pattern
    patterns = nm_patterns(n, m).double()
    assert torch.equal(patterns.sum(1), torch.full((len(patterns),), float(n), dtype=torch.float64))
    assert len({tuple(row) for row in patterns.tolist()}) == len(patterns)
    logits, noise = weight_of((5, len(patterns)), seed), weight_of((5, len(patterns)), seed + 1)
    mask = sampled_mask(logits, patterns, 1.0, 10.0, noise)
    assert torch.allclose(mask.sum(1), torch.full((5,), float(n), dtype=torch.float64), rtol=1e-12)
    cold = sampled_mask(logits, patterns, 1e-9, 10.0, noise)
    assert torch.allclose(cold, patterns[(10.0 * logits + noise).argmax(1)])
    known = patterns[logits.argmin(1)]
    strong = add_prior(logits, patterns, known, 1e6)
    assert torch.equal(patterns[strong.argmax(1)], known)
    assert torch.equal(add_prior(logits, patterns, known, 0.0), logits)
    assert torch.allclose(add_prior(logits, patterns, known, 2.0).mean(1), logits.mean(1))


def test_the_mean_overlap_is_the_papers_one_for_2_to_4():
    patterns = nm_patterns(2, 4)
    assert torch.equal((patterns @ patterns.t()).mean(1), torch.ones(6))


def test_maskllm_learns_logits_only_and_ends_with_the_pattern():
    technique, layer = attached("nm_maskllm", prior_strength=50.0)
    transform, latent = technique.layers[""].transform, layer._parameters["weight"]
    assert not latent.requires_grad
    assert (float(transform.tau), float(transform.kappa)) == (4.0, 100.0)
    known = nm_mask(latent, 2, 4)
    layer.eval()
    assert torch.equal(layer.weight, latent * known)
    layer.train()
    torch.manual_seed(1)
    layer(torch.randn(3, 16).double()).square().sum().backward()
    assert latent.grad is None
    assert float(transform.logits.grad.abs().sum()) > 0
    technique.advance(Progress(10, 10))
    assert float(transform.tau) == pytest.approx(0.05)
    assert float(transform.kappa) == 500.0
    plain = fold(layer)
    assert torch.equal((plain.weight != 0).reshape(-1, 4).sum(1), torch.full((32,), 2))
    assert plain.weight.requires_grad
    technique.detach(layer)
    assert layer.weight.requires_grad


def test_the_regulariser_is_the_gradient_of_its_energy():
    technique, layer = attached("nm_maskllm", weight_reg=0.3)
    transform, latent = technique.layers[""].transform, layer._parameters["weight"]
    transform.tau.fill_(2.0)
    transform.kappa.fill_(5.0)
    logits = transform.logits.detach().double().requires_grad_()
    soft = sampled_mask(logits, transform.patterns.double(), 2.0, 5.0)
    (-0.3 * (transform.to_groups(latent) * soft).square().sum()).backward()
    transform.logits.grad = torch.zeros_like(transform.logits)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    technique.before_step(optimizer, grad_scale=4.0)
    assert torch.allclose(transform.logits.grad.double(), 4 * logits.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("axis", [0, 1])
def test_maskllm_groups_lie_along_the_axis(axis):
    transform = NMMaskLLM(1, 4).build_transform(nn.Parameter(weight_of((8, 12))), axis, 1 - axis)
    values = weight_of((8, 12), 3)
    assert torch.equal(transform.to_weight(transform.to_groups(values)), values)
    mask = transform.to_weight(transform.choice())
    assert torch.equal(mask.movedim(axis, -1).reshape(-1, 4).sum(1), torch.ones(24, dtype=torch.long))


# Transposable recipes


def test_transposable_schedules():
    recipe = NMTSRSTE(2, 4)
    found = [recipe.plan(300).state(step) for step in range(301)]
    assert [s.decay for s in found[:250]] == [0.0] * 250
    assert [s.phase for s in found[250:]] == ["dense"] * 51
    assert (recipe.alpha, recipe.mask_update_every, recipe.penalty) == (6e-5, 40, 6e-5)
    assert NMTransposable().mask_update_every == 40
    still = NMTSRSTE(2, 4, dense_finish_fraction=0.0)
    assert not still.ends_dense
    assert still.plan(None).state(5).decay == 0.0
    assert "M = 4 does not divide the output axis of 10" in recipe.misfit(8, 10)


def test_tsrste_ends_dense_and_says_so():
    technique, layer = attached("nm_tsrste", alpha=0.1)
    assert float((layer.weight == 0).double().mean()) == 0.5
    technique.advance(Progress(9, 10))
    assert torch.equal(layer.weight, layer._parameters["weight"])
    assert "folding gives a dense model" in technique.finish()[0]


# Patterns under a budget


def test_kept_mass_is_concave_and_that_of_the_masks():
    weight = weight_of()
    curve = kept_mass(weight, 8)
    for n in range(1, 9):
        kept = (weight * nm_mask(weight, n, 8)).square().sum() / weight.square().sum()
        assert float(curve[n]) == pytest.approx(float(kept), rel=1e-12)
    steps = curve.diff()
    assert bool((steps.diff() <= 1e-15).all())


@settings(max_examples=20, deadline=None)
@given(budget=st.floats(0.13, 1.0), seed=st.integers(0, 999))
def test_the_allocation_is_the_best_one_for_equal_layers(budget, seed):
    spread = [weight_of((4, 16), seed + i) ** (2 * i + 1) for i in range(3)]
    curves = [kept_mass(weight, 8) for weight in spread]
    chosen = allocate(curves, [64] * 3, budget)
    assert sum(chosen) <= budget * 24 + 1e-6
    best = max(
        sum(float(curve[n]) for curve, n in zip(curves, choice, strict=True))
        for choice in itertools.product(range(1, 9), repeat=3)
        if sum(choice) <= budget * 24 + 1e-6
    )
    assert sum(float(curve[n]) for curve, n in zip(curves, chosen, strict=True)) == pytest.approx(best, rel=1e-9)


def test_patterns_of_a_model_feed_the_technique():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    with torch.no_grad():
        model[1].weight.pow_(5)  # a few large weights hold nearly everything
    patterns = search_patterns(model, 8, 0.5)
    assert int(patterns["1"].split(":")[0]) < int(patterns.get("0", "8:8").split(":")[0])
    technique = NMTechnique(NMSettings(recipe="nm_oneshot", include=patterns))
    technique.attach(model)
    technique.advance(Progress(0, 1))
    kept = sum(int((model[i].weight != 0).sum()) for i in (0, 1))
    assert kept <= 0.5 * 512


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nm_patterns(8, 16), "12870 patterns, allowed are 256"),
        (lambda: NMMaskLLM(tau_range=(1.0, 0.0)), "tau_range is"),
        (lambda: NMMaskLLM(weight_reg=-1.0), "weight_reg is -1.0"),
        (lambda: NMMaskLLM().tune(None, 0, None), "training length is unknown"),
        (lambda: NMTSRSTE(dense_finish_fraction=1.0), "dense_finish_fraction is 1.0"),
        (lambda: NMTSRSTE(finetune_fraction=0.1), "recipes that end sparse"),
        (lambda: NMTransposable(solver="exhaustive24", n=1), "exhaustive24 can't search 1:4"),
        (lambda: NMSettings(recipe="nm_sste", rescale="moving"), "rescale is 'moving'"),
        (lambda: search_patterns(nn.Linear(8, 8), 8, 0.05), "keeps more than the budget"),
        (lambda: search_patterns(nn.Linear(6, 8), 8), "no layer selected"),
        (lambda: allocate([torch.zeros(5)], [4], 2.0), "budget is 2.0"),
        (lambda: kept_mass(weight_of((4, 6)), 4), "don't divide axis 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(LossplugError, match=message):
        call()
