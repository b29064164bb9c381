"""What the losses outside classification have in common, driven by the table in ``family_cases``."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from family_cases import CASES, FAMILIES, NEEDS_TORCHAUDIO, NOT_LOSSES, ROWS, call

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import Loss, create
from lightning_lossplug.registry import registry

pytestmark = pytest.mark.filterwarnings("ignore:madl has no gradient")
# linear_cross_entropy takes hidden states and a weight; test_fused_linear.py is its own table.
OF_HEADS = "hidden_classifier"
ENTRIES = {e.name: e for e in registry if e.kind == "loss" and e.family in FAMILIES and e.signature != OF_HEADS}
SETTINGS = [(name, p) for name, case in CASES.items() for p in case.settings()]
BAD = [(name, p) for name, case in CASES.items() for p in case.bad]
EACH = pytest.mark.parametrize(("name", "parameters"), SETTINGS, ids=str)
ONE = pytest.mark.parametrize("name", CASES)
REDUCED = pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.rows is not None])
WEIGHTED = pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.weighted])


def build(name, **more):
    return create(name, **{**CASES[name].required, **more})


def inputs(name, n=ROWS, seed=0):
    return CASES[name].inputs(n, torch.Generator().manual_seed(seed))


def test_every_loss_of_the_families_is_in_the_table():
    assert set(ENTRIES) == {*CASES, *NOT_LOSSES, *NEEDS_TORCHAUDIO}


@pytest.mark.parametrize("name", ENTRIES)
def test_registry_facts_describe_the_loss(name):
    entry = ENTRIES[name]
    assert entry.signature
    assert entry.paper
    text = " ".join(entry.load().__doc__.split())
    assert len(text) > 100
    assert "se it" in text  # when to use it
    assert "Args:" in text


@EACH
def test_scalar_result_and_gradient(name, parameters):
    x, rest = inputs(name)
    loss = create(name, **parameters)
    assert isinstance(loss, Loss)
    options = {"reduction": "mean"} if CASES[name].rows is not None else {}
    value = call(name, loss, x.requires_grad_(), rest, **options)
    assert value.shape == ()
    assert value.dtype == torch.float64
    (grad,) = torch.autograd.grad(value, x)
    assert value.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize(("name", "parameters"), [s for s in SETTINGS if CASES[s[0]].differentiable], ids=str)
def test_gradient_against_finite_differences(name, parameters):
    x, rest = inputs(name, 2)
    loss = create(name, **parameters)
    options = {"reduction": "mean"} if CASES[name].rows is not None else {}
    assert torch.autograd.gradcheck(lambda t: call(name, loss, t, rest, **options), (x.requires_grad_(),), atol=2e-5)


@REDUCED
def test_reductions_agree(name):
    x, rest = inputs(name)
    loss = build(name)
    rows = call(name, loss, x, rest, reduction="none")
    assert rows.shape == CASES[name].rows
    torch.testing.assert_close(call(name, loss, x, rest, reduction="sum"), rows.sum())
    torch.testing.assert_close(
        call(name, loss, x, rest, reduction="mean", denominator=7.0), call_mean(name, x, rest, 7)
    )
    if name != "ctc":  # its mean divides by the target lengths first
        torch.testing.assert_close(call(name, loss, x, rest, reduction="mean"), rows.mean())
    with pytest.raises(LossplugError, match="reduction"):
        call(name, loss, x, rest, reduction="average")
    with pytest.raises(LossplugError, match="reduction"):
        build(name, reduction="average")


def call_mean(name, x, rest, denominator):
    total = call(name, build(name), x, rest, reduction="sum") / denominator
    return total / 3 if name == "ctc" else total


@WEIGHTED
def test_sample_weights(name):
    x, rest = inputs(name)
    loss = build(name)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    rows = call(name, loss, x, rest, reduction="none")
    full = weight.reshape(-1, *[1] * (rows.ndim - 1)).expand_as(rows)
    mean = (full * rows).sum() / full.sum() / (3 if name == "ctc" else 1)
    torch.testing.assert_close(call(name, loss, x, rest, sample_weight=weight, reduction="mean"), mean)
    x.requires_grad_()
    nothing = call(name, loss, x, rest, sample_weight=torch.zeros(ROWS), reduction="mean")
    assert nothing == 0
    assert (torch.autograd.grad(nothing, x)[0] == 0).all()
    with pytest.raises(LossplugError, match="sample_weight"):
        call(name, loss, x, rest, sample_weight=torch.ones(ROWS + 3))


@ONE
def test_empty_batch_is_zero_and_attached(name):
    x, rest = inputs(name, 0)
    x.requires_grad_()
    options = {"reduction": "mean"} if CASES[name].rows is not None else {}
    value = call(name, build(name), x, rest, **options)
    assert value == 0
    assert value.shape == ()
    assert torch.autograd.grad(value, x)[0].shape == x.shape


@ONE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    x, rest = inputs(name)
    half = x.to(dtype).requires_grad_()
    options = {"reduction": "mean"} if CASES[name].rows is not None else {}
    value = call(name, build(name), half, rest, **options)
    assert value.dtype == torch.float32
    assert torch.autograd.grad(value, half)[0].dtype == dtype
    exact = call(name, build(name), half.detach().float(), rest, **options)
    torch.testing.assert_close(value, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(call(name, build(name), half, rest, **options), value)


@ONE
def test_extreme_inputs_stay_finite(name):
    x, rest = inputs(name)
    far = (x * CASES[name].scale).float().requires_grad_()
    options = {"reduction": "mean"} if CASES[name].rows is not None else {}
    value = call(name, build(name), far, rest, **options)
    assert value.isfinite()
    assert torch.autograd.grad(value, far)[0].isfinite().all()


@pytest.mark.parametrize(("name", "parameters"), BAD, ids=str)
def test_bad_parameters_are_refused(name, parameters):
    with pytest.raises(LossplugError):
        create(name, **parameters)


@ONE
def test_integers_and_wrong_shapes_are_refused(name):
    x, rest = inputs(name)
    with pytest.raises(LossplugError, match="dtype"):
        call(name, build(name), x.long(), rest)
    with pytest.raises(LossplugError):
        call(name, build(name), x[None, None, :2], rest)


@ONE
def test_nothing_is_left_in_a_checkpoint(name):
    assert build(name).state_dict() == {}


def test_madl_warns_once_when_trained():
    x, (y,) = inputs("madl")
    loss = create("madl")
    with pytest.warns(UserWarning, match="gmadl"):
        loss(x.requires_grad_(), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(x, y)
        create("madl")(x.detach(), y)


def test_numbers_are_checked_with_the_interval():
    for value in (float("inf"), float("nan"), "2", True):
        with pytest.raises(LossplugError, match=r"allowed is \(0, inf\)"):
            create("gmadl", a=value)
    assert math.isfinite(create("gmadl", a=1).a)
