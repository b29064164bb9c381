"""Identities of the cards ``ldr_kl`` and ``aldr_kl``; the table of ``aldr_kl`` over steps and ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import create

C = 5


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return 2 * torch.randn(8, C, dtype=torch.float64, requires_grad=True), torch.randint(C, (8,))


def differences(f, y, margin):
    return f - f.gather(1, y[:, None]) + margin * (1 - F.one_hot(y, f.shape[1]).double())


def test_ldr_kl_is_cross_entropy_less_log_c(batch):
    z, y = batch
    loss = create("ldr_kl", **{"lambda": 1.0, "margin": 0.0})
    torch.testing.assert_close(loss(z, y), F.cross_entropy(z, y) - math.log(C))


def test_ldr_kl_limits_in_lambda(batch):
    z, y = batch
    d = differences(z, y, 0.5)
    cold = create("ldr_kl", **{"lambda": 1e-4, "margin": 0.5, "reduction": "none"})
    hot = create("ldr_kl", **{"lambda": 1e7, "margin": 0.5, "reduction": "none"})
    torch.testing.assert_close(cold(z, y), d.max(1).values, rtol=0, atol=1e-3)
    torch.testing.assert_close(hot(z, y), d.mean(1), rtol=0, atol=1e-5)


def test_ldr_kl_gradient_and_definition(batch):
    z, y = batch
    loss = create("ldr_kl", **{"lambda": 0.7, "margin": 0.4, "reduction": "none"})
    d = differences(z, y, 0.4)
    torch.testing.assert_close(loss(z, y), 0.7 * (d / 0.7).exp().mean(1).log())
    grad = torch.autograd.grad(loss(z, y).sum(), z)[0]
    torch.testing.assert_close(grad, ((d / 0.7).softmax(1) - F.one_hot(y, C)).detach())


def test_ldr_kl_is_the_worst_distribution(batch):
    z, y = batch
    d = differences(z, y, 0.1).detach()
    value = create("ldr_kl", reduction="none")(z, y)
    for _ in range(20):
        p = (3 * torch.randn_like(d)).softmax(1)
        assert ((p * d).sum(1) - (p * (C * p).log()).sum(1) <= value + 1e-12).all()


def test_scores_are_normalised_to_mean_one(batch):
    z, y = batch
    f = F.softplus(z) / F.softplus(z).mean(1, keepdim=True)
    parameters = {"lambda": 0.3, "margin": 0.1}
    plain = create("ldr_kl", **parameters)
    torch.testing.assert_close(create("ldr_kl", normalize="softplus_l1", **parameters)(z, y), plain(f, y))
    torch.testing.assert_close(
        create("ldr_kl", normalize="l1", **parameters)(z, y), plain(z * C / z.abs().sum(1, keepdim=True), y)
    )
    zero = torch.zeros(2, C, requires_grad=True)
    create("ldr_kl", normalize="l1")(zero, torch.tensor([0, 1])).backward()
    assert zero.grad.isfinite().all()


def test_aldr_kl_at_large_alpha_is_ldr_kl(batch):
    z, y = batch
    aldr = create("aldr_kl", lambda_0=0.8, alpha=1e9, margin=0.3)
    torch.testing.assert_close(aldr(z, y), create("ldr_kl", **{"lambda": 0.8, "margin": 0.3})(z, y))


def objective(d, lambda_, lambda_0, alpha):
    value = lambda_ * (torch.logsumexp(d / lambda_[:, None], 1) - math.log(C))
    return value - alpha * math.log(C) / (2 * lambda_0) * (lambda_ - lambda_0) ** 2


def test_aldr_kl_fixed_point_is_the_maximum_over_lambda(batch):
    z, y = batch
    loss = create("aldr_kl", lambda_0=0.8, alpha=1.5, margin=0.3, iterations=60, reduction="none")
    d = differences(z.detach(), y, 0.3)
    grid = torch.linspace(0.8 * (1 - 1 / 1.5), 0.8, 2001, dtype=torch.float64)
    best = torch.stack([objective(d, grid.new_full((8,), float(g)), 0.8, 1.5) for g in grid]).max(0).values
    assert (loss(z, y) >= best - 1e-12).all()
    torch.testing.assert_close(loss(z, y).detach(), best, rtol=0, atol=1e-5)
    # At the maximum the detached lambda costs nothing: backward is the derivative of the value.
    torch.autograd.gradcheck(lambda z: loss(z, y), z)


def test_few_iterations_are_close(batch):
    z, y = batch
    exact = create("aldr_kl", iterations=200)(z, y)
    torch.testing.assert_close(create("aldr_kl")(z, y), exact, rtol=0, atol=1e-3)


def test_aldr_kl_table_takes_one_step_per_visit(batch):
    z, y = batch
    loss = create("aldr_kl", lambda_0=1.0, alpha=2.0, margin=0.2, dataset_size=20).double()
    index = torch.tensor([3, 4, 5, 6, 7, 8, 9, 19])
    d = differences(z.detach(), y, 0.2)
    lambda_ = torch.ones(8, dtype=torch.float64)
    for _ in range(3):
        p = (d / lambda_[:, None]).softmax(1)
        lambda_ = 1 - (p * (C * p).log()).sum(1) / (2 * math.log(C))
        value = loss(z, y, index=index, reduction="none")
        torch.testing.assert_close(value.detach(), objective(d, lambda_, 1.0, 2.0))
        grad = torch.autograd.grad(value.sum(), z)[0]
        torch.testing.assert_close(grad, (d / lambda_[:, None]).softmax(1) - F.one_hot(y, C))
        torch.testing.assert_close(loss.lambda_[index], lambda_)
        assert (loss.lambda_ >= 0.5).all()
    assert loss.lambda_[:3].eq(1).all()
    again = create("aldr_kl", lambda_0=1.0, alpha=2.0, margin=0.2, dataset_size=20).double()
    again.load_state_dict(loss.state_dict())
    torch.testing.assert_close(again(z, y, index=index), loss(z, y, index=index))


def test_unseen_samples_and_eval_mode_use_lambda_0(batch):
    z, y = batch
    plain = create("ldr_kl", margin=0.1, reduction="none")
    loss = create("aldr_kl", dataset_size=8, reduction="none").double()
    index = torch.arange(8)
    index[2] = -1
    target = y.clone()
    target[5] = -100
    rows = loss(z, target, index=index)
    torch.testing.assert_close(rows[2], plain(z, y)[2])
    assert loss.lambda_[5] == 1  # ignored
    assert loss.lambda_[[0, 1, 3, 4, 6, 7]].lt(1).all()
    before = loss.lambda_.clone()
    torch.testing.assert_close(loss.eval()(z, y), plain(z, y))
    torch.testing.assert_close(loss(z, y, index=index + 100), plain(z, y))
    assert loss.lambda_.equal(before)


def test_official_variant_leaves_margin_out_and_floors_the_probabilities(batch):
    z, y = batch
    f = z * C / z.abs().sum(1, keepdim=True)
    p = (f / 0.1).softmax(1).clamp_min(1e-5)
    p = p / p.sum(1, keepdim=True)
    lambda_ = 0.1 * (1 - (p * (C * p).log()).sum(1) / (2 * math.log(C)))
    loss = create(
        "aldr_kl", lambda_0=0.1, alpha=2.0, margin=0.5, normalize="l1", margin_in_kl=False, floor=1e-5, iterations=1
    )
    expected = objective(differences(f, y, 0.5), lambda_, 0.1, 2.0)
    torch.testing.assert_close(loss(z, y, reduction="none"), expected)


def test_aldr_kl_bad_calls(batch):
    z, y = batch
    table = create("aldr_kl", dataset_size=8)
    with pytest.raises(LossplugError, match="needs index"):
        table(z, y)
    with pytest.raises(LossplugError, match="integers"):
        table(z, y, index=torch.arange(7))
    with pytest.raises(LossplugError, match="index 8 is outside"):
        table(z, y, index=torch.arange(1, 9))
    with pytest.raises(LossplugError, match="no table"):
        create("aldr_kl")(z, y, index=torch.arange(8))
    with pytest.raises(LossplugError, match="two classes"):
        create("aldr_kl")(z[:, :1], torch.zeros_like(y))
