"""Counting zeros: functions and metrics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.metrics import ActivationSparsity, NMCompliance, Sparsity, compliant_groups, stored_bytes, zeros
from lightning_lossplug.registry import registry


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), m=st.sampled_from([2, 4, 8]), axis=st.sampled_from([0, 1, -1]))
def test_compliance_counts_group_by_group(seed, m, axis):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 24, generator=generator) * (torch.rand(16, 24, generator=generator) < 0.5)
    n = max(1, m // 2)
    rows = weight.movedim(axis, -1)
    expected = sum(int((row[i : i + m] != 0).sum()) <= n for row in rows for i in range(0, len(row), m))
    assert compliant_groups(weight, n, m, axis) == (expected, weight.numel() // m)
    assert zeros(weight) == int((weight == 0).sum())


def test_metrics_add_up_over_weights():
    a, b = torch.tensor([[1.0, 0.0, 2.0, 0.0]]), torch.ones(2, 4)
    sparsity, compliance = Sparsity(), NMCompliance(n=2, m=4)
    for weight in (a, b):
        sparsity.update(weight)
        compliance.update(weight)
    assert float(sparsity.compute()) == pytest.approx(2 / 12)
    assert float(compliance.compute()) == pytest.approx(1 / 3)


def test_they_are_registered():
    assert isinstance(registry.create("metric", "Sparsity"), Sparsity)
    assert registry.create("metric", "NMCompliance", n=1, m=8).m == 8


def test_bad_patterns():
    with pytest.raises(LossplugError, match="does not divide"):
        compliant_groups(torch.ones(2, 6), 2, 4)
    with pytest.raises(LossplugError, match="1 <= N <= M"):
        compliant_groups(torch.ones(2, 4), 5, 4)


def test_stored_bytes():
    weight = torch.zeros(32, 16)
    weight[:, 0] = 1.0  # 1:16
    assert stored_bytes(torch.ones(8, 8)) == 256  # positions would only add
    assert stored_bytes(weight) == 32 * 4 + 512 // 8  # a bit per entry
    assert stored_bytes(weight, 16) == 32 * 4 + 32 * 4 // 8  # four bits per nonzero


def test_activation_sparsity_counts_small_entries_of_valid_tokens():
    h = torch.tensor([[[0.0, 0.5], [0.0, 0.0]], [[-0.05, 2.0], [0.0, 1.0]]])
    metric = ActivationSparsity()
    metric.update(h)
    assert float(metric.compute()) == pytest.approx(4 / 8)
    loose = registry.create("metric", "ActivationSparsity", threshold=0.1)
    loose.update(h, torch.tensor([[1, 0], [1, 1]]))
    assert float(loose.compute()) == pytest.approx(3 / 6)
    with pytest.raises(LossplugError, match="threshold is -1"):
        ActivationSparsity(-1)
