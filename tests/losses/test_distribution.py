"""Identities of the cards ``sinkhorn`` and ``cauchy_schwarz_ib``."""

from __future__ import annotations

import pytest
import torch

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import create
from lightning_lossplug.losses.cauchy_schwarz import cs_qmi, log_gram, median_distance

D = torch.float64


@pytest.fixture
def clouds():
    torch.manual_seed(0)
    return torch.randn(7, 2, dtype=D, requires_grad=True), torch.randn(9, 2, dtype=D, requires_grad=True) + 0.5


def plain_ot(x, y, a, b, eps, p=2, rho=None, steps=4000):
    """Textbook Sinkhorn on scalings, value of the primal problem: plan cost plus eps KL to the product."""
    c = torch.cdist(x, y) ** p / p
    k = a[:, None] * b * torch.exp(-c / eps)
    u, v = torch.ones_like(a), torch.ones_like(b)
    power = 1.0 if rho is None else rho / (rho + eps)
    for _ in range(steps):
        u = (a / (k @ v)) ** power
        v = (b / (k.T @ u)) ** power
    plan = u[:, None] * k * v

    def kl(one, two):
        return (one * (one / two).log() - one + two).sum()

    value = (plan * c).sum() + eps * kl(plan, a[:, None] * b)
    return value if rho is None else value + rho * (kl(plan.sum(1), a) + kl(plan.sum(0), b))


def uniform(x):
    return torch.full((len(x),), 1 / len(x), dtype=D)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, 0.8])
def test_sinkhorn_is_the_debiased_primal_value(clouds, p, reach):
    x, y = (t.detach() for t in clouds)
    rho, eps = None if reach is None else reach**p, 0.6**p
    torch.manual_seed(2)
    a, b = torch.rand(7, dtype=D), torch.rand(9, dtype=D)
    if reach is None:
        a, b = a / a.sum(), b / b.sum()
    plain = plain_ot(x, y, a, b, eps, p, rho)
    options = {"p": p, "blur": 0.6, "reach": reach, "iterations": 800}
    torch.testing.assert_close(create("sinkhorn", debias=False, **options)(x, y, a, b), plain, rtol=1e-8, atol=1e-8)
    expected = plain - plain_ot(x, x, a, a, eps, p, rho) / 2 - plain_ot(y, y, b, b, eps, p, rho) / 2
    if reach is not None:
        expected = expected + eps / 2 * (a.sum() - b.sum()) ** 2
    torch.testing.assert_close(create("sinkhorn", **options)(x, y, a, b), expected, rtol=1e-7, atol=1e-8)


def test_sinkhorn_zero_positive_symmetric(clouds):
    x, y = clouds
    loss = create("sinkhorn", blur=0.3)
    assert loss(x, x) == 0
    assert loss(x, y) > 0
    torch.testing.assert_close(loss(x, y), loss(y, x))
    permuted = x[torch.randperm(7)]
    torch.testing.assert_close(loss(x, permuted), torch.zeros((), dtype=D), rtol=0, atol=1e-10)


def test_sinkhorn_small_blur_is_transport_and_large_blur_is_mmd():
    torch.manual_seed(0)
    x, y = torch.randn(8, 1, dtype=D), torch.randn(8, 1, dtype=D) + 1
    transport = ((x.sort(0).values - y.sort(0).values) ** 2 / 2).mean()
    value = create("sinkhorn", blur=1e-2, scaling=0.95, iterations=3000)(x, y)
    torch.testing.assert_close(value, transport, rtol=1e-3, atol=1e-4)

    def cost(a, b):
        return ((a - b.T) ** 2 / 2).mean()

    mmd = cost(x, y) - cost(x, x) / 2 - cost(y, y) / 2
    torch.testing.assert_close(create("sinkhorn", blur=1e3)(x, y), mmd, rtol=1e-4, atol=1e-6)


def test_sinkhorn_gradient_in_points_and_weights(clouds):
    x, y = (t.detach()[:3].requires_grad_() for t in clouds)
    loss = create("sinkhorn", blur=0.7, iterations=200)
    assert torch.autograd.gradcheck(loss, (x, y), atol=1e-5)
    w = torch.rand(3, dtype=D, requires_grad=True)

    def of_weights(w):
        return loss(x.detach(), y.detach(), w.softmax(0))

    assert torch.autograd.gradcheck(of_weights, (w,), atol=1e-5)
    unbalanced = create("sinkhorn", blur=0.7, reach=1.0, iterations=200)
    assert torch.autograd.gradcheck(lambda w: unbalanced(x.detach(), y.detach(), w.exp()), (w,), atol=1e-5)


def test_sinkhorn_batches_and_weights_of_zero(clouds):
    x, y = (t.detach() for t in clouds)
    loss = create("sinkhorn", blur=0.3, reduction="none")
    near = torch.stack([x, x + 1]), torch.stack([y, y + 1])
    # One ladder serves the batch, so its members agree only as far as the iterations have converged.
    torch.testing.assert_close(loss(*near)[0], loss(x, y), rtol=1e-3, atol=1e-4)
    assert loss(*near).shape == (2,)
    a = torch.cat([uniform(x), torch.zeros(2, dtype=D)])
    far = torch.cat([x, torch.full((2, 2), 30.0, dtype=D)]).requires_grad_()
    value = create("sinkhorn", blur=0.3, iterations=300)(far, y, a)
    torch.testing.assert_close(value, create("sinkhorn", blur=0.3, iterations=300)(x, y), rtol=1e-6, atol=1e-8)
    assert torch.autograd.grad(value, far)[0].isfinite().all()


