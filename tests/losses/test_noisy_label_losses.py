"""Identities of the cards ``active_passive``, ``symmetric_ce``, ``symmetric_consistency`` and ``lse_penalty``."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import create

C = 6
A = math.log(1e-4)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return 2 * torch.randn(8, C, dtype=torch.float64, requires_grad=True), torch.randint(C, (8,))


def parts(z, y):
    log_p = z.log_softmax(1)
    return log_p.exp(), -log_p, F.one_hot(y, C).double()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("nce", {}), ("nfl", {"gamma": 0.5}), ("nfl", {"gamma": 2.0}), ("ngce", {}), ("nmae", {}), ("nrce", {})],
)
def test_normalised_losses_sum_to_one_over_labels(batch, name, parameters):
    z, _ = batch
    loss = create(name, **parameters, reduction="none")
    values = torch.stack([loss(z, torch.full((8,), k)) for k in range(C)])
    torch.testing.assert_close(values.sum(0), torch.ones(8, dtype=torch.float64))
    assert (values >= 0).all()


def test_nce_value_and_gradient(batch):
    z, y = batch
    p, n, e = parts(z, y)
    total = n.sum(1, keepdim=True)
    value = n.gather(1, y[:, None]) / total
    loss = create("nce", reduction="none")
    torch.testing.assert_close(loss(z, y), value[:, 0])
    grad = torch.autograd.grad(loss(z, y).sum(), z)[0]
    torch.testing.assert_close(grad, ((p - e - value * (C * p - 1)) / total).detach())


def test_definitions_of_the_family(batch):
    z, y = batch
    p, n, e = parts(z, y)
    p_y, n_y = (x.gather(1, y[:, None])[:, 0] for x in (p, n))
    expected = {
        ("rce", ()): -A * (1 - p_y),
        ("nmae", ()): (1 - p_y) / (C - 1),
        ("nmae", (("legacy", True),)): (1 - p_y) / (2 * (C - 1)),
        ("nrce", (("legacy", True),)): (C - 1) / 4 * -A * (1 - p_y),
        ("ngce", (("q", 0.4),)): (1 - p_y**0.4) / (C - (p**0.4).sum(1)),
        ("nfl", (("gamma", 0.5),)): (1 - p_y) ** 0.5 * n_y / ((1 - p) ** 0.5 * n).sum(1),
        ("nfl", (("gamma", 0.0),)): n_y / n.sum(1),
    }
    for (name, parameters), value in expected.items():
        torch.testing.assert_close(create(name, **dict(parameters), reduction="none")(z, y), value)
    # The reverse cross-entropy with clamped labels, as in the paper.
    reverse = -(p * e.clamp_min(1e-4).log()).sum(1)
    torch.testing.assert_close(create("rce", reduction="none")(z, y), reverse)


def test_detached_modulator_is_the_official_gradient(batch):
    z, y = batch
    _, n, e = parts(z, y)
    factor = (1 - z.detach().softmax(1)) ** 0.5
    official = (factor * n * e).sum(1) / (factor * n).sum(1)
    expected = torch.autograd.grad(official.sum(), z)[0]
    loss = create("nfl", detach_modulator=True)
    torch.testing.assert_close(torch.autograd.grad(loss(z, y, reduction="sum"), z)[0], expected)
    focal = create("focal", gamma=1.5, detach_modulator=True)
    p, _, e = parts(z.detach(), y)
    closed = (1 - p.gather(1, y[:, None])) ** 1.5 * (p - e)
    torch.testing.assert_close(torch.autograd.grad(focal(z, y, reduction="sum"), z)[0], closed)


def test_active_passive_is_the_weighted_sum(batch):
    z, y = batch
    for active, own in (("nce", {}), ("nfl", {"gamma": 0.3}), ("ngce", {"q": 0.4}), ("gce", {"q": 0.4})):
        for passive in ("rce", "mae"):
            loss = create("active_passive", active=active, passive=passive, alpha=10.0, beta=0.1, **own)
            expected = 10 * create(active, **own)(z, y) + 0.1 * create(passive)(z, y)
            torch.testing.assert_close(loss(z, y), expected)
    p, n, _ = parts(z, y)
    n_y, p_y = (x.gather(1, y[:, None])[:, 0] for x in (n, p))
    torch.testing.assert_close(create("apl")(z, y), (n_y / n.sum(1) - A * (1 - p_y)).mean())


def test_one_class_is_a_zero_loss():
    z, y = torch.randn(3, 1), torch.zeros(3, dtype=torch.long)
    for name in ("nce", "nfl", "ngce", "nmae", "nrce", "active_passive", "cross_entropy", "gce", "z_loss"):
        assert create(name)(z, y).isfinite()


def test_symmetric_ce(batch):
    z, y = batch
    torch.testing.assert_close(create("symmetric_ce", alpha=1.0, beta=0.0)(z, y), F.cross_entropy(z, y))
    p, _, e = parts(z.detach(), y)
    p_y = p.gather(1, y[:, None])
    loss = create("symmetric_ce", alpha=6.0, beta=0.1)
    torch.testing.assert_close(torch.autograd.grad(loss(z, y, reduction="sum"), z)[0], (6 - 0.1 * A * p_y) * (p - e))
    torch.testing.assert_close(create("symmetric_ce")(z, y), 0.1 * F.cross_entropy(z, y) + create("rce")(z, y))


def test_lse_penalty(batch):
    z, y = batch
    torch.testing.assert_close(create("lse_penalty", **{"lambda": 0.0})(z, y), F.cross_entropy(z, y))
    loss, lse = create("lse_penalty", **{"lambda": 0.3}), z.logsumexp(1)
    torch.testing.assert_close(loss(z, y), F.cross_entropy(z, y) + 0.3 * (lse**2).mean())
    p, _, e = parts(z.detach(), y)
    grad = torch.autograd.grad(loss(z, y, reduction="sum"), z)[0]
    torch.testing.assert_close(grad, p - e + 2 * 0.3 * lse.detach()[:, None] * p)
    # Over shifts of the logits the minimum is where the log-partition is 0.
    centred = loss(z - lse[:, None], y)
    assert all(loss(z - lse[:, None] + shift, y) > centred for shift in (-0.1, 0.1))


def teacher_logits():
    b = 2 * torch.randn(8, C, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return b.requires_grad_()


def test_symmetric_consistency_identities(batch):
    (z, _), b = batch, teacher_logits()
    s, t = z.softmax(1), b.softmax(1)
    plain = create("symmetric_consistency", w=0.0, reduction="none")
    torch.testing.assert_close(plain(z, b), -(t.detach() * s.log()).sum(1))
    torch.testing.assert_close(plain(z, b), F.cross_entropy(z, t.detach(), reduction="none"))
    both = create("symmetric_consistency")
    torch.testing.assert_close(both(z, b), both(b, z))
    reverse = create("symmetric_consistency", w=1.0)
    grad = torch.autograd.grad(reverse(z, b, reduction="sum"), z)[0]
    cost = -t.log()
    torch.testing.assert_close(grad, (s * (cost - (s * cost).sum(1, keepdim=True))).detach())


def test_teacher_gets_no_gradient_unless_asked(batch):
    (z, _), b = batch, teacher_logits()
    create("symmetric_consistency")(z, b).backward()
    assert b.grad is None
    torch.autograd.gradcheck(create("symmetric_consistency", w=0.3, detach_teacher=False), (z, b))


def test_symmetric_consistency_reduction_shapes_precision(batch):
    (z, _), b = batch, teacher_logits()
    loss = create("symmetric_consistency", w=0.2)
    rows = loss(z, b, reduction="none")
    scale = torch.linspace(0.1, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(loss(z, b), rows.mean())
    torch.testing.assert_close(loss(z, b, sample_weight=scale), (rows * scale).sum() / scale.sum())
    torch.testing.assert_close(loss(z, b, denominator=3), rows.sum() / 3)
    image, other = (x.view(2, 4, C).movedim(-1, 1) for x in (z, b))
    torch.testing.assert_close(loss(image, other, reduction="none"), rows.view(2, 4))
    torch.testing.assert_close(loss(z[0], b[0]), rows[0])
    assert loss(z[:0], b[:0]) == 0
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, b), loss(z, b))
    for dtype in (torch.float16, torch.bfloat16):
        hard = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], dtype=dtype, requires_grad=True)
        value = loss(hard, hard.detach().flip(0))
        value.backward()
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert hard.grad.isfinite().all()
    for bad in ((z, b[:, :-1]), (z, b.long()), (z.sum(), b.sum())):
        with pytest.raises(LossplugError):
            loss(*bad)
    with pytest.raises(LossplugError, match="sample_weight"):
        loss(z, b, sample_weight=scale[:3])
    for w in (-0.1, 1.1):
        with pytest.raises(LossplugError, match="w is"):
            create("symmetric_consistency", w=w)
