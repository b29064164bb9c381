"""Identities of the card ``z_loss``."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_lossplug.losses import create
from lightning_lossplug.losses.stats import logit_stats

C = 6


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return 2 * torch.randn(8, C, dtype=torch.float64, requires_grad=True), torch.randint(C, (8,))


def test_definition_and_closed_gradient(batch):
    z, y = batch
    a, b = 0.7, 1.2
    loss = create("z_loss", a=a, b=b)
    mean, sigma = z.mean(1), z.std(1, correction=0)
    score = (z.gather(1, y[:, None])[:, 0] - mean) / sigma
    torch.testing.assert_close(loss(z, y, reduction="none"), F.softplus(a * (b - score)) / a)
    grad = torch.autograd.grad(loss(z, y, reduction="sum"), z)[0]
    mean, sigma, score = (x.detach()[:, None] for x in (mean, sigma, score))
    direction = F.one_hot(y, C) - 1 / C - score * (z.detach() - mean) / (C * sigma)
    torch.testing.assert_close(grad, -torch.sigmoid(a * (b - score)) / sigma * direction)


def test_shift_and_scale_invariance(batch):
    z, y = batch
    loss = create("z_loss", a=0.7, b=0.4, reduction="none")
    torch.testing.assert_close(loss(3.7 * z - 11, y), loss(z, y))
    grad = torch.autograd.grad(loss(z, y).sum(), z)[0]
    torch.testing.assert_close(grad.sum(1), torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close((grad * z).sum(1).detach(), torch.zeros(8, dtype=torch.float64))


def test_largest_score_is_root_of_classes_minus_one():
    one_hot = torch.eye(C, dtype=torch.float64)
    value = create("z_loss", reduction="none")(one_hot, torch.arange(C))
    torch.testing.assert_close(value, F.softplus(torch.full((C,), -math.sqrt(C - 1), dtype=torch.float64)))


def test_sharp_limit_is_a_hinge(batch):
    z, y = batch
    score = (z.gather(1, y[:, None])[:, 0] - z.mean(1)) / z.std(1, correction=0)
    sharp = create("z_loss", a=1e6, b=0.5, reduction="none")(z, y)
    torch.testing.assert_close(sharp, (0.5 - score).clamp_min(0), rtol=0, atol=1e-5)


def test_far_from_zero_the_materialised_form_keeps_its_digits(batch):
    z, y = batch
    far = (z.detach() + 3e3).float()
    exact = create("z_loss")(z, y).item()
    assert create("z_loss")(far, y).item() == pytest.approx(exact, abs=1e-3)


def test_constant_rows_are_finite():
    z = torch.full((2, C), 3.0, requires_grad=True)
    y = torch.tensor([0, 3])
    for loss in (
        create("z_loss"),
        lambda z, y: create("z_loss").from_stats(logit_stats(z, y, {"sum", "sumsq"})).mean(),
    ):
        value = loss(z, y)
        assert value.isfinite()
        assert torch.autograd.grad(value, z)[0].isfinite().all()
