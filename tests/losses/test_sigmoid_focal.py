"""Identities of the card ``sigmoid_focal``; torchvision is the reference where it is defined."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_lossplug.losses import create


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return 3 * torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randint(2, (4, 6))


def test_equals_torchvision(batch):
    theirs = pytest.importorskip("torchvision.ops").sigmoid_focal_loss
    s, t = batch
    for alpha, gamma in ((0.25, 2.0), (-1.0, 1.0), (0.7, 0.5)):
        ours = create("sigmoid_focal", alpha=alpha, gamma=gamma)
        for reduction in ("none", "mean", "sum"):
            expected = theirs(s, t.double(), alpha=alpha, gamma=gamma, reduction=reduction)
            torch.testing.assert_close(ours(s, t, reduction=reduction), expected)


def test_gamma_zero_is_weighted_binary_cross_entropy(batch):
    s, t = batch
    weight = torch.where(t == 1, 0.3, 0.7)
    expected = (weight * F.binary_cross_entropy_with_logits(s, t.double(), reduction="none")).mean()
    torch.testing.assert_close(create("sigmoid_focal", alpha=0.3, gamma=0.0)(s, t), expected)


def test_two_class_softmax_focal_is_the_sigmoid_form(batch):
    s, t = batch
    s, t = s.flatten(), t.flatten()
    two = torch.stack([torch.zeros_like(s), s], dim=1)
    softmax_form = create("focal", gamma=1.7, reduction="none")(two, t)
    torch.testing.assert_close(create("sigmoid_focal", alpha=-1.0, gamma=1.7, reduction="none")(s, t), softmax_form)


def test_detection_divides_by_the_positives(batch):
    s, t = batch
    loss = create("sigmoid_focal")
    torch.testing.assert_close(loss(s, t, denominator=t.sum()), loss(s, t, reduction="sum") / t.sum())
    weight = torch.rand(4, 1, dtype=torch.float64)
    rows = loss(s, t, reduction="none")
    torch.testing.assert_close(loss(s, t, sample_weight=weight), (weight * rows).sum() / (6 * weight.sum()))


def test_true_gradient_below_gamma_one_at_certainty():
    s = torch.tensor([40.0, -40.0], requires_grad=True)
    create("sigmoid_focal", gamma=0.5)(s, torch.tensor([1, 0])).backward()
    assert s.grad.isfinite().all()
