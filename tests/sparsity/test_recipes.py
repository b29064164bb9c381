"""The identities of the recipe cards in float64, and their schedules as tables."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug import LossplugError, registry
from lightning_lossplug.sparsity import (
    NMSRSTE,
    NMSTE,
    MdGfExponential,
    MdGfLinear,
    NMOneShot,
    SdGfGeometric,
    SdGfStepwise,
    decayed_ste,
    masked_ste,
    nm_mask,
)
from lightning_lossplug.sparsity.srste import srste_decay_, srste_penalty_

T = 1000


def states(recipe, total=T):
    plan = recipe.plan(total)
    return [plan.state(step) for step in range(total + 1)]


def starts(recipe, total=T):
    """First step of every (phase, n, m) run."""
    found, last = [], None
    for step, state in enumerate(states(recipe, total)):
        key = (state.phase, state.n, state.m)
        if key != last:
            found.append((step, *key))
            last = key
    return found


# What the forward pass reads


def test_masked_forward_and_identity_gradient():
    weight = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    x, mask = torch.randn(3, 8, dtype=torch.float64), nm_mask(weight, 2, 4)
    effective = masked_ste(weight, mask)
    effective.retain_grad()
    out = F.linear(x, effective)
    assert torch.equal(out, F.linear(x, weight * mask))
    out.square().sum().backward()
    assert torch.equal(weight.grad, effective.grad)
    assert (effective[~mask] == 0).all()


def test_full_mask_is_dense_training_bit_for_bit():
    weight = torch.randn(6, 8, dtype=torch.float64)
    assert torch.equal(masked_ste(weight, nm_mask(weight, 4, 4)), weight)


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
def test_decayed_forward_is_linear_in_the_decay(decay):
    weight = torch.randn(6, 8, dtype=torch.float64)
    mask = nm_mask(weight, 1, 4)
    got = decayed_ste(weight, mask, decay)
    assert torch.allclose(got, decay * weight + (1 - decay) * weight * mask, rtol=1e-15)
    if decay == 1:
        assert torch.equal(got, weight)
    if decay == 0:
        assert torch.equal(got, masked_ste(weight, mask))


@settings(max_examples=20, deadline=None)
@given(decay=st.floats(0, 1), seed=st.integers(0, 999))
def test_masked_gradient_mode_is_the_true_derivative(decay, seed):
    torch.manual_seed(seed)
    weight = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    mask = nm_mask(weight, 2, 4)
    assert torch.autograd.gradcheck(lambda w: decayed_ste(w, mask, decay, "masked"), weight)
    (grad,) = torch.autograd.grad(decayed_ste(weight, mask, decay, "masked").sum(), weight)
    assert torch.equal(grad, torch.where(mask, 1.0, torch.full_like(grad, decay)))
    (grad,) = torch.autograd.grad(decayed_ste(weight, mask, decay, "ste").sum(), weight)
    assert torch.equal(grad, torch.ones_like(grad))


def test_transforms_compile_and_follow_the_decay_without_recompiling():
    weight, mask = torch.randn(4, 8), nm_mask(torch.randn(4, 8), 2, 4)
    compiled = torch.compile(decayed_ste, fullgraph=True, backend="aot_eager")
    decay = torch.tensor(0.5)
    assert torch.equal(compiled(weight, mask, decay), decayed_ste(weight, mask, decay))
    decay.fill_(0.25)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(weight, mask, decay), decayed_ste(weight, mask, decay))


# SR-STE


def test_penalty_is_the_gradient_of_its_energy():
    weight = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    mask = nm_mask(weight, 2, 4)
    (energy,) = torch.autograd.grad(0.5 * 0.3 * ((~mask) * weight).square().sum(), weight)
    assert torch.allclose(srste_penalty_(torch.zeros_like(weight), weight.detach(), mask, 0.3), energy, rtol=1e-14)
    grad = torch.randn_like(weight)
    assert torch.equal(srste_penalty_(grad.clone(), weight.detach(), mask, 0.3)[mask], grad[mask])
    assert torch.equal(srste_penalty_(grad.clone(), weight.detach(), mask, 0.0), grad)
    full = torch.ones_like(mask)
    assert torch.equal(srste_penalty_(grad.clone(), weight.detach(), full, 0.3), grad)


def test_pruned_weights_vanish_when_lr_times_lambda_is_one():
    weight = torch.randn(6, 8, dtype=torch.float64)
    mask = nm_mask(weight, 2, 4)
    stepped = weight - 0.5 * srste_penalty_(torch.zeros_like(weight), weight, mask, 2.0)
    assert torch.equal(stepped, weight * mask)
    assert torch.equal(srste_decay_(weight.clone(), mask, 2.0, 0.5), weight * mask)


# Mask decay


@pytest.mark.parametrize("build", [MdGfLinear, MdGfExponential])
def test_mask_decay_phases(build):
    recipe = build(1, 8, dense_fraction=0.1, finetune_fraction=0.2, decay_end=0.7)
    found = states(recipe)
    assert [s.phase for s in found[:100]] == ["dense"] * 100
    assert [s.phase for s in found[100:800]] == ["sparse"] * 700
    assert [s.phase for s in found[800:]] == ["finetune"] * 201
    decays = [s.decay for s in found]
    assert decays[100] == 1.0  # j = 0 is exactly dense
    assert all(a >= b for a, b in itertools.pairwise(decays))
    assert set(decays[800:]) == {0.0}
    assert all((s.n, s.m) == (1, 8) for s in found)


def test_linear_decay_closed_form():
    recipe = MdGfLinear(1, 8, decay_rate=0.004, dense_fraction=0.0, finetune_fraction=0.0)
    plan = recipe.plan(None)  # a rate per step needs no length
    assert [plan.state(j).decay for j in (0, 1, 100)] == pytest.approx([1.0, 0.996, 0.6], rel=1e-14)
    assert plan.state(249).decay > 0
    assert plan.state(250).decay == 0.0
    ended = states(MdGfLinear(1, 8, decay_end=0.7))  # 5 % dense
    assert ended[699].decay > 0
    assert ended[700].decay == 0.0


def test_exponential_decay_closed_form():
    plan = MdGfExponential(1, 8, decay_rate=1e-2, dense_fraction=0.0, finetune_fraction=0.0).plan(None)
    for j, k in ((3, 7), (50, 81)):
        assert plan.state(j + k).decay == pytest.approx(plan.state(j).decay * plan.state(k).decay, rel=1e-13)
    assert plan.state(0).decay == 1.0
    recipe = MdGfExponential(1, 8, decay_end=0.7, decay_floor=1e-3)
    assert recipe.plan(T).state(700).decay == pytest.approx(1e-3, rel=1e-10)
    assert recipe.plan(T).state(899).decay > 0
    assert recipe.plan(T).state(900).decay == 0.0
    assert recipe.plan(T).state(T).decay == 0.0


# Structure decay


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ((1, 8), [(7, 8), (4, 8), (2, 8), (1, 8)]),
        ((1, 16), [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]),
        ((1, 32), [(31, 32), (16, 32), (8, 32), (4, 32), (2, 32), (1, 32)]),
        ((2, 4), [(3, 4), (2, 4)]),
        ((2, 8), [(7, 8), (4, 8), (2, 8)]),
    ],
)
def test_stepwise_tables(pattern, expected):
    recipe = SdGfStepwise(*pattern, dense_fraction=0.1, finetune_fraction=0.1)
    assert recipe.patterns() == expected
    table = starts(recipe)
    assert table[0][:2] == (0, "dense")
    intervals = len(expected)
    for d, (n, m) in enumerate(expected):
        assert (100 + d * 800 // intervals, "sparse", n, m) in table
    assert table[-1] == (900, "finetune", *pattern)
    assert all(s.decay == (1.0 if s.phase == "dense" else 0.0) for s in states(recipe))


@pytest.mark.parametrize(
    ("k", "expected"),
    [(16, [(16, 128), (8, 64), (4, 32), (2, 16), (1, 8)]), (8, [(8, 64), (4, 32), (2, 16), (1, 8)]), (1, [(1, 8)])],
)
def test_geometric_tables(k, expected):
    recipe = SdGfGeometric(1, 8, k=k, dense_fraction=0.0, finetune_fraction=0.0)
    assert recipe.patterns() == expected
    assert {s.n / s.m for s in states(recipe)} == {1 / 8}
    table = [(step, n, m) for step, phase, n, m in starts(recipe) if phase == "sparse"]
    assert table == [(d * T // len(expected), n, m) for d, (n, m) in enumerate(expected)]


def test_geometric_takes_the_largest_k_that_divides_the_axis():
    recipe = SdGfGeometric(1, 8, k=16)
    assert recipe.fit_axis(768).k == 16
    assert recipe.fit_axis(192).k == 8
    assert recipe.fit_axis(8).k == 1
    assert SdGfGeometric(1, 8, k=1).patterns() == [(1, 8)]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_masks_nest_at_a_fixed_weight(seed):
    torch.manual_seed(seed)
    weight = torch.randn(4, 32, dtype=torch.float64)
    masks = [nm_mask(weight, n, m) for n, m in SdGfStepwise(1, 16).patterns()]
    for wide, narrow in itertools.pairwise(masks):
        assert not bool((narrow & ~wide).any())
    n, m = 2, 4
    narrow = nm_mask(weight, n, m)
    assert int(narrow.reshape(-1, 2 * m).sum(1).max()) == 2 * n  # an N:M mask satisfies 2N:2M


# All


@settings(max_examples=40, deadline=None)
@given(
    total=st.integers(1, 5000),
    dense=st.floats(0, 0.5),
    finetune=st.floats(0, 0.4),
    name=st.sampled_from(["nm_ste", "nm_srste", "nm_oneshot", "mdgf_linear", "sdgf_stepwise", "sdgf_geometric"]),
)
def test_every_recipe_covers_every_step_and_ends_hard(total, dense, finetune, name):
    recipe = registry.create("recipe", name, n=1, m=8, dense_fraction=dense, finetune_fraction=finetune)
    found = states(recipe, total)
    order = {"dense": 0, "sparse": 1, "finetune": 2}
    ranks = [order[s.phase] for s in found]
    assert ranks == sorted(ranks)
    assert ranks.count(0) == math.floor(dense * total + 1e-9)
    last = found[-1]
    assert (last.phase, last.n, last.m, last.decay) == ("finetune", 1, 8, 0.0)
    kept = [s.n / s.m for s in found if s.phase != "dense"]
    assert all(a >= b for a, b in itertools.pairwise(kept))


def test_mask_updates():
    assert NMSTE(2, 4).mask_due(0, -1)
    assert NMSTE(2, 4).mask_due(1, 0)
    assert not NMSTE(2, 4, mask_update_every=10).mask_due(9, 0)
    assert NMSTE(2, 4, mask_update_every=10).mask_due(10, 0)
    assert not NMOneShot(2, 4).mask_due(500, 0)


def test_defaults_are_the_cards():
    assert NMSRSTE().lambda_w == 2e-4
    linear, exponential = MdGfLinear(), MdGfExponential()
    assert (linear.decay_end, linear.dense_fraction, linear.finetune_fraction, linear.grad_mode) == (
        0.7,
        0.05,
        0.1,
        "ste",
    )
    assert exponential.decay_floor == 1e-3
    assert SdGfGeometric().k == 16


def test_keeping_everything_warns():
    with pytest.warns(UserWarning, match="4:4 keeps every weight"):
        NMSTE(4, 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NMSTE(5, 4), r"N:M is 5:4.*1 <= N < M"),
        (lambda: NMSTE(0, 4), "N:M is 0:4"),
        (lambda: NMSTE(2.0, 4), "n and m are 2.0"),
        (lambda: NMSTE(True, 4), "n and m are True"),
        (lambda: MdGfLinear(dense_fraction="0.1"), "dense_fraction is '0.1'"),
        (lambda: NMSTE(mask_update_every=0), "mask_update_every is 0"),
        (lambda: NMSRSTE(lambda_w=-1e-4), "lambda_w is -0.0001"),
        (lambda: MdGfLinear(dense_fraction=1.0), "dense_fraction is 1.0"),
        (lambda: MdGfLinear(dense_fraction=0.5, finetune_fraction=0.5), "dense_fraction \\+ finetune_fraction"),
        (lambda: MdGfLinear(decay_rate=0.0), "decay_rate is 0.0"),
        (lambda: MdGfLinear(decay_end=0.05), "decay_end is 0.05"),
        (lambda: MdGfLinear(grad_mode="true"), "grad_mode is 'true'"),
        (lambda: MdGfExponential(decay_floor=1.0), "decay_floor is 1.0"),
        (lambda: SdGfStepwise(3, 8), "not a power of two"),
        (lambda: SdGfGeometric(k=3), "k is 3"),
        (lambda: MdGfLinear().plan(None).state(0), "training length is unknown"),
        (lambda: SdGfStepwise(dense_fraction=0.0, finetune_fraction=0.0).plan(None).state(0), "length is unknown"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(LossplugError, match=message):
        build()
