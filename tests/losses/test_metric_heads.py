"""Margin heads: ArcFace, CosFace and AdaFace."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import LabelError, create

EXACT = {"rtol": 1e-12, "atol": 1e-12}
C, D, B = 5, 4, 6
Y = torch.tensor([0, 4, 2, 2, 1, 3])


def embeddings(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        20
        * torch.rand(B, 1, generator=generator, dtype=torch.float64)
        * torch.randn(B, D, generator=generator, dtype=torch.float64)
    )


def head(name: str, **parameters):
    torch.manual_seed(1)
    return create(name, num_classes=C, embedding_size=D, **parameters).double()


def with_margin(loss, x: torch.Tensor, angle, additive) -> torch.Tensor:
    """Cross-entropy with target logit ``s (cos(theta + angle) - additive)``."""
    cosine = F.normalize(x) @ F.normalize(loss.weight).T
    target = cosine.gather(1, Y[:, None]).squeeze(1)
    hard = (target.acos() + angle).cos() - additive
    return F.cross_entropy(loss.s * cosine.scatter(1, Y[:, None], hard[:, None]), Y)


@pytest.mark.parametrize("name", ["arcface", "cosface", "adaface"])
class TestEveryHead:
    def test_weight_is_a_parameter_of_unit_rows(self, name):
        loss = head(name)
        assert loss.weight.shape == (C, D)
        torch.testing.assert_close(loss.weight.norm(dim=1), torch.ones(C).double(), rtol=1e-6, atol=1e-6)
        assert [key for key, _ in loss.named_parameters()] == ["weight"]

    def test_length_of_class_weights_does_not_matter(self, name):
        loss, x = head(name).eval(), embeddings()
        value = loss(x, Y)
        with torch.no_grad():
            loss.weight *= torch.arange(1, C + 1)[:, None]
        torch.testing.assert_close(loss(x, Y), value, **EXACT)

    def test_no_margin_is_scaled_softmax(self, name):
        loss, x = head(name, m=0.0, s=8.0).eval(), embeddings()
        torch.testing.assert_close(loss(x, Y), with_margin(loss, x, 0.0, 0.0), **EXACT)

    def test_labels_outside_the_classes(self, name):
        for label in (-100, -1, C):
            with pytest.raises(LabelError, match="outside"):
                head(name)(embeddings(), torch.full((B,), label))
        with pytest.raises(LossplugError, match="width"):
            head(name)(embeddings()[:, :2], Y)


def test_arcface_adds_to_the_angle():
    loss, x = head("arcface", m=0.3, s=8.0), embeddings()
    torch.testing.assert_close(loss(x, Y), with_margin(loss, x, 0.3, 0.0), rtol=1e-9, atol=1e-9)


def test_arcface_past_pi_keeps_falling():
    loss = create("arcface", num_classes=2, embedding_size=2, m=0.5, s=1.0, reduction="none").double()
    with torch.no_grad():
        loss.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    theta = torch.linspace(math.pi - 0.6, math.pi - 0.01, 20, dtype=torch.float64)
    x = torch.stack([theta.cos(), -theta.sin()], dim=1)
    other = x[:, 1]
    target = other - (loss(x, torch.zeros(20, dtype=torch.long)).exp() - 1).log()
    assert (target.diff() < 0).all()


def test_cosface_subtracts_from_the_cosine():
    loss, x = head("cosface", m=0.2, s=8.0), embeddings()
    torch.testing.assert_close(loss(x, Y), with_margin(loss, x, 0.0, 0.2), **EXACT)


class TestAdaFace:
    def at_quality(self, q: float, **parameters):
        """An evaluated head whose rows all have quality ``q`` (h = 1), and rows of length 20."""
        loss = head("adaface", h=1.0, s=8.0, **parameters).eval()
        loss.batch_mean.fill_(20 - 100 * q)
        loss.batch_std.fill_(100 - 1e-3)
        return loss, F.normalize(embeddings()) * 20

    def test_quality_zero_is_cosface(self):
        loss, x = self.at_quality(0.0)
        torch.testing.assert_close(loss(x, Y), with_margin(loss, x, 0.0, 0.4), rtol=1e-6, atol=1e-6)

    def test_quality_one_is_minus_m_on_the_angle_and_two_m_off(self):
        loss, x = self.at_quality(1.0)
        torch.testing.assert_close(loss(x, Y), with_margin(loss, x, -0.4, 0.8), rtol=1e-6, atol=1e-6)

    def test_quality_minus_one_is_arcface(self):
        loss, x = self.at_quality(-1.0)
        torch.testing.assert_close(loss(x, Y), with_margin(loss, x, 0.4, 0.0), rtol=1e-6, atol=1e-6)

    def test_no_concentration_is_cosface(self):
        loss, x = head("adaface", h=0.0, s=8.0).eval(), embeddings()
        torch.testing.assert_close(loss(x, Y), with_margin(loss, x, 0.0, 0.4), **EXACT)

    def test_rows_by_hand(self):
        loss, x = head("adaface", s=8.0).eval(), embeddings()
        norm = x.norm(dim=1).clamp(0.001, 100)
        q = (0.333 * (norm - 20) / (100 + 1e-3)).clamp(-1, 1)
        torch.testing.assert_close(loss(x, Y), with_margin(loss, x, -0.4 * q, 0.4 + 0.4 * q), **EXACT)

    def test_statistics_move_in_training_before_use_and_rest_in_evaluation(self):
        x = embeddings()
        norm = x.norm(dim=1)
        loss = head("adaface", t_alpha=0.3)
        trained = loss(x, Y)
        mean, std = 0.3 * norm.mean() + 0.7 * 20, 0.3 * norm.std() + 0.7 * 100
        torch.testing.assert_close(loss.batch_mean, mean, **EXACT)
        torch.testing.assert_close(loss.batch_std, std, **EXACT)
        torch.testing.assert_close(loss.eval()(x, Y), trained, **EXACT)
        torch.testing.assert_close(loss.batch_mean, mean, **EXACT)

    def test_a_batch_of_one_keeps_the_deviation(self):
        loss = head("adaface", t_alpha=1.0)
        x = embeddings()[:1]
        assert loss(x, Y[:1]).isfinite()
        assert loss.batch_std == 100
        torch.testing.assert_close(loss.batch_mean, x.norm(), **EXACT)

    def test_length_has_no_gradient(self):
        x = embeddings().requires_grad_()
        head("adaface", s=8.0).eval()(x, Y).backward()
        radial = (x.grad * x.detach()).sum(dim=1)
        torch.testing.assert_close(radial, torch.zeros(B).double(), rtol=0, atol=1e-12)
        assert x.grad.abs().sum() > 0

    def test_statistics_are_saved(self):
        loss = head("adaface", t_alpha=0.5)
        loss(embeddings(), Y)
        assert {"batch_mean", "batch_std", "weight"} == set(loss.state_dict())
