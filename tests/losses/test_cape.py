"""Identities of the card ``cape``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import create
from lightning_lossplug.losses.cape import bin_targets, kde_targets

N = 23


@pytest.fixture
def data():
    torch.manual_seed(0)
    return torch.rand(N, dtype=torch.float64), torch.randint(2, (N,))


def test_bins_at_their_limits(data):
    p, y = data
    torch.testing.assert_close(bin_targets(p, y, 1), torch.full_like(p, y.double().mean()))
    torch.testing.assert_close(bin_targets(p, y, N), y.double())
    torch.testing.assert_close(bin_targets(p, y, 5 * N), y.double())


def test_bins_are_the_means_of_equal_counts(data):
    p, y = data
    got = bin_targets(p, y, 4)
    order = p.argsort()
    for i in range(4):
        members = order[i * N // 4 : (i + 1) * N // 4]
        torch.testing.assert_close(got[members], torch.full_like(got[members], y[members].double().mean()))
    shuffle = torch.randperm(N)
    torch.testing.assert_close(bin_targets(p[shuffle], y[shuffle], 4), got[shuffle])


@pytest.mark.parametrize("chunk", [1, 65536])
def test_kde_against_its_definition(data, chunk):
    p, y = data
    order = p.argsort()
    expected = torch.empty(N, dtype=torch.float64)
    for rank, i in enumerate(order.tolist()):
        near = order[max(rank - 4, 0) : rank + 4]
        w = torch.exp(-((p[near] - p[i]) ** 2) / (2 * 0.1**2))
        expected[i] = (w * y[near]).sum() / w.sum()
    torch.testing.assert_close(kde_targets(p, y, 0.1, 4, chunk), expected)


def test_kde_with_a_wide_gaussian_is_the_window_mean(data):
    p, y = data
    torch.testing.assert_close(kde_targets(p, y, 1e6, N), torch.full_like(p, y.double().mean()))


def make(**options):
    return create("cape", dataset_size=N, k=2, n_bins=4, **options).double()


def test_epochs_alternate_between_probabilities_and_labels(data):
    p, y = data
    z = torch.randn(5, 2, dtype=torch.float64)
    index = torch.tensor([3, 22, 0, 7, 11])
    loss = make()
    loss.update(p, y)
    share = bin_targets(p, y, 4)[index]
    soft = F.cross_entropy(z, torch.stack([1 - share, share], dim=1))
    hard = F.cross_entropy(z, y[index])
    for epoch in range(7):
        assert loss.probability_epoch == (epoch % 3 == 0)
        torch.testing.assert_close(loss(z, y[index], index=index), soft if epoch % 3 == 0 else hard)
        torch.testing.assert_close(loss.eval()(z, y[index]), hard)
        loss.train().advance_epoch()
    other = make()
    other.load_state_dict(loss.state_dict())
    assert int(other.epoch) == 7
    assert other.targets.equal(loss.targets)


def test_negative_indices_and_ignored_rows(data):
    p, y = data
    z, target = torch.randn(4, 2, dtype=torch.float64), torch.tensor([1, 0, -100, 1])
    loss = make(mode="kde", window=3)
    loss.update(p, y)
    rows = loss(z, target, index=torch.tensor([-1, 2, 5, -1]), reduction="none")
    q = loss.targets[2]
    expected = F.cross_entropy(z, torch.tensor([1, 0, 0, 1]), reduction="none")
    torch.testing.assert_close(rows[[0, 3]], expected[[0, 3]])
    torch.testing.assert_close(rows[1], F.cross_entropy(z[1:2], torch.stack([1 - q, q])[None]))
    assert rows[2] == 0


def test_without_a_table_it_is_cross_entropy(data):
    z, y = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
    q = torch.rand(6, 2, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(create("cape")(z, y), F.cross_entropy(z, y))
    torch.testing.assert_close(create("cape")(z, q), F.cross_entropy(z, q))


def test_bad_calls(data):
    p, y = data
    z = torch.randn(2, 2, dtype=torch.float64)
    loss = make()
    with pytest.raises(LossplugError, match="update"):
        loss(z, y[:2], index=torch.tensor([0, 1]))
    loss.update(p, y)
    with pytest.raises(LossplugError, match="needs index"):
        loss(z, y[:2])
    with pytest.raises(LossplugError, match="index 23 is outside"):
        loss(z, y[:2], index=torch.tensor([0, 23]))
    with pytest.raises(LossplugError, match="3 classes"):
        loss(torch.randn(2, 3), y[:2], index=torch.tensor([0, 1]))
    for wrong in ((p[:3], y[:3]), (p, y[:3])):
        with pytest.raises(LossplugError, match="dataset_size 23"):
            loss.update(*wrong)
    with pytest.raises(LossplugError, match="dataset_size None"):
        create("cape").update(p, y)
