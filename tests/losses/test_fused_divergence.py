"""Divergences of two fused heads equal those of their materialised logits."""

import math

import pytest
import torch

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.fused import fused_linear_divergence

KINDS = ("kl", "reverse_kl", "jsd")


def heads(rows=10, classes=14, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    student = [make(rows, 4).requires_grad_(), make(classes, 4).requires_grad_(), make(classes).requires_grad_()]
    return student, [make(rows, 6), make(classes, 6), make(classes)]


def logits(h, w, b, softcap=None):
    z = h @ w.T + b
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def materialised(z_s, z_t, kind, temperature=1.0, beta=0.5):
    q, p = (z_s / temperature).softmax(-1), (z_t / temperature).softmax(-1)
    kl = lambda a, b: (a * (a.log() - b.log())).sum(-1)  # noqa: E731
    if kind == "kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def same(ours, reference, inputs, upstream=None):
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-13)
    ours, reference = (torch.autograd.grad(v, inputs, upstream, retain_graph=True) for v in (ours, reference))
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [1, 3, 10, None])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equals_the_materialised_divergence(kind, tile, temperature, softcap):
    (h, w, b), (h_t, w_t, b_t) = heads()
    ours = fused_linear_divergence(
        h, w, h_t, w_t, kind=kind, beta=0.3, temperature=temperature, bias=b, teacher_bias=b_t,
        softcap=softcap, teacher_softcap=3.0, tile=tile,
    )  # fmt: skip
    rows = materialised(logits(h, w, b, softcap), logits(h_t, w_t, b_t, 3.0), kind, temperature, 0.3)
    same(ours, temperature**2 * rows.mean(), (h, w, b))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_weights_and_reductions(kind):
    (h, w, b), (h_t, w_t, b_t) = heads()
    mask = torch.arange(10) % 3 != 1
    s = torch.rand(10, dtype=torch.float64)
    call = {"bias": b, "teacher_bias": b_t, "kind": kind, "mask": mask, "sample_weight": s, "tile": 3}
    rows = torch.where(mask, s * materialised(logits(h, w, b), logits(h_t, w_t, b_t), kind), 0)
    kept = (s * mask).sum()
    for reduction, expected in (("sum", rows.sum()), ("mean", rows.sum() / kept)):
        same(fused_linear_divergence(h, w, h_t, w_t, reduction=reduction, **call), expected, (h, w, b))
    ours = fused_linear_divergence(h, w, h_t, w_t, denominator=4, **call)
    same(ours, rows.sum() / 4, (h, w, b))
    ours = fused_linear_divergence(h, w, h_t, w_t, reduction="none", **call)
    same(ours, rows, (h, w, b), torch.randn(10, dtype=torch.float64))
    learned = s.clone().requires_grad_()
    ours = fused_linear_divergence(h, w, h_t, w_t, **{**call, "sample_weight": learned})
    rows = torch.where(mask, learned * materialised(logits(h, w, b), logits(h_t, w_t, b_t), kind), 0)
    same(ours, rows.sum() / (learned * mask).sum(), (h, w, b, learned))


@pytest.mark.parametrize("kind", KINDS)
def test_zero_for_equal_heads(kind):
    (h, w, b), _ = heads()
    value = fused_linear_divergence(h, w, h, w, kind=kind, bias=b, teacher_bias=b, temperature=2.0)
    gradients = torch.autograd.grad(value, (h, w, b))
    assert abs(value.item()) < 1e-15
    assert all(g.abs().max() < 1e-15 for g in gradients)


def test_limits_of_jsd():
    (h, w, b), (h_t, w_t, b_t) = heads()
    call = {"bias": b, "teacher_bias": b_t}
    for beta, kind, factor in ((1e-6, "kl", 1e-6), (1 - 1e-6, "reverse_kl", 1e-6)):
        jsd = fused_linear_divergence(h, w, h_t, w_t, kind="jsd", beta=beta, **call) / factor
        torch.testing.assert_close(jsd, fused_linear_divergence(h, w, h_t, w_t, kind=kind, **call), rtol=1e-4, atol=0)
    rows = fused_linear_divergence(h, 50 * w, h_t, 50 * w_t, kind="jsd", beta=0.5, reduction="none")
    assert (rows <= math.log(2) + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_classes_masked_on_both_sides(kind):
    (h, w, b), (h_t, w_t, b_t) = heads()
    b, b_t = b.detach().clone(), b_t.clone()
    b[10:], b_t[10:] = -torch.inf, -torch.inf
    ours = fused_linear_divergence(h, w, h_t, w_t, kind=kind, bias=b, teacher_bias=b_t)
    expected = materialised(logits(h, w, b)[:, :10], logits(h_t, w_t, b_t)[:, :10], kind)
    same(ours, expected.mean(), (h, w))


def test_backward_twice_frozen_parts_and_no_teacher_gradient():
    (h, w, b), (h_t, w_t, _) = heads()
    w_t.requires_grad_()
    value = fused_linear_divergence(h, w, h_t, w_t, bias=b, tile=4)
    first = torch.autograd.grad(3 * value, (h, w, b), retain_graph=True)
    second = torch.autograd.grad(3 * value, (h, w, b), retain_graph=True)
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
    value.backward()
    assert w_t.grad is None
    w.requires_grad_(False)
    (alone,) = torch.autograd.grad(fused_linear_divergence(h, w, h_t, w_t, bias=b), (h,))
    torch.testing.assert_close(alone, first[0] / 3, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(fused_linear_divergence(h, w, h_t, w_t, bias=b), value.detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_everything_masked(reduction):
    (h, w, _), (h_t, w_t, _) = heads()
    value = fused_linear_divergence(h, w, h_t, w_t, mask=torch.zeros(10, dtype=torch.bool), reduction=reduction)
    value.sum().backward()
    assert not value.any()
    assert not w.grad.any()
    assert not h.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_and_autocast(kind):
    (h, w, b), (h_t, w_t, b_t) = heads(rows=64, classes=300, dtype=torch.float32)
    exact = materialised(logits(h, w, b), logits(h_t, w_t, b_t), kind).mean()
    expected = torch.autograd.grad(exact, (h, w, b))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = fused_linear_divergence(h, w, h_t, w_t, bias=b, teacher_bias=b_t, kind=kind, tile=16)
    assert ours.dtype == torch.float32
    assert abs(ours - exact) < 5e-3 * exact
    for a, e in zip(torch.autograd.grad(ours, (h, w, b)), expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - e).norm() < 1e-2 * e.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_weight": torch.zeros(8, 3)}, "has 7 rows, the teacher's 8"),
        ({"kind": "tvd"}, "tvd"),
        ({"kind": "jsd", "beta": 1.0}, "beta is 1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"teacher_hidden": torch.zeros(5, 3)}, "teacher_hidden has rows"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask has rows"),
        ({"bias": torch.zeros(3)}, "bias has shape"),
        ({"hidden": torch.zeros(4, 2)}, "don't fit the weight"),
        ({"reduction": "batchmean"}, "batchmean"),
        ({"tile": 0}, "tile is 0"),
    ],
)
def test_bad_input_is_named(change, message):
    call = {
        "hidden": torch.zeros(4, 3),
        "weight": torch.zeros(7, 3),
        "teacher_hidden": torch.zeros(4, 3),
        "teacher_weight": torch.zeros(7, 3),
    }
    with pytest.raises(LossplugError, match=message):
        fused_linear_divergence(**{**call, **change})