def test_sinkhorn_refuses_shapes(clouds):
    x, y = clouds
    for bad in ((x, y[:, :1]), (x[None], y), (x[0], y[0]), (x[None], torch.stack([y, y]))):
        with pytest.raises(LossplugError, match="points"):
            create("sinkhorn")(*bad)
    with pytest.raises(LossplugError, match="a "):
        create("sinkhorn")(x, y, torch.ones(3))


def test_sinkhorn_backend_geomloss(clouds):
    pytest.importorskip("geomloss", reason="the geomloss backend needs geomloss")
    x, y = clouds
    for options in ({}, {"p": 1}, {"debias": False}, {"reach": 0.8}):
        ours = create("sinkhorn", blur=0.5, iterations=500, **options)
        theirs = create("sinkhorn", blur=0.5, scaling=0.995, backend="geomloss", **options)
        torch.testing.assert_close(ours(x, y), theirs(x, y), rtol=3e-4, atol=1e-4)
        if "reach" not in options:  # its gradient with reach is not the derivative of its value; ours is, see above
            one, two = (torch.autograd.grad(loss(x, y), x, retain_graph=True)[0] for loss in (ours, theirs))
            torch.testing.assert_close(one, two, rtol=0, atol=5e-3)
    with pytest.raises(LossplugError, match="geomloss has 1 and 2"):
        create("sinkhorn", p=1.5, backend="geomloss")


def gram(a, b, sigma=1.0):
    return torch.exp(-((a[:, None] - b) ** 2).sum(-1) / (2 * sigma**2))


@pytest.fixture
def samples():
    torch.manual_seed(0)
    x, z = torch.randn(12, 3, dtype=D), torch.randn(12, 2, dtype=D)
    y = x[:, :1] + 0.1 * torch.randn(12, 1, dtype=D)
    return x, z.requires_grad_(), y, (y + 0.3 * torch.randn(12, 1, dtype=D)).requires_grad_()


def test_cs_ib_by_its_equations(samples):
    x, z, y, yhat = samples
    k, r = gram(x, x), (gram(x, x) ** 2).sum(1)
    s1, s2, cross = ((k * g).sum(1).div(r).sum() for g in (gram(y, y), gram(yhat, yhat), gram(yhat, y)))
    divergence = s1.log2() + s2.log2() - 2 * cross.log2()
    torch.testing.assert_close(create("cauchy_schwarz_ib", beta=0.0)(x, z, y, yhat), divergence)

    def qmi(kx, kz):
        n = len(kx)
        one = torch.ones(n, dtype=D)
        a, b, m = torch.trace(kx @ kz) / n**2, kx.sum() * kz.sum() / n**4, one @ kx @ kz @ one / n**3
        return a.log2() + b.log2() - 2 * m.log2()

    kx, kz = gram(x, x), gram(z, z)
    compression = qmi(kx, kz) / (qmi(kx, kx) * qmi(kz, kz)).sqrt()
    torch.testing.assert_close(create("cauchy_schwarz_ib", beta=0.7)(x, z, y, yhat), divergence + 0.7 * compression)


def test_cs_ib_identities(samples):
    x, z, y, _ = samples
    zero = torch.zeros((), dtype=D)
    torch.testing.assert_close(create("cauchy_schwarz_ib", beta=0.0)(x, z, y, y), zero, rtol=0, atol=1e-12)
    only = create("cauchy_schwarz_ib", beta=1.0)
    torch.testing.assert_close(only(x, x, y, y), zero + 1)  # normalised information of x and itself
    for seed in range(5):
        torch.manual_seed(seed)
        a, b = torch.randn(10, 2, dtype=D), torch.randn(10, 3, dtype=D)
        assert cs_qmi(log_gram(a, a, 1.0), log_gram(b, b, 1.0)) >= -1e-12
    constant = torch.ones(12, 2, dtype=D, requires_grad=True)
    value = only(x, constant, y, y)
    torch.testing.assert_close(value, zero, rtol=0, atol=1e-6)
    assert torch.autograd.grad(value, constant)[0].isfinite().all()


def test_cs_ib_far_predictions_still_have_a_gradient(samples):
    x, z, y, _ = samples
    far = (y + 60).float().requires_grad_()
    value = create("cauchy_schwarz_ib")(x.float(), z.float(), y.float(), far)
    grad = torch.autograd.grad(value, far)[0]
    assert value.isfinite()
    assert (grad > 0).any()


def test_cs_ib_median_bandwidth_is_scale_free(samples):
    x, z, y, yhat = samples
    loss = create("cauchy_schwarz_ib", sigma="median", beta=0.5)
    torch.testing.assert_close(loss(5 * x, 0.1 * z, 40 * y, 40 * yhat), loss(x, z, y, yhat))
    assert median_distance(torch.zeros(4, 2)) == 1
    assert median_distance(torch.tensor([[0.0], [0.0], [0.0], [6.0]])) == 3.0
    for bad in ((x[:5], z, y, yhat), (x, z, y, yhat[:, 0])):
        with pytest.raises(LossplugError, match="shapes"):
            loss(*bad)


def test_cs_divergence(clouds):
    x, y = clouds
    loss = create("cs_divergence", sigma=0.8)
    mean = lambda a, b: gram(a, b, 0.8).mean()  # noqa: E731
    torch.testing.assert_close(loss(x, y), mean(x, x).log() + mean(y, y).log() - 2 * mean(x, y).log())
    torch.testing.assert_close(loss(x, y), loss(y, x))
    torch.testing.assert_close(loss(x, x), torch.zeros((), dtype=D), rtol=0, atol=1e-12)
    assert loss(x, y) > 0
    assert loss(x, y + 100).isfinite()
    with pytest.raises(LossplugError, match="points"):
        loss(x, y[:, :1])
