"""Identities of the cards ``bias_loss`` and ``correctness_aware``."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import SampleTemperature, create

C = 5


@pytest.fixture
def batch():
    torch.manual_seed(0)
    z = 2 * torch.randn(8, C, dtype=torch.float64, requires_grad=True)
    features = torch.linspace(0.5, 3, 8, dtype=torch.float64)[:, None, None] * torch.randn(8, 3, 4, dtype=torch.float64)
    return z, torch.randint(C, (8,)), features


def test_bias_loss_without_bias_is_cross_entropy(batch):
    z, y, features = batch
    torch.testing.assert_close(create("bias_loss", alpha=0.0, beta=0.0)(z, y, features=features), F.cross_entropy(z, y))


def test_bias_loss_definition_and_bounds(batch):
    z, y, features = batch
    v = features.flatten(1).var(1)
    r = (0.7 * (v - v.min()) / (v.max() - v.min())).exp() - 0.2
    assert r.min() == 1 - 0.2
    torch.testing.assert_close(r.max(), torch.tensor(math.exp(0.7) - 0.2, dtype=torch.float64))
    features = features.requires_grad_()
    loss = create("bias_loss", alpha=0.7, beta=0.2)(z, y, features=features)
    torch.testing.assert_close(loss, (r * F.cross_entropy(z, y, reduction="none")).mean())
    loss.backward()
    assert features.grad is None


def weights(loss, z, y, features):
    rows = loss(z, y, features=features, reduction="none")
    return (rows / F.cross_entropy(z, y, reduction="none")).detach()


def test_global_range_runs_over_training(batch):
    z, y, features = batch
    loss = create("bias_loss", alpha=1.0, beta=0.0, normalisation="global").double()
    fresh = weights(loss.eval(), z, y, features)  # a check before training: the batch's own range
    torch.testing.assert_close(fresh, weights(create("bias_loss", alpha=1.0, beta=0.0), z, y, features))
    assert loss.minimum == math.inf
    loss.train()
    weights(loss, z, y, features)
    low, high = loss.minimum.clone(), loss.maximum.clone()
    v = (0.5 * features).flatten(1).var(1)
    narrow = weights(loss, z, y, 0.5 * features)
    torch.testing.assert_close(loss.minimum, torch.minimum(low, v.min()))
    assert loss.maximum == high
    torch.testing.assert_close(narrow, ((v - loss.minimum) / (high - loss.minimum)).exp())
    state = loss.state_dict()
    loss.eval()
    weights(loss, z, y, 9 * features)
    assert loss.maximum == high
    other = create("bias_loss", normalisation="global").double()
    other.load_state_dict(state)
    assert other.maximum == high


def test_legacy_divides_by_the_batch_range(batch):
    z, y, features = batch
    loss = create("bias_loss", alpha=1.0, beta=0.0, normalisation="global", legacy=True).double()
    loss(z, y, features=features)
    v = (2 + 0.01 * features).flatten(1).var(1)
    got = weights(loss, z, y, 2 + 0.01 * features)
    torch.testing.assert_close(got, ((v - v.min()) / (v.max() - v.min())).exp())
    wide = features[3:] * 2
    v = wide.flatten(1).var(1)
    got = weights(loss, z[3:], y[3:], wide)
    torch.testing.assert_close(got, ((v - loss.minimum) / (v.max() - v.min())).exp())


def test_equal_variances_and_bad_features(batch):
    z, y, features = batch
    same = features[:1].expand(8, 3, 4)
    torch.testing.assert_close(
        create("bias_loss")(z, y, features=same), (1 - 0.3) * F.cross_entropy(z, y), rtol=1e-6, atol=0
    )
    loss = create("bias_loss")
    with pytest.raises(LossplugError, match="needs features"):
        loss(z, y)
    for bad in (features[:7], torch.zeros(8, 1), torch.zeros(())):
        with pytest.raises(LossplugError, match="don't fit"):
            loss(z, y, features=bad)
    half = loss(z.detach().half(), y, features=(1e4 * features).half())
    assert half.isfinite()


def reference(z, base, y, balance):
    correct = (base.argmax(1) == y).double()
    rows = (z.softmax(1).max(1).values - correct) ** 2
    if not balance:
        return rows.mean()
    accuracy = correct.mean()
    weight = correct * (1 - accuracy) + (1 - correct) * accuracy
    return (weight * rows).sum() / weight.sum()


def test_correctness_aware_is_the_weighted_squared_distance(batch):
    z, y, _ = batch
    base = 2 * torch.randn(8, C, dtype=torch.float64)
    y[:3] = base[:3].argmax(1)
    for balance in (True, False):
        loss = create("correctness_aware", balance=balance)
        torch.testing.assert_close(loss(z, y, base_logits=base), reference(z, base, y, balance))
        torch.testing.assert_close(loss(z, y), reference(z, z, y, balance))
        # A temperature keeps the order of the classes, so nobody has to pass the frozen logits.
        torch.testing.assert_close(loss(base / 1.7, y), loss(base / 1.7, y, base_logits=base))
    image = z.view(2, 4, C).movedim(-1, 1)
    frozen = base.view(2, 4, C).movedim(-1, 1)
    loss = create("correctness_aware")
    torch.testing.assert_close(loss(image, y.view(2, 4), base_logits=frozen), loss(z, y, base_logits=base))


def test_all_right_or_all_wrong_batches_are_unweighted(batch):
    z, _, _ = batch
    for y in (z.argmax(1), z.argmin(1)):
        torch.testing.assert_close(create("correctness_aware")(z, y), reference(z, z, y, balance=False))


def test_correctness_aware_bad_base(batch):
    z, y, _ = batch
    with pytest.raises(LossplugError, match="base_logits"):
        create("correctness_aware")(z, y, base_logits=z[:4])


def test_best_constant_temperature_is_that_of_the_brier_score_of_correctness():
    torch.manual_seed(0)
    z = 6 * torch.randn(400, C, dtype=torch.float64)
    y = torch.where(torch.rand(400) < 0.7, z.argmax(1), torch.randint(C, (400,)))
    grid = torch.linspace(0.5, 20, 100, dtype=torch.float64)
    loss = create("correctness_aware", balance=False)
    ours = grid[torch.stack([loss(z / t, y) for t in grid]).argmin()]
    right = (z.argmax(1) == y).double()
    brier = torch.stack([(right - (z / t).softmax(1).amax(1)).square().mean() for t in grid])
    assert ours == grid[brier.argmin()]


def test_sample_temperature_starts_at_one_keeps_the_order_and_learns():
    torch.manual_seed(0)
    z = 5 * torch.randn(200, C)
    y = torch.where(torch.rand(200) < 0.6, z.argmax(1), torch.randint(C, (200,)))
    calibrator = SampleTemperature(top_k=3, views=2)
    torch.testing.assert_close(calibrator(z, z.flip(0)), z)
    loss = create("correctness_aware")
    start = loss(calibrator(z, z), y).item()
    optimizer = torch.optim.Adam(calibrator.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss(calibrator(z, z), y, base_logits=z).backward()
        optimizer.step()
    assert loss(calibrator(z, z), y).item() < 0.9 * start
    assert calibrator(z, z).argmax(1).equal(z.argmax(1))
    with pytest.raises(LossplugError, match="1 views"):
        calibrator(z)
    with pytest.raises(LossplugError, match="width"):
        SampleTemperature(width=0)
