"""Circle, SupCon and threshold-consistent margin: closed forms, limits, reference sets, pair lists."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import create
from lightning_lossplug.losses.embeddings import Pairs, l2_normalize, masked_logsumexp

Y = torch.tensor([0, 0, 1, 1, 2, 0, 3])  # classes 2 and 3 have one sample: anchors without positives
SEEDS = given(seed=st.integers(0, 10_000))
FEW = settings(max_examples=15, deadline=None)


def sample(seed: int = 0, batch: int = 7, width: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, width, generator=generator, dtype=torch.float64)


def rotation(width: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(sample(seed, width, width))[0]


@pytest.mark.parametrize("name", ["circle", "supcon", "tcm"])
class TestEveryPairLoss:
    @FEW
    @SEEDS
    def test_rotation_scale_and_renamed_labels_change_nothing(self, name, seed):
        x = sample(seed)
        loss = create(name)
        value = loss(x, Y)
        torch.testing.assert_close(loss(x @ rotation(4, seed), Y), value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(loss(x * torch.rand(7, 1).double().add(0.1), Y), value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(loss(x, 40 - 3 * Y), value, rtol=1e-12, atol=1e-12)

    def test_gradient_is_orthogonal_to_every_joint_rotation(self, name):
        x = sample().requires_grad_()
        create(name)(x, Y).backward()
        # d/d(eps) of x (I + eps A), A skew: x^T grad must be symmetric
        product = x.detach().T @ x.grad
        torch.testing.assert_close(product, product.T, rtol=1e-9, atol=1e-9)

    def test_normalising_before_is_the_same(self, name):
        x = sample()
        inside = create(name)(x, Y)
        torch.testing.assert_close(create(name, normalize=False)(F.normalize(x), Y), inside, rtol=1e-12, atol=1e-12)

    def test_all_pairs_listed_is_all_pairs(self, name):
        x, same = sample(), Y[:, None] == Y
        anchor, positive = (same & ~torch.eye(7, dtype=torch.bool)).nonzero(as_tuple=True)
        other, negative = (~same).nonzero(as_tuple=True)
        loss = create(name)
        listed = loss(x, Y, indices_tuple=(anchor, positive, other, negative))
        torch.testing.assert_close(listed, loss(x, Y), rtol=1e-12, atol=1e-12)

    def test_triplets_are_their_pairs(self, name):
        anchor, positive, negative = torch.tensor([[0, 0, 2], [1, 5, 3], [2, 2, 4]])
        x, loss = sample(), create(name)
        pairs = loss(x, Y, indices_tuple=(anchor, positive, anchor, negative))
        torch.testing.assert_close(loss(x, Y, indices_tuple=(anchor, positive, negative)), pairs)

    def test_reference_set_excludes_nothing(self, name):
        x, loss = sample(), create(name)
        ref, labels = sample(1, 5), torch.tensor([0, 1, 2, 3, 0])
        value = loss(x, Y, ref, labels)
        index = torch.arange(12)
        same = torch.cat([Y, labels])[:, None] == torch.cat([Y, labels])
        cross = (index[:, None] < 7) & (index >= 7)
        anchor, positive = (same & cross).nonzero(as_tuple=True)
        other, negative = (~same & cross).nonzero(as_tuple=True)
        both = loss(torch.cat([x, ref]), torch.cat([Y, labels]), indices_tuple=(anchor, positive, other, negative))
        if name == "supcon":  # its mean counts the five reference rows, which are no anchors here
            both = both * 12 / 7
        torch.testing.assert_close(value, both, rtol=1e-12, atol=1e-12)

    def test_bad_references_and_indices(self, name):
        x, loss = sample(), create(name)
        index = torch.arange(2)
        for bad in (
            {"ref_x": x},
            {"ref_y": Y},
            {"ref_x": x[:, :2], "ref_y": Y},
            {"ref_x": x, "ref_y": Y[:3]},
            {"indices_tuple": (index, index)},
            {"indices_tuple": (index, index, index, index[:1])},
        ):
            with pytest.raises(LossplugError):
                loss(x, Y, **bad)


def circle_by_hand(x: torch.Tensor, margin: float, gamma: float) -> torch.Tensor:
    s = F.normalize(x) @ F.normalize(x).T
    rows = []
    for i in range(len(x)):
        same = Y[i] == Y
        push = [gamma * max(s[i, j] + margin, 0) * (s[i, j] - margin) for j in range(len(x)) if not same[j]]
        pull = [
            -gamma * max(1 + margin - s[i, j], 0) * (s[i, j] - 1 + margin) for j in range(len(x)) if same[j] and j != i
        ]
        if push and pull:
            rows.append(math.log1p(sum(map(math.exp, push)) * sum(map(math.exp, pull))))
    return torch.tensor(rows, dtype=torch.float64).mean()


class TestCircle:
    @pytest.mark.parametrize(("margin", "gamma"), [(0.4, 8.0), (0.25, 2.0)])
    def test_by_hand(self, margin, gamma):
        x = sample(3)
        value = create("circle", margin=margin, gamma=gamma)(x, Y)
        torch.testing.assert_close(value, circle_by_hand(x, margin, gamma), rtol=1e-12, atol=1e-12)

    def test_gradient_of_a_negative_similarity(self):
        # sigmoid(u) softmax_n g a_n with a_n held constant
        margin, gamma = 0.4, 4.0
        s = torch.tensor([[1.0, 0.3, -0.1, 0.2]], dtype=torch.float64, requires_grad=True)
        loss = create("circle", margin=margin, gamma=gamma)
        positive = torch.tensor([[False, True, False, False]])
        negative = torch.tensor([[False, False, True, True]])
        loss.pair_loss(Pairs(s, positive, negative, s)).backward()
        v = s.detach()[0]
        push = gamma * F.relu(v[2:] + margin) * (v[2:] - margin)
        pull = -gamma * F.relu(1 + margin - v[1]) * (v[1] - 1 + margin)
        weight = torch.sigmoid(push.logsumexp(0) + pull) * gamma
        expected = torch.cat(
            [torch.zeros(1), -weight[None] * (1 + margin - v[1]), weight * push.softmax(0) * (v[2:] + margin)]
        )
        torch.testing.assert_close(s.grad[0], expected.double(), rtol=1e-12, atol=1e-12)

    def test_one_pair_each_is_hinge_like_for_large_gamma(self):
        x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, -0.8]], dtype=torch.float64)
        y, margin = torch.tensor([0, 0, 1]), 0.25
        index = torch.tensor([0])
        pairs = (index, index + 1, index, index + 2)
        exponent = -(1.25 - 0.8) * (0.8 - 0.75) + (0.6 + 0.25) * (0.6 - 0.25)
        for gamma in (1e3, 1e5):
            value = create("circle", margin=margin, gamma=gamma)(x, y, indices_tuple=pairs) / gamma
            assert abs(value - max(exponent, 0)) < 1 / gamma

    def test_no_precision_is_lost_at_large_exponents(self):
        # exponent 256 (1 + m)^2 in float32, and a softplus of a very small number in float64
        x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
        create("circle", margin=0.9, gamma=256)(x, torch.tensor([0, 0, 1])).backward()
        assert x.grad.isfinite().all()
        far = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
        tiny = create("circle", margin=0.4, gamma=160)(far, torch.tensor([0, 0, 1]))
        torch.testing.assert_close(
            tiny, torch.tensor(math.exp(-160 * 0.4 * 0.4), dtype=torch.float64), rtol=1e-9, atol=0
        )

    def test_anchors_without_either_set_are_left_out(self):
        x = sample()
        rows = create("circle", reduction="none")(x, Y)
        assert (rows[[4, 6]] == 0).all()
        torch.testing.assert_close(create("circle")(x, Y), rows.sum() / 5)
        assert create("circle")(x, torch.zeros(7, dtype=torch.long)) == 0
        assert create("circle")(x, torch.arange(7)) == 0


class TestSupCon:
    @pytest.mark.parametrize("skip_empty", [False, True])
    def test_by_hand(self, skip_empty):
        x, t, tb = sample(2), 0.3, 0.2
        s = F.normalize(x) @ F.normalize(x).T / t
        rows = []
        for i in range(7):
            others = [j for j in range(7) if j != i]
            positives = [j for j in others if Y[j] == Y[i]]
            lse = torch.stack([s[i, j] for j in others]).logsumexp(0)
            if positives:
                rows.append(-t / tb * sum(s[i, j] - lse for j in positives) / len(positives))
            elif not skip_empty:
                rows.append(torch.zeros((), dtype=torch.float64))
        loss = create("supcon", temperature=t, base_temperature=tb, skip_empty=skip_empty)
        torch.testing.assert_close(loss(x, Y), torch.stack(rows).mean(), rtol=1e-12, atol=1e-12)

    def test_distinct_labels_with_two_views_are_nt_xent(self):
        a, b = sample(0), sample(1)
        views = torch.stack([a, b], dim=1)
        expected = create("nt_xent", scale=1 / 0.07)(a, b)
        for labels in (None, torch.arange(7)):
            torch.testing.assert_close(create("supcon")(views, labels), expected, rtol=1e-12, atol=1e-12)
        halved = create("supcon", base_temperature=0.14)(views)
        torch.testing.assert_close(halved, expected / 2, rtol=1e-12, atol=1e-12)

    def test_contrast_mode_one_takes_the_first_views(self):
        views = torch.stack([sample(0), sample(1), sample(2)], dim=1)
        rows = create("supcon", reduction="none")(views, Y)
        first = create("supcon", reduction="none", contrast_mode="one")(views, Y)
        assert rows.shape == (21,)
        torch.testing.assert_close(first, rows[::3])

    def test_views_are_rows_with_repeated_labels(self):
        views = torch.stack([sample(0), sample(1)], dim=1)
        flat = create("supcon")(views.flatten(0, 1), Y.repeat_interleave(2))
        torch.testing.assert_close(create("supcon")(views, Y), flat, rtol=0, atol=0)

    def test_labels_of_the_wrong_number(self):
        with pytest.raises(LossplugError):
            create("supcon")(sample()[:, None, None], Y)
        with pytest.raises(LossplugError):
            create("supcon")(torch.stack([sample(), sample()], dim=1), Y[:3])


class TestTCM:
    def test_by_hand(self):
        x = sample(4)
        s = F.normalize(x) @ F.normalize(x).T
        same = Y[:, None] == Y
        pull = [0.6 - v for v in s[same & ~torch.eye(7, dtype=torch.bool)] if v <= 0.6]
        push = [v + 0.1 for v in s[~same] if v >= -0.1]
        expected = 2 * sum(pull) / len(pull) + 3 * sum(push) / len(push)
        loss = create("tcm", margin_pos=0.6, margin_neg=-0.1, lambda_pos=2.0, lambda_neg=3.0)
        torch.testing.assert_close(loss(x, Y), expected, rtol=1e-12, atol=1e-12)

    def test_no_violator_is_exactly_zero_with_zero_gradient(self):
        x = torch.tensor([[1.0, 0.0], [0.99, 0.1], [-1.0, 0.0], [-0.99, 0.1]], dtype=torch.float64, requires_grad=True)
        value = create("tcm")(x, torch.tensor([0, 0, 1, 1]))
        value.backward()
        assert value == 0
        assert (x.grad == 0).all()

    @FEW
    @SEEDS
    def test_bounded(self, seed):
        value = create("tcm", lambda_pos=2.0, lambda_neg=0.5)(sample(seed), Y)
        assert 0 <= value <= 2 * 1.9 + 0.5 * 0.5

    def test_bound_is_reached(self):
        x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
        index = torch.tensor([0])
        value = create("tcm")(x, torch.tensor([0, 0, 1]), indices_tuple=(index, index + 1, index + 2))
        torch.testing.assert_close(value, torch.tensor(1.9 + 0.5).double())

    def test_only_violators_are_counted(self):
        x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        # positives 0-1 (similarity 0) and 2-3 (0); negatives 0-3 and 1-2 (1), the others are below the margin
        value = create("tcm")(x, torch.tensor([0, 0, 1, 1]))
        torch.testing.assert_close(value, torch.tensor(0.9 + 0.5).double())


@FEW
@given(seed=st.integers(0, 10_000), exponent=st.integers(-200, 200))
def test_l2_normalize_at_any_magnitude(seed, exponent):
    x = sample(seed) * 10.0**exponent
    unit = l2_normalize(x)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(7).double(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(unit, l2_normalize(sample(seed)), rtol=1e-13, atol=1e-13)


def test_l2_normalize_of_zero_is_zero_with_a_finite_gradient():
    x = torch.zeros(1, 3, requires_grad=True)
    l2_normalize(x).sum().backward()
    assert (x.grad == 1).all()
    y = sample().requires_grad_()
    assert torch.autograd.gradcheck(l2_normalize, (y,))
    assert torch.autograd.gradgradcheck(l2_normalize, (y,))


def test_masked_logsumexp_of_nothing_has_no_nan():
    x = sample().requires_grad_()
    mask = torch.zeros(7, 4, dtype=torch.bool)
    mask[0, 1:3] = True
    value = masked_logsumexp(x, mask)
    torch.testing.assert_close(value[0], x[0, 1:3].logsumexp(0))
    value[0].backward()
    assert x.grad.isfinite().all()
    assert (x.grad[1:] == 0).all()
