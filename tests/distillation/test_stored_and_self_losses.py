"""Stored top-k teachers and DINO, in float64."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.distillation import create, top_logits
from lightning_lossplug.distillation import divergences as div
from lightning_lossplug.errors import LossplugError

N, C = 5, 9


def logits(seed=0):
    g = torch.Generator().manual_seed(seed)
    z_s, z_t = (2 * torch.randn(N, C, generator=g, dtype=torch.float64) for _ in range(2))
    return z_s.requires_grad_(), z_t


@pytest.mark.parametrize("missing", ["tail", "zero"])
@pytest.mark.parametrize("t", [1.0, 2.0])
def test_everything_stored_is_the_full_divergence(missing, t):
    z_s, z_t = logits()
    loss = create("topk_logits", missing=missing, temperature=t)
    found = loss(z_s, *top_logits(z_t, C, torch.float64))
    torch.testing.assert_close(found, div.forward_kl(z_s, z_t, t).mean(), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(found, z_s)
    torch.testing.assert_close(grad, ((z_s / t).softmax(1) - (z_t / t).softmax(1)) / (N * t), rtol=1e-5, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_the_tail_form_grows_to_the_full_divergence(seed):
    z_s, z_t = logits(seed)
    loss = create("topk_logits", reduction="none")
    rows = [loss(z_s, *top_logits(z_t, k, torch.float64)) for k in range(1, C + 1)]
    for less, more in pairwise(rows):
        assert (less <= more + 1e-9).all()
    assert (rows[0] >= -1e-12).all()


def test_stored_masks_and_mistakes():
    z_s, z_t = logits()
    ids, stored = top_logits(z_t, 3)
    assert stored.dtype == torch.float16
    loss = create("topk_logits")
    mask = torch.arange(N) < 3
    torch.testing.assert_close(loss(z_s, ids, stored, mask=mask), loss(z_s[:3], ids[:3], stored[:3]))
    assert torch.autograd.gradcheck(lambda z: loss(z, ids, stored.double()), (z_s,))
    with pytest.raises(LossplugError, match=r"a stored id is .* the student has 4 classes"):
        loss(z_s[:, :4], ids, stored)
    with pytest.raises(LossplugError, match="don't fit"):
        loss(z_s, ids[:2], stored)
    with pytest.raises(LossplugError, match="k is 12"):
        top_logits(z_t, 12)


def test_dino():
    g = torch.Generator().manual_seed(0)
    teacher = [torch.randn(N, C, generator=g, dtype=torch.float64) for _ in range(2)]
    student = [torch.randn(N, C, generator=g, dtype=torch.float64).requires_grad_() for _ in range(4)]
    loss = create("dino", out_dim=C).double()
    with torch.no_grad():
        loss.center.copy_(torch.randn(C, generator=g))
    center, want = loss.center.clone(), []
    for i, t in enumerate(teacher):
        for j, s in enumerate(student):
            if i != j:
                want.append(-(((t - center) / 0.04).softmax(1) * (s / 0.1).log_softmax(1)).sum(1).mean())
    assert len(want) == 2 * (4 + 0) - 2
    torch.testing.assert_close(loss(student, teacher), torch.stack(want).mean())
    torch.testing.assert_close(loss.center, 0.9 * center + 0.1 * torch.cat(teacher).mean(0))
    moved = loss.center.clone()
    loss.eval()(student, teacher)
    assert torch.equal(loss.center, moved)
    uniform = [torch.zeros(N, C, dtype=torch.float64)] * 2
    flat = create("dino", out_dim=C).double()
    torch.testing.assert_close(flat(uniform, uniform), torch.tensor(math.log(C), dtype=torch.float64))
    for _ in range(200):
        flat([teacher[0]] * 2, [teacher[0]] * 2)
    torch.testing.assert_close(flat.center, teacher[0].mean(0))
    again = create("dino", out_dim=C).double()
    again.load_state_dict(flat.state_dict())
    assert torch.equal(again.center, flat.center)
    with pytest.raises(LossplugError, match="at least two student views"):
        loss(student[:1], teacher)
