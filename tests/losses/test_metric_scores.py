"""Losses of scores against sets of positives: decoupled softmax, soft top-k, cosine contrastive."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import create
from lightning_lossplug.losses.soft_topk import soft_topk_logits

EXACT = {"rtol": 1e-12, "atol": 1e-12}
NAMES = ["decoupled_softmax", "soft_topk", "ccl"]
SETS = [[0], [2, 5], [], [1, 3, 6]]


def scores(rows: int = 4, labels: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, labels, generator=generator, dtype=torch.float64)


def mask() -> torch.Tensor:
    found = torch.zeros(4, 7, dtype=torch.bool)
    for row, columns in enumerate(SETS):
        found[row, columns] = True
    return found


@pytest.mark.parametrize("name", NAMES)
class TestPositives:
    def test_every_form_says_the_same(self, name):
        loss, s = create(name), scores()
        expected = loss(s, mask())
        padded = torch.tensor([[0, -1, -1], [2, 5, -100], [-1, -1, -1], [6, 1, 3]])
        for form in (mask().double(), SETS, [tuple(row) for row in SETS], padded, padded.int()):
            torch.testing.assert_close(loss(s, form), expected, rtol=0, atol=0)

    def test_none_and_one_index_per_row(self, name):
        loss, s = create(name), scores()
        torch.testing.assert_close(loss(s), loss(s, torch.zeros(4, dtype=torch.long)), rtol=0, atol=0)

    def test_rows_without_positives_are_not_counted(self, name):
        s = scores()
        rows = create(name, reduction="none")(s, mask())
        assert rows[2] == 0
        torch.testing.assert_close(create(name)(s, mask()), rows.sum() / 3)
        assert create(name)(s, torch.zeros(4, 7, dtype=torch.bool)) == 0

    def test_labels_can_be_renumbered(self, name):
        s, order = scores(), torch.randperm(7)
        loss = create(name)
        torch.testing.assert_close(loss(s[:, order], mask()[:, order]), loss(s, mask()), **EXACT)

    def test_gradient(self, name):
        s = scores().requires_grad_()
        loss = create(name)
        assert torch.autograd.gradcheck(lambda z: loss(z, mask()), (s,))
        assert torch.autograd.gradgradcheck(lambda z: loss(z, mask()), (s,))

    def test_refusals(self, name):
        loss, s = create(name), scores()
        for bad, match in (
            (torch.ones(4, 7, dtype=torch.long), "mask or indices"),
            (torch.ones(4, 6, dtype=torch.bool), "mask of positives"),
            (torch.tensor([0, 1, 2]), "don't fit"),
            (torch.tensor([0, 1, 2, 7]), "outside the 7 labels"),
            ([[0], [1]], "don't fit"),
        ):
            with pytest.raises(LossplugError, match=match):
                loss(s, bad)


class TestDecoupledSoftmax:
    def test_one_positive_is_cross_entropy(self):
        s, y = scores(), torch.tensor([3, 0, 6, 2])
        torch.testing.assert_close(create("decoupled_softmax")(s, y), F.cross_entropy(s, y), **EXACT)
        torch.testing.assert_close(create("decoupled_softmax", tau=0.3)(s, y), F.cross_entropy(s / 0.3, y), **EXACT)

    def test_positives_do_not_compete(self):
        s, positive = scores(1), torch.tensor([[True, True, False, False, False, False, False]])
        expected = 0
        for j in range(2):
            kept = torch.cat([s[:, j : j + 1], s[:, 2:]], dim=1)
            expected = expected + F.cross_entropy(kept, torch.tensor([0])) / 2
        torch.testing.assert_close(create("decoupled_softmax")(s, positive), expected, **EXACT)

    def test_without_negatives_it_is_zero(self):
        s = scores().requires_grad_()
        value = create("decoupled_softmax")(s, torch.ones(4, 7, dtype=torch.bool))
        value.backward()
        assert value == 0
        assert (s.grad == 0).all()

    def test_scores_below_minus_one_hundred(self):
        s = scores() - 500
        torch.testing.assert_close(
            create("decoupled_softmax")(s, mask()), create("decoupled_softmax")(s + 500, mask()), rtol=1e-10, atol=0
        )


class TestSoftTopK:
    @settings(max_examples=30, deadline=None)
    @given(
        seed=st.integers(0, 10_000),
        labels=st.integers(2, 40),
        share=st.floats(0.001, 0.999),
        alpha=st.floats(0.01, 100),
        spread=st.floats(0.0, 50),
    )
    def test_memberships_sum_to_k(self, seed, labels, share, alpha, spread):
        k = share * labels
        p = soft_topk_logits(scores(3, labels, seed) * spread, torch.full((3,), k), alpha).sigmoid()
        torch.testing.assert_close(p.sum(dim=1), torch.full((3,), k).double(), rtol=1e-6, atol=1e-6)

    def test_many_labels_and_few_to_pick(self):
        # with 100000 labels a bracket of +-10/alpha around the scores would not hold the root
        p = soft_topk_logits(torch.zeros(1, 100_000), 1, 1.0).sigmoid()
        torch.testing.assert_close(p.sum(), torch.tensor(1.0), rtol=1e-3, atol=0)

    def test_large_alpha_is_the_top_k_indicator(self):
        s = scores()
        p = soft_topk_logits(s, 3, 1e4).sigmoid()
        torch.testing.assert_close(p, torch.zeros_like(s).scatter(1, s.topk(3).indices, 1.0))

    def test_jacobian_and_shift(self):
        s = scores(1).requires_grad_()
        p = soft_topk_logits(s, 3, 2.0).sigmoid()
        g = scores(1, seed=1)
        (grad,) = torch.autograd.grad(p, s, g)
        v = (2 * p * (1 - p)).detach()
        torch.testing.assert_close(grad, v * g - v * (v * g).sum() / v.sum(), **EXACT)
        assert grad.sum().abs() < 1e-12
        torch.testing.assert_close(soft_topk_logits(s + 100, 3, 2.0), soft_topk_logits(s, 3, 2.0), rtol=1e-9, atol=1e-9)

    def test_log_gradient(self):
        s = scores(1).requires_grad_()
        log_p = F.logsigmoid(soft_topk_logits(s, 3, 2.0))
        g = scores(1, seed=1)
        (grad,) = torch.autograd.grad(log_p, s, g)
        p = log_p.detach().exp()
        v, u = 2 * p * (1 - p), 2 * g * (1 - p)
        torch.testing.assert_close(grad, u - v * u.sum() / v.sum(), **EXACT)

    def test_loss_by_hand_and_k_from_the_positives(self):
        s = scores()
        kept = [0, 1, 3]
        log_p = F.logsigmoid(soft_topk_logits(s[kept], torch.tensor([1.0, 2.0, 3.0]), 1.5))
        expected = -sum(log_p[i][mask()[row]].mean() for i, row in enumerate(kept)) / 3
        torch.testing.assert_close(create("soft_topk", alpha=1.5)(s, mask()), expected, **EXACT)
        log_p = F.logsigmoid(soft_topk_logits(s[kept] / 0.5, 4, 2.0))
        expected = -sum(log_p[i][mask()[row]].mean() for i, row in enumerate(kept)) / 3
        torch.testing.assert_close(create("soft_topk", k=4, tau=0.5)(s, mask()), expected, **EXACT)

    def test_saturated_memberships_keep_a_gradient(self):
        # every p (1 - p) underflows, their ratio does not
        s = torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True)
        create("soft_topk", k=1)(s, torch.tensor([1])).backward()
        assert s.grad.isfinite().all()
        assert s.grad[0, 1] < 0

    def test_all_labels(self):
        assert create("soft_topk")(scores(), torch.ones(4, 7, dtype=torch.bool)) == 0
        with pytest.raises(LossplugError, match="below the 7 labels"):
            create("soft_topk", k=7)(scores(), mask())


class TestCCL:
    @pytest.mark.parametrize("weight", [None, 3.0])
    def test_by_hand(self, weight):
        s = scores().tanh()
        push = F.relu(s[:, 1:] - 0.2)
        push = push.sum(1) if weight is None else weight * push.mean(1)
        loss = create("ccl", margin=0.2, negative_weight=weight)
        torch.testing.assert_close(loss(s), (F.relu(1 - s[:, 0]) + push).mean(), **EXACT)

    def test_weight_of_the_number_of_negatives_is_none(self):
        s = scores().tanh()
        torch.testing.assert_close(create("ccl", negative_weight=6)(s), create("ccl")(s), **EXACT)

    def test_negatives_below_the_margin_have_no_gradient(self):
        s = torch.tensor([[0.5, 0.29, 0.31, -1.0]], requires_grad=True)
        create("ccl", margin=0.3, negative_weight=6.0)(s).backward()
        torch.testing.assert_close(s.grad, torch.tensor([[-1.0, 0.0, 2.0, 0.0]]))

    def test_sets_of_positives(self):
        s = torch.tensor([[0.5, 0.1, 0.7, -1.0]])
        value = create("ccl", margin=0.0)(s, [[0, 2]])
        torch.testing.assert_close(value, torch.tensor((0.5 + 0.3) / 2 + 0.1))
