"""Identities of the cards ``poly_loss``, ``comp_sum``, ``gce``, ``mae`` and parity with timm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.losses import create
from lightning_lossplug.losses.comp_sum import comp_sum

C = 6


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return 2 * torch.randn(8, C, dtype=torch.float64, requires_grad=True), torch.randint(C, (8,))


def gradient(loss, z, y):
    return torch.autograd.grad(loss(z, y, reduction="sum"), z)[0]


def softmax_parts(z, y):
    p = z.detach().softmax(1)
    return p, p.gather(1, y[:, None]), F.one_hot(y, C).double()


def test_poly_with_zero_epsilon_is_cross_entropy(batch):
    z, y = batch
    for epsilon in (0.0, [0.0, 0.0]):
        torch.testing.assert_close(create("poly_loss", epsilon=epsilon)(z, y), F.cross_entropy(z, y))
    smoothed = create("poly_loss", epsilon=0.0, label_smoothing=0.1)
    torch.testing.assert_close(smoothed(z, y), F.cross_entropy(z, y, label_smoothing=0.1))


def test_poly_gradient_is_the_cards_closed_form(batch):
    z, y = batch
    p, p_y, e = softmax_parts(z, y)
    torch.testing.assert_close(gradient(create("poly_loss", epsilon=2.0), z, y), (1 + 2 * p_y) * (p - e))
    epsilon = [0.7, -0.3, 1.1]
    slope = 1 + p_y * sum(j * c * (1 - p_y) ** (j - 1) for j, c in enumerate(epsilon, 1))
    torch.testing.assert_close(gradient(create("poly_loss", epsilon=epsilon), z, y), slope * (p - e))


def test_poly_against_its_definition(batch):
    z, y = batch
    _, p_y, _ = softmax_parts(z, y)
    p_y, n = p_y[:, 0], -p_y[:, 0].log()
    focal = (1 - p_y) ** 2 * n - 1.0 * (1 - p_y) ** 3
    torch.testing.assert_close(create("poly_loss", epsilon=-1.0, gamma=2.0)(z, y), focal.mean())
    torch.testing.assert_close(create("poly_loss", epsilon=[0.0], gamma=2.0)(z, y), create("focal", gamma=2.0)(z, y))
    torch.testing.assert_close(create("poly_loss")(z, y), (n + 1 - p_y).mean())


def test_poly_equals_timm(batch):
    timm_poly = pytest.importorskip("timm.loss.poly_loss").PolyCrossEntropy
    z, y = batch
    z = z.detach().float()
    q = torch.rand(8, C).softmax(1)
    for smoothing in (0.0, 0.1):
        theirs = timm_poly(epsilon=1.5, smoothing=smoothing, reduction="none")
        ours = create("poly_loss", epsilon=1.5, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(ours(z, y), theirs(z, y))
    torch.testing.assert_close(create("poly_loss", epsilon=1.5)(z, q), timm_poly(epsilon=1.5)(z, q))


def test_poly_smoothing_equals_smoothed_soft_targets(batch):
    z, y = batch
    e = F.one_hot(y, C).double()
    loss = create("poly_loss", epsilon=[1.0, 0.5], gamma=0.5, label_smoothing=0.3)
    hand = create("poly_loss", epsilon=[1.0, 0.5], gamma=0.5)
    torch.testing.assert_close(loss(z, y), hand(z, 0.7 * e + 0.3 / C))
    torch.testing.assert_close(loss(z, y), loss(z, e))


def test_poly_warns_when_a_coefficient_turns_negative():
    with pytest.warns(UserWarning, match="epsilon_2"):
        create("poly_loss", epsilon=[1.0, -0.6])
    assert create("poly", epsilon=[-1.0, -0.5]).epsilon == (-1.0, -0.5)  # the limit itself is fine


def test_comp_sum_special_cases(batch):
    z, y = batch
    p, p_y, _ = softmax_parts(z, y)
    p_y = p_y[:, 0]
    u = (z - z.gather(1, y[:, None])).exp().sum(1).detach() - 1

    def value(tau):
        return create("comp_sum", tau=tau, reduction="none")(z, y).detach()

    torch.testing.assert_close(value(0.0), u)
    torch.testing.assert_close(value(1.0), F.cross_entropy(z, y, reduction="none").detach())
    torch.testing.assert_close(value(1.7), (1 - p_y**0.7) / 0.7)
    torch.testing.assert_close(value(1.7), create("gce", reduction="none")(z, y).detach())
    torch.testing.assert_close(value(2.0), 1 - p_y)
    torch.testing.assert_close(value(2.0), create("mae", reduction="none")(z, y).detach())
    torch.testing.assert_close(value(2.0), (p - F.one_hot(y, C)).abs().sum(1) / 2)
    torch.testing.assert_close(value(0.4), ((1 + u) ** 0.6 - 1) / 0.6)


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0, 1 + 1e-9, 1.5, 2.0, 3.0])
def test_comp_sum_gradient_and_range(batch, tau):
    z, y = batch
    p, p_y, e = softmax_parts(z, y)
    loss = create("comp_sum", tau=tau)
    torch.testing.assert_close(gradient(loss, z, y), p_y ** (tau - 1) * (p - e))
    rows = loss(z * 20, y, reduction="none")
    assert (rows >= 0).all()
    assert tau <= 1 + 1e-6 or (rows <= 1 / (tau - 1) + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 30), st.floats(0, 3), st.floats(0, 3))
def test_comp_sum_decreases_in_tau_and_is_continuous(n, a, b):
    n = torch.tensor(n, dtype=torch.float64)
    low, high = comp_sum(n, min(a, b)), comp_sum(n, max(a, b))
    assert low >= high - 1e-9 * (1 + high.abs())
    torch.testing.assert_close(comp_sum(n, a), comp_sum(n, a + 1e-7), rtol=1e-4, atol=1e-4)


def test_comp_sum_below_one_goes_on_linearly_and_says_so():
    z = torch.tensor([[200.0, 0.0], [30.0, 0.0]], requires_grad=True)
    with pytest.warns(UserWarning, match="raise tau"):
        loss = create("comp_sum", tau=0.5)(z, torch.tensor([1, 1]), reduction="none")
    assert loss.isfinite().all()
    grad = torch.autograd.grad(loss.sum(), z)[0]
    assert grad.square().sum().isfinite()
    assert grad[0, 0] > grad[1, 0] > 0
    torch.testing.assert_close(loss[1], torch.expm1(torch.tensor(15.0)) / 0.5)


def test_gce_limits_and_truncation(batch):
    z, y = batch
    p, p_y, e = softmax_parts(z, y)
    torch.testing.assert_close(gradient(create("gce", q=0.3), z, y), p_y**0.3 * (p - e))
    torch.testing.assert_close(create("gce", q=1e-8)(z, y), F.cross_entropy(z, y))
    rows = create("gce", q=0.5, k=0.2, reduction="none")(z, y)
    low = p_y[:, 0] <= 0.2
    assert low.any()
    assert not low.all()
    torch.testing.assert_close(rows[low], torch.full_like(rows[low], (1 - 0.2**0.5) / 0.5))
    torch.testing.assert_close(rows[~low], (1 - p_y[~low, 0] ** 0.5) / 0.5)
    assert gradient(create("gce", q=0.5, k=0.2), z, y)[low].eq(0).all()


def test_very_wrong_rows_keep_their_gradient_and_nll_is_never_negative():
    z = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    grad = gradient(create("gce", q=0.1), z, torch.tensor([1]))
    torch.testing.assert_close(grad[0, 1], -torch.tensor(-6.0).exp())
    right = torch.tensor([[1e4, 0.1, -3.0]])
    assert create("focal", gamma=1.5)(right, torch.tensor([0])) == 0
