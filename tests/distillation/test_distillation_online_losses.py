"""The online methods as functions: BD-KD, DML, KDCL, SwitOKD, ONE, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.distillation import create
from lightning_lossplug.distillation import divergences as div
from lightning_lossplug.distillation.kdcl import ensemble_logits
from lightning_lossplug.errors import LossplugError

N, C = 8, 5


def logits(seed=0, k=2, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    found = [(scale * torch.randn(N, C, generator=g, dtype=torch.float64)).requires_grad_() for _ in range(k)]
    return found, torch.randint(C, (N,), generator=g)


def entropy(z):
    return torch.distributions.Categorical(logits=z).entropy()


@pytest.mark.parametrize("t", [1.0, 2.5])
@pytest.mark.parametrize("delta", [1.0, 2.0, 7.0])
def test_bdkd_values_and_closed_form_gradients(t, delta):
    (z_s, z_t), _ = logits()
    loss = create("bdkd", delta=delta, temperature=t, alpha_student=0.7, alpha_teacher=0.3)
    found = loss(z_s, z_t)
    q, p = (z_s / t).softmax(1), (z_t / t).softmax(1)
    h_s, h_t = entropy(z_s / t), entropy(z_t / t)
    w_f = torch.where(h_t > h_s, delta, 1.0)[:, None]
    w_r = torch.where(h_s > h_t, delta, 1.0)[:, None]
    fkl, rkl = (p * (p / q).log()).sum(1, keepdim=True), (q * (q / p).log()).sum(1, keepdim=True)
    torch.testing.assert_close(found.student, 0.7 * t**2 * (w_f * fkl + w_r * rkl).mean())
    torch.testing.assert_close(found.teachers[0], 0.3 * t**2 * rkl.mean())
    assert 0 < found.logs["frac_reverse_branch"] < 1 or delta == 1
    g_s, none = torch.autograd.grad(found.student, (z_s, z_t), retain_graph=True, allow_unused=True)
    assert none is None
    torch.testing.assert_close(g_s, 0.7 * t / N * (w_f * (q - p) + w_r * q * ((q / p).log() - rkl)))
    none, g_t = torch.autograd.grad(found.teachers[0], (z_s, z_t), allow_unused=True)
    assert none is None
    torch.testing.assert_close(g_t, 0.3 * t / N * (p - q))  # whatever delta


def test_bdkd_special_cases():
    (z_s, z_t), _ = logits()
    one = create("bdkd", delta=1.0, temperature=2.0)(z_s, z_t)
    torch.testing.assert_close(one.student, create("jeffreys", temperature=2.0)(z_s, z_t))
    same = create("bdkd")(z_s, z_s.detach().clone().requires_grad_())
    assert same.student.abs() < 1e-12
    (grad,) = torch.autograd.grad(same.student, z_s)
    assert grad.abs().max() < 1e-12
    # the weights of equal entropies (a permutation) are both 1
    w_f, w_r, *_ = create("bdkd").weights(z_s, z_s.flip(1))
    assert (w_f == 1).all()
    assert (w_r == 1).all()
    # a sharper student moves from the reverse to the forward branch
    assert (create("bdkd").weights(0.1 * z_t, z_t)[1] == 2).all()
    assert (create("bdkd").weights(10 * z_t, z_t)[0] == 2).all()
    forward = create("bdkd", teacher_term="forward")(z_s, z_t).teachers[0]
    torch.testing.assert_close(forward, div.forward_kl(z_s, z_t).mean())
    none = create("bdkd", teacher_term="none")(z_s, z_t).teachers[0]
    assert none == 0
    capped = create("bdkd", delta=1.0, reverse_cap=0.5)(z_s, z_t)
    want = div.forward_kl(z_s, z_t) + div.reverse_kl(z_s, z_t).clamp(max=0.5)
    torch.testing.assert_close(capped.student, want.mean())
    assert 0 < capped.logs["frac_capped"] <= 1
    wide = create("bdkd")(1e4 * z_s.bfloat16(), 1e4 * z_t.bfloat16())
    assert wide.student.isfinite()
    assert wide.student.dtype == torch.float32


def test_more_teachers_are_averaged():
    (z_s, a, b), _ = logits(k=3)
    loss = create("bdkd")
    both = loss(z_s, [a, b])
    torch.testing.assert_close(both.student, (loss(z_s, a).student + loss(z_s, b).student) / 2)
    want = (div.reverse_kl(z_s, a) + div.reverse_kl(b, a)).mean() / 2
    torch.testing.assert_close(both.teachers[0], want)
    with pytest.raises(LossplugError, match="2 teachers given, it takes one"):
        create("switokd")(z_s, [a, b], torch.zeros(N, dtype=torch.long))


def test_dml():
    (z_s, z_t), _ = logits()
    found, swapped = create("dml")(z_s, z_t), create("dml")(z_t, z_s)
    torch.testing.assert_close(found.student, div.forward_kl(z_s, z_t).mean())
    torch.testing.assert_close(found.student, swapped.teachers[0])
    three, _ = logits(k=3)
    mean, total = create("dml")(three[0], three[1:]), create("dml", legacy_sum=True)(three[0], three[1:])
    torch.testing.assert_close(2 * mean.student, total.student)
    (g,) = torch.autograd.grad(found.teachers[0], z_s, allow_unused=True, retain_graph=True)
    assert g is None
    # bdkd with the forward part alone
    torch.testing.assert_close(create("bdkd").student_rows(z_s, z_t)[1]["kd_fkl"], found.student.detach())


def test_kdcl_targets():
    three, y = logits(k=3)
    target = ensemble_logits(three, y, "minlogit")
    assert (target.gather(1, y[:, None]) == 0).all()
    correct = torch.stack([z.argmax(1) == y for z in three]).any(0)
    assert (target[correct] <= 0).all()
    naive = ensemble_logits(three, y, "naive")
    losses = torch.stack([F.cross_entropy(z, y, reduction="none") for z in three])
    torch.testing.assert_close(F.cross_entropy(naive, y, reduction="none"), losses.amin(0))
    same = create("kdcl", ensemble="naive")(three[0], three[0].detach().clone(), y)
    assert same.student.abs() < 1e-12
    found = create("kdcl")(three[0], three[1:], y)
    want = div.forward_kl(three[1], target.detach(), 2.0).mean() * 4
    torch.testing.assert_close(found.teachers[0], want)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 8.0))
def test_switokd_decides_by_three_means(seed, scale):
    (z_s, z_t), y = logits(seed, scale=scale)
    z_s = z_s.detach()
    found = create("switokd")(z_s, z_t, y)
    q, p, hot = z_s.softmax(1), z_t.softmax(1), F.one_hot(y, C)
    gap, l_s, l_t = ((a - b).abs().sum(1).mean().item() for a, b in ((q, p), (q, hot), (p, hot)))
    expert = gap > l_s - math.exp(-l_t / (l_s + l_t)) * l_t and l_t < l_s
    assert bool(found.learn) is not expert
    torch.testing.assert_close(found.student, div.forward_kl(z_s, z_t).mean())
    want = div.reverse_kl(z_s, z_t).mean() * (not expert)
    torch.testing.assert_close(found.teachers[0], want)
    assert found.teachers[0].requires_grad  # in the graph even when it pauses


def test_one():
    branches, y = logits(k=3)
    gate = torch.randn(N, 3, dtype=torch.float64).softmax(1)
    loss = create("one")
    assert loss.ramp(0) == pytest.approx(math.exp(-5))
    assert loss.ramp(80) == loss.ramp(200) == 1
    ensemble = sum(gate[:, i : i + 1] * z for i, z in enumerate(branches))
    task = sum(F.cross_entropy(z, y) for z in (*branches, ensemble))
    apart = sum(9 * div.forward_kl(z, ensemble.detach(), 3.0).mean() for z in branches)
    torch.testing.assert_close(loss(branches, gate, y, epoch=40), task + loss.ramp(40) * apart)
    same = [branches[0]] * 3
    torch.testing.assert_close(loss(same, gate, y), 4 * F.cross_entropy(branches[0], y))
    with pytest.raises(LossplugError, match="gate has shape"):
        loss(branches, gate[:, :2], y)


def test_tokens_and_masks():
    (z_s, z_t), y = logits()
    mask = torch.arange(N) % 2 == 0
    loss = create("bdkd")
    found = loss(z_s.view(2, 4, C), z_t.view(2, 4, C), mask=mask.view(2, 4))
    torch.testing.assert_close(found.student, loss(z_s[mask], z_t[mask]).student)
    ignored = torch.where(mask, y, -100)
    found = create("switokd")(z_s, z_t, ignored)
    torch.testing.assert_close(found.student, create("switokd")(z_s[mask], z_t[mask], y[mask]).student)
    with pytest.raises(LossplugError, match="student has 5 classes, the teacher has 4"):
        loss(z_s, z_t[:, :4])
    with pytest.raises(LossplugError, match="needs class indices"):
        create("kdcl")(z_s, z_t)
