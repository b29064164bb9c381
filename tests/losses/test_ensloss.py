"""Identities of the card ``ensloss``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import create
from lightning_lossplug.losses.ensloss import inverse_box_cox, loss_derivatives


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return 2 * torch.randn(12, dtype=torch.float64), torch.randint(2, (12,))


@pytest.mark.parametrize("lambda_", [0.0, 0.7, -0.7])
def test_gradient_is_the_assigned_derivative(batch, lambda_):
    s, t = batch
    draws = inverse_box_cox(torch.randn(12, generator=torch.Generator().manual_seed(9)), lambda_)
    margins = (2 * t - 1) * s
    expected = torch.empty(12, dtype=torch.float64)
    for slope, i in zip((-draws).clamp_min(-1).sort().values, margins.argsort(), strict=True):
        expected[i] = slope * (1 / margins[i] if margins[i] > 1 else 1) - 1e-6
    loss = create("ensloss", seed=9, **{"lambda": lambda_})
    s = s.requires_grad_()
    value = loss(s, t)
    torch.testing.assert_close(value.detach(), (expected * margins).mean())
    value.backward()
    torch.testing.assert_close(s.grad, expected * (2 * t - 1) / 12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-1, 1), st.integers(1, 20))
def test_derivatives_belong_to_a_convex_calibrated_loss(seed, lambda_, size):
    generator = torch.Generator().manual_seed(seed)
    margins = 2 * torch.randn(size, generator=generator, dtype=torch.float64)
    draws = inverse_box_cox(torch.randn(size, generator=generator, dtype=torch.float64), lambda_)
    g = loss_derivatives(margins, draws)[margins.argsort()]
    assert (g < 0).all()
    assert (g >= -1 - 1e-6).all()
    assert (g.diff() >= 0).all()


def test_inverse_box_cox():
    u = torch.tensor([-3.0, -0.5, 0.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(inverse_box_cox(u, 0.0), u.exp())
    torch.testing.assert_close(inverse_box_cox(u, 1e-5), u.exp(), rtol=1e-4, atol=0)
    torch.testing.assert_close(inverse_box_cox(u, 0.5)[1:], (1 + 0.5 * u[1:]) ** 2)
    assert inverse_box_cox(u, 0.5)[0] == 0
    assert inverse_box_cox(torch.tensor(3.0), -0.5) == torch.inf


def test_lambda_is_redrawn_every_period_and_state_is_saved(batch):
    s, t = batch
    loss = create("ensloss", period=3)
    seen = []
    for _ in range(9):
        loss.advance_epoch()
        seen.append(loss.lambda_)
    assert seen[:2] == [0.0, 0.0]
    assert seen[2] == seen[4] != seen[5] == seen[7] != seen[8]
    assert all(-1 <= v <= 1 for v in seen)
    loss(s, t)
    other = create("ensloss", period=3, seed=5)
    other.load_state_dict(loss.state_dict())
    for _ in range(4):
        loss.advance_epoch()
        other.advance_epoch()
        assert other.lambda_ == loss.lambda_
        torch.testing.assert_close(other(s, t), loss(s, t), rtol=0, atol=0)


def test_batch_of_one_eval_mode_and_refusals(batch):
    s, t = batch
    loss = create("ensloss")
    assert loss(s[:1], t[:1]).isfinite()
    assert loss(s[:, None], t[:, None]).isfinite()
    torch.testing.assert_close(loss.eval()(s, t), F.binary_cross_entropy_with_logits(s, t.double()))
    with pytest.raises(LossplugError, match="binary"):
        loss(torch.randn(12, 3), torch.randint(2, (12, 3)))
    with pytest.raises(LossplugError):
        loss(torch.randn(12, 3), t)


def test_training_separates_two_classes():
    torch.manual_seed(0)
    x = torch.randn(64, 2)
    t = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
    weight = torch.zeros(2, requires_grad=True)
    loss = create("ensloss", period=2)
    for epoch in range(60):
        (grad,) = torch.autograd.grad(loss(x @ weight, t), weight)
        weight.data -= 0.3 * grad
        if epoch % 10 == 9:
            loss.advance_epoch()
    assert ((x @ weight > 0) == t).float().mean() > 0.9
