"""Few-shot losses: prototype triplet and nearest-neighbour score."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import create

Y = torch.arange(15) % 3
SEEDS = given(seed=st.integers(0, 10_000))
FEW = settings(max_examples=15, deadline=None)


def episode(seed: int = 0, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """15 queries and 9 supports of three classes around three centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.eye(3, 4, dtype=torch.float64)
    noise = spread * torch.randn(24, 4, generator=generator, dtype=torch.float64)
    labels = torch.cat([Y, torch.arange(9) % 3])
    x = centres[labels] + noise
    return x[:15], Y, x[15:], labels[15:]


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ((a - b).square().sum() + 1e-6).sqrt()


@pytest.mark.parametrize("name", ["proto_triplet", "icnn"])
class TestEveryEpisodeLoss:
    @FEW
    @SEEDS
    def test_rotation_translation_and_order_change_nothing(self, name, seed):
        x, y, s, sy = episode(seed)
        turn = torch.linalg.qr(episode(seed + 1)[0][:4])[0]
        loss = create(name)
        value = loss(x, y, s, sy)
        torch.testing.assert_close(loss(x @ turn + 3, y, s @ turn + 3, sy), value, rtol=1e-9, atol=1e-9)
        q, t = torch.randperm(15), torch.randperm(9)
        torch.testing.assert_close(loss(x[q], y[q], s[t], sy[t]), value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(loss(x, y + 5, s, sy + 5), value, rtol=1e-12, atol=1e-12)

    def test_gradient_with_a_support(self, name):
        x, y, s, sy = episode(2)
        loss = create(name)
        assert torch.autograd.gradcheck(
            lambda a, b: loss(a, y, b, sy), (x.requires_grad_(), s.requires_grad_()), fast_mode=True
        )

    def test_refusals(self, name):
        x, y, s, sy = episode()
        for bad in ((s, None), (None, sy), (s[:, :2], sy), (s, sy[:3]), (s, sy.double())):
            with pytest.raises(LossplugError):
                create(name)(x, y, *bad)


class TestProtoTriplet:
    def test_by_hand(self):
        x, y, s, sy = episode(3, spread=3.0)
        prototypes = torch.stack([s[sy == k].mean(0) for k in range(3)])
        rows = []
        for query, label in zip(x, y, strict=True):
            d = [distance(query, prototypes[k]) for k in range(3)]
            own = d.pop(int(label))
            rows.append(max(own - min(d) + 0.5, torch.zeros(()).double()))
        expected = torch.stack(rows)
        loss = create("proto_triplet", reduction="none")
        torch.testing.assert_close(loss(x, y, s, sy), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(create("proto_triplet")(x, y, s, sy), expected.mean(), rtol=1e-12, atol=1e-12)
        # prototypes can be passed themselves
        torch.testing.assert_close(loss(x, y, prototypes, torch.arange(3)), expected, rtol=1e-12, atol=1e-12)

    def test_zero_where_every_query_is_near_its_prototype(self):
        x, y, s, sy = episode(spread=0.1)
        x.requires_grad_()
        value = create("proto_triplet")(x, y, s, sy)
        value.backward()
        assert value == 0
        assert (x.grad == 0).all()

    def test_classes_missing_from_the_support(self):
        x, y, s, sy = episode(3, spread=3.0)
        kept = sy != 2
        rows = create("proto_triplet", reduction="none")(x, y, s[kept], sy[kept])
        assert (rows[y == 2] == 0).all()
        torch.testing.assert_close(create("proto_triplet")(x, y, s[kept], sy[kept]), rows.sum() / 10)
        one = sy == 0
        assert create("proto_triplet")(x, y, s[one], sy[one]) == 0
        assert create("proto_triplet")(x, y, s[:0], sy[:0]) == 0


def icnn_by_hand(x, y, s, sy, k, ipc, drop):
    """The score in loops, without the 1e-7 of its denominators."""
    intra, inter, agreement, far = [], [], [], []
    neighbours = []
    for query in x:
        d = torch.stack([distance(query, target) for target in s])
        order = d.argsort()[drop : drop + ipc]
        neighbours.append((d[order], sy[order]))
    for (d, labels), label in zip(neighbours, y, strict=True):
        far += [v for v, other in zip(d[:k], labels[:k], strict=True) if other != label]
    top = max(far, default=1.0)
    for (d, labels), label in zip(neighbours, y, strict=True):
        same = labels == label
        nearest = min(d[~same], default=math.inf)
        ratio = d[:k] / nearest
        ratio = ratio / max(1, ratio.max())
        agreement.append(same[:k].double().mean())
        if same[:k].any():
            intra.append(ratio[same[:k]].mean())
        if (~same[:k]).any():
            inter.append((d[:k][~same[:k]] / top).mean())
    lambda_s = 1 - sum(intra) / len(intra) if intra else 1
    lambda_d = sum(inter) / len(inter) if inter else 1
    gamma = sum(agreement) / len(agreement) if k + 2 < len(s) else 1
    return ((lambda_s + lambda_d) / 2 + gamma) / 2


class TestICNN:
    @pytest.mark.parametrize("spread", [0.1, 1.5, 4.0])
    @pytest.mark.parametrize(("k", "ipc"), [(4, None), (2, 5), (4, 4)])
    def test_by_hand(self, spread, k, ipc):
        x, y, s, sy = episode(1, spread)
        loss = create("icnn", k=k, ipc=ipc)
        wide = k + 1 if ipc is None else ipc
        for args, drop in (((x, y, s, sy), 1), ((x, y, x, y), 1)):
            torch.testing.assert_close(loss(*args), -icnn_by_hand(*args, k, wide, drop).log(), rtol=1e-6, atol=1e-6)
        kept = create("icnn", k=k, ipc=ipc, drop_self=False)
        expected = -icnn_by_hand(x, y, s, sy, k, wide, 0).log()
        torch.testing.assert_close(kept(x, y, s, sy), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(kept(x, y), loss(x, y))  # the query itself is always left out

    def test_far_compact_clusters_have_score_one(self):
        x, y, *_ = episode(spread=1e-3)
        assert 0 <= create("icnn")(x * 100, y) < 2e-3
        assert create("icnn")(x, torch.zeros(15, dtype=torch.long)).abs() < 1e-5

    @FEW
    @given(seed=st.integers(0, 10_000), spread=st.floats(0.01, 10))
    def test_score_lies_in_0_1(self, seed, spread):
        value = create("icnn")(*episode(seed, spread))
        assert value > -1e-6
        assert value.isfinite()

    def test_k_shrinks_to_the_targets_and_ipc_does_not(self):
        x, y, s, sy = episode(1, 2.0)
        few, labels = s[:5], sy[:5]
        value = create("icnn", k=9)(x, y, few, labels)
        torch.testing.assert_close(value, -icnn_by_hand(x, y, few, labels, 3, 4, 1).log(), rtol=1e-6, atol=1e-6)
        assert create("icnn")(x, y, s[:2], sy[:2]) == 0
        with pytest.raises(LossplugError, match="only 5 targets"):
            create("icnn", k=3, ipc=5)(x, y, few, labels)
