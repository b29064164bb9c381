"""Losses of features: identities, invariances, gradients, shapes that don't fit."""

import pytest
import torch
from torch import nn

from lightning_lossplug.distillation import create, spaced_layers
from lightning_lossplug.distillation.at import attention_map
from lightning_lossplug.distillation.fitnet import regressor
from lightning_lossplug.distillation.reviewkd import hierarchical_distance
from lightning_lossplug.distillation.rkd import angles, distances
from lightning_lossplug.errors import LossplugError


@pytest.fixture()
def maps():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(4, c, 6, 6, generator=g, dtype=torch.float64).requires_grad_(c == 3) for c in (3, 5)]


def test_attention_transfer(maps):
    student, teacher = maps
    loss = create("at")
    value = loss(student, teacher)
    q_s, q_t = ((f.square().mean(1).flatten(1)) for f in maps)
    want = (q_s / q_s.norm(dim=1, keepdim=True) - q_t / q_t.norm(dim=1, keepdim=True)).square().mean()
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(loss(7 * student, 0.1 * teacher), value)
    torch.testing.assert_close(loss(student[:, [2, 0, 1]], teacher), value)
    assert loss(student, student.detach()) == 0
    assert torch.autograd.gradcheck(lambda f: loss(f, teacher), (student,))
    torch.testing.assert_close(loss([student, student], [teacher, teacher]), 2 * value)
    pooled = loss(student, nn.functional.interpolate(teacher, scale_factor=2))
    torch.testing.assert_close(pooled, value)
    assert attention_map(torch.zeros(1, 2, 3, 3)).isfinite().all()
    with pytest.raises(LossplugError, match=r"expected maps \[N, C, H, W\]"):
        loss(student.flatten(1), teacher)
    with pytest.raises(LossplugError, match="2 features of the student, 1 of the teacher"):
        loss([student, student], teacher)


def test_relations(maps):
    g = torch.Generator().manual_seed(0)
    e = torch.randn(5, 4, generator=g, dtype=torch.float64).requires_grad_()
    other = torch.randn(5, 3, generator=g, dtype=torch.float64)
    loss = create("rkd")
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64)).Q
    moved = 3.0 * e.detach() @ rotation + 1.0
    assert loss(e, moved) < 1e-12
    torch.testing.assert_close(loss(2 * e @ rotation - 5, other), loss(e, other))
    d = torch.cdist(e, e)
    torch.testing.assert_close(distances(e), d / d[d > 0].mean())
    a = angles(e)
    i, j, k = 0, 1, 3
    want = torch.cosine_similarity(e[j] - e[i], e[k] - e[i], dim=0)
    torch.testing.assert_close(a[i, j, k], want)
    assert torch.autograd.gradcheck(lambda x: loss(x, other), (e,))
    twice = torch.cat([e[:2], e[:2]])
    (grad,) = torch.autograd.grad(loss(twice, other[:4]), e)
    assert grad.isfinite().all()
    small = create("rkd", distance_weight=0, max_samples=3)
    torch.testing.assert_close(small(e, other), small(e[:3], other[:3]))
    with pytest.raises(LossplugError, match="5 samples of the student, 4 of the teacher"):
        loss(e, other[:4])


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 3, 8, 8), (2, 5, 4, 4)), ((2, 3, 4, 4), (2, 5, 8, 8)), ((2, 3, 6, 6), (2, 5, 5, 5)), ((2, 7, 3), (2, 7, 4))],
)
def test_regressors_give_the_teachers_shape(student, teacher):
    torch.manual_seed(0)
    s, t = torch.randn(student), torch.randn(teacher)
    assert regressor(s.shape, t.shape)(s).shape == t.shape
    loss = create("fitnet")
    loss.build([s], [t])
    assert loss(s, t) > 0
    assert len(list(loss.parameters())) > 0
    loss(s, t).backward()
    assert all(p.grad is not None for p in loss.parameters())


def test_hints_without_a_regressor(maps):
    student, _ = maps
    loss = create("fitnet")
    loss.build([student], [student])
    assert not list(loss.parameters())
    assert loss(student, student) == 0
    torch.testing.assert_close(loss(student, student + 2), torch.tensor(4.0, dtype=torch.float64))
    with pytest.raises(LossplugError, match="Call build"):
        loss(*maps)
    with pytest.raises(LossplugError, match="no regressor fits"):
        regressor(torch.Size([2, 3, 5, 5]), torch.Size([2, 3, 9, 9]))


def test_knowledge_review():
    torch.manual_seed(0)
    student = [torch.randn(4, c, n, n).requires_grad_() for c, n in ((3, 8), (6, 4))]
    teacher = [torch.randn(4, c, n, n).requires_grad_() for c, n in ((5, 8), (10, 2))]
    loss = create("reviewkd")
    with pytest.raises(LossplugError, match="2 features for 0 fusion modules"):
        loss(student, teacher)
    loss.build(student, teacher)
    loss(student, teacher).backward()
    assert all(f.grad is not None for f in student)
    assert all(f.grad is None for f in teacher)
    assert all(p.grad is not None for p in loss.parameters())
    assert loss(student, teacher).dtype == torch.float32
    # the shallow stage also learns what the deep one has to say
    deep = torch.autograd.grad(
        loss.pair(loss.fusions[1](student[0], loss.fusions[0](student[1], None)[1])[0], teacher[0], 0), student[1]
    )
    assert deep[0].abs().sum() > 0


def test_the_hierarchical_distance():
    a, b = torch.randn(2, 3, 3, 3, dtype=torch.float64), torch.randn(2, 3, 3, 3, dtype=torch.float64)
    assert hierarchical_distance(a, a) == 0
    small = [nn.functional.adaptive_avg_pool2d(a - b, side).square().mean() for side in (2, 1)]
    want = ((a - b).square().mean() + small[0] / 2 + small[1] / 4) / 1.75  # a side of 4 is not below 3
    torch.testing.assert_close(hierarchical_distance(a, b), want)


def test_hidden_cosine():
    h = torch.randn(2, 3, 4, dtype=torch.float64)
    loss = create("hidden_cosine")
    assert loss(h, 5 * h).abs() < 1e-12
    torch.testing.assert_close(loss(h, -h), torch.tensor(2.0, dtype=torch.float64))
    assert spaced_layers(12, 6) == [0, 2, 4, 7, 9, 11]
    assert spaced_layers(4, 1) == [0]
    with pytest.raises(LossplugError, match="5 layers can't be taken from 4"):
        spaced_layers(4, 5)


@pytest.mark.parametrize("name", ["at", "rkd", "fitnet", "hidden_cosine"])
def test_the_teacher_gets_no_gradient_and_half_precision_is_upcast(name):
    s, t = torch.randn(4, 3, 5, 5).requires_grad_(), torch.randn(4, 3, 5, 5).requires_grad_()
    create(name)(s, t).backward()
    assert t.grad is None
    assert s.grad.isfinite().all()
    half = create(name)(s.bfloat16(), t.bfloat16())
    assert half.dtype == torch.float32
