"""Identities of the card ``smooth_adversarial_comp_sum``."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import LabelError, create
from lightning_lossplug.losses.smooth_adversarial import margin_change

NAME = "smooth_adversarial_comp_sum"


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.rand(6, 8, dtype=torch.float64), torch.randint(3, (6,))


def network(classes=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, classes)).double()


def test_without_the_regulariser_it_is_comp_sum(batch):
    x, y = batch
    model = network().eval()
    for tau in (0.5, 1.0, 2.0):
        torch.testing.assert_close(create(NAME, nu=0.0, tau=tau)(model, x, y), create("comp_sum", tau=tau)(model(x), y))
    torch.testing.assert_close(create(NAME, nu=0.0, rho=0.5)(model, x, y), F.cross_entropy(model(x) / 0.5, y))


def test_margin_change():
    torch.manual_seed(0)
    z, other, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 4
    margins = [
        torch.stack([r[k] - r[[j for j in range(4) if j != k]] for r, k in zip(t, y, strict=True)]) for t in (z, other)
    ]
    torch.testing.assert_close(margin_change(z, other, y), (margins[1] - margins[0]).norm(dim=1))
    torch.testing.assert_close(margin_change(z, other + 7, y), margin_change(z, other, y))
    two, two_other, t = z[:, :2], other[:, :2], torch.zeros(5, dtype=torch.long)
    change = (two_other[:, 0] - two_other[:, 1]) - (two[:, 0] - two[:, 1])
    torch.testing.assert_close(margin_change(two, two_other, t), change.abs())
    same = z.clone().requires_grad_()
    assert torch.autograd.grad(margin_change(z, same, y).sum(), same)[0].isfinite().all()


@pytest.mark.parametrize("norm", ["inf", 2])
def test_attack_stays_in_the_ball_and_beats_random_points(batch, norm):
    x, y = batch
    model = network().eval()
    loss = create(NAME, eps=0.1, step_size=0.03, steps=15, norm=norm, bounds=(0.0, 1.0))
    attacked = loss.attack(model, x, y)
    delta = attacked - x
    size = delta.abs().amax(1) if norm == "inf" else delta.norm(dim=1)
    assert (size <= 0.1 + 1e-12).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    found = margin_change(model(x), model(attacked), y)
    for _ in range(20):
        noise = torch.randn_like(x)
        noise = 0.1 * (noise.sign() if norm == "inf" else noise / noise.norm(dim=1, keepdim=True))
        assert (margin_change(model(x), model((x + noise).clamp(0, 1)), y) <= found + 1e-9).all()


def test_attack_finds_the_exact_maximum_of_a_linear_binary_model(batch):
    x, _ = batch
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    model = nn.Linear(8, 2).double()
    slope = (model.weight[0] - model.weight[1]).detach()
    loss = create(NAME, eps=0.05, step_size=0.02, steps=10, nu=2.0)
    change = 0.05 * slope.abs().sum()
    torch.testing.assert_close(loss(model, x, y), F.cross_entropy(model(x), y) + 2 * change)
    l2 = create(NAME, eps=0.05, step_size=0.02, steps=200, norm=2)
    torch.testing.assert_close(l2(model, x, y), F.cross_entropy(model(x), y) + 0.05 * slope.norm(), rtol=1e-4, atol=0)


def test_it_bounds_the_rho_margin_adversarial_loss(batch):
    x, y = batch
    model, rho, classes = network().eval(), 0.5, 3
    loss = create(NAME, rho=rho, nu=math.sqrt(classes - 1) / rho, eps=0.05, step_size=0.01, reduction="none")
    value = loss(model, x, y)
    for _ in range(20):
        z = model(x + 0.05 * (2 * torch.rand_like(x) - 1))
        margins = z.gather(1, y[:, None]) - z
        bound = (1 - margins / rho).clamp(0, 1)
        u = bound.sum(1) - bound.gather(1, y[:, None])[:, 0]
        assert (torch.log1p(u) <= value + 1e-9).all()


def test_model_state_and_gradients(batch):
    x, y = batch
    model = network()
    model[2].eval()
    before = model[1].running_mean.clone()
    loss = create(NAME, steps=2)
    loss.attack(model, x, y)
    assert model[1].running_mean.equal(before)
    assert [m.training for m in model] == [True, True, False, True]
    assert all(p.grad is None for p in model.parameters())
    x.requires_grad_()
    loss(model, x, y).backward()
    assert all(p.grad.abs().sum() > 0 for p in (model[0].weight, model[3].weight))
    assert int(model[1].num_batches_tracked) == 1  # one training pass over [x; x']
    with torch.no_grad():
        assert loss(model.eval(), x, y).isfinite()


def test_ignored_rows_weights_and_bad_calls(batch):
    x, y = batch
    model = network().eval()
    loss = create(NAME, steps=2)
    ignored = y.clone()
    ignored[2] = -100
    rows = loss(model, x, ignored, reduction="none")
    assert rows.shape == y.shape
    assert rows[2] == 0
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    plain = create(NAME, nu=0.0, weight=weight)
    torch.testing.assert_close(plain(model, x, y), F.cross_entropy(model(x), y, weight))
    assert loss(model, x[:0], y[:0]) == 0
    half = loss(network().eval().bfloat16(), x.bfloat16(), y)
    assert half.dtype == torch.float32
    with pytest.raises(LabelError):
        loss(model, x, y + 3)
    for bad in ((x.long(), y), (x, y[:3])):
        with pytest.raises(LossplugError, match="don't fit"):
            loss(model, *bad)
    for parameter in (
        {"tau": -1.0},
        {"rho": 0.0},
        {"nu": -1.0},
        {"eps": 0.0},
        {"step_size": 0.0},
        {"steps": 0},
        {"norm": 1},
        {"reduction": "x"},
    ):
        with pytest.raises(LossplugError, match=next(iter(parameter))):
            create(NAME, **parameter)
