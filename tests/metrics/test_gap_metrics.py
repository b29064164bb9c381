"""Reliability and CapacityGap against their definitions, in parts and at once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.metrics import CapacityGap, Reliability
from lightning_lossplug.registry import registry

C = 5


def batch(n=200, seed=0, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(n, C, generator=g) for _ in range(2))
    return student, teacher, torch.randint(C, (n,), generator=g)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), bins=st.integers(1, 20), scale=st.sampled_from([0.1, 1.0, 5.0]))
def test_the_error_is_that_of_torchmetrics_and_adds_up(seed, bins, scale):
    z, _, y = batch(seed=seed, scale=scale)
    whole, parts = Reliability(bins), Reliability(bins)
    whole.update(z, y)
    for rows in torch.randperm(200, generator=torch.Generator().manual_seed(seed)).split(64):
        parts.update(z[rows], y[rows])
    torch.testing.assert_close(whole.compute(), parts.compute())
    want = multiclass_calibration_error(z.softmax(1), y, num_classes=C, n_bins=bins)
    torch.testing.assert_close(whole.compute(), want, atol=1e-5, rtol=1e-4)
    curve = whole.curve()
    gaps = (curve["accuracy"] - curve["confidence"]).abs()[curve["count"] > 0]
    torch.testing.assert_close(whole.worst(), gaps.max().float())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_limits_of_the_error():
    y = torch.tensor([0, 1, 2, 0])
    sure = torch.full((4, 3), -100.0).scatter(1, y[:, None], 100.0)
    right, one_bin = Reliability(), Reliability(bins=1)
    right.update(sure, y)
    assert right.compute() == 0
    assert right.curve()["count"].tolist() == [0.0] * 14 + [4.0]  # closed on the right
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    one_bin.update(z, y)
    accuracy, confidence = (z.argmax(1) == y).float().mean(), z.softmax(1).max(1).values.mean()
    torch.testing.assert_close(one_bin.compute(), (accuracy - confidence).abs())
    constant = Reliability()
    constant.update(torch.tensor([[math.log(7.0), 0.0]]).expand(10, 2), torch.tensor([0] * 6 + [1] * 4))
    torch.testing.assert_close(constant.compute(), torch.tensor(7 / 8 - 0.6))
    masked = Reliability()
    masked.update(sure[None], torch.tensor([[0, 1, -100, -100]]))
    assert masked.curve()["count"].sum() == 2
    assert Reliability().compute().isnan()
    assert Reliability().worst().isnan()


def test_the_gap_is_its_definition():
    z_s, z_t, y = batch()
    metric = CapacityGap(bins=7, classes=C)
    for part in zip(z_s.split(64), z_t.split(64), y.split(64), strict=True):
        metric.update(*part)
    found = metric.compute()
    right_s, right_t = z_s.argmax(1) == y, z_t.argmax(1) == y
    log_s, log_t = z_s.double().log_softmax(1), z_t.double().log_softmax(1)
    want = {
        "agreement": (z_s.argmax(1) == z_t.argmax(1)).float().mean(),
        "kl": (log_t.exp() * (log_t - log_s)).sum(1).mean(),
        "reverse_kl": (log_s.exp() * (log_s - log_t)).sum(1).mean(),
        "student_accuracy": right_s.float().mean(),
        "teacher_accuracy": right_t.float().mean(),
        "gap": right_t.float().mean() - right_s.float().mean(),
        "lost": (right_t & ~right_s).float().mean(),
        "won": (right_s & ~right_t).float().mean(),
        "student_ece": multiclass_calibration_error(z_s.softmax(1), y, num_classes=C, n_bins=7),
        "teacher_ece": multiclass_calibration_error(z_t.softmax(1), y, num_classes=C, n_bins=7),
        "student_nll": -log_s.gather(1, y[:, None]).mean(),
        "teacher_nll": -log_t.gather(1, y[:, None]).mean(),
    }
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value.float(), atol=1e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close(found["gap"], found["lost"] - found["won"])
    table = metric.per_class()
    for c in range(C):
        assert table["count"][c] == (y == c).sum()
        assert table["student"][c] == pytest.approx(right_s[y == c].float().mean().item())
        assert table["teacher"][c] == pytest.approx(right_t[y == c].float().mean().item())
    bins = metric.per_confidence()
    torch.testing.assert_close(bins["count"], metric.curve("teacher")["count"])
    torch.testing.assert_close(bins["teacher"], metric.curve("teacher")["accuracy"], equal_nan=True)
    assert (bins["count"] * bins["student"]).nansum() == pytest.approx(right_s.sum().item())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_masks_and_labels_that_are_missing():
    z_s, z_t, y = batch(24)
    y[::3] = -100
    mask = torch.arange(24) % 2 == 0
    kept, cut = CapacityGap(), CapacityGap()
    kept.update(z_s.view(4, 6, C), z_t.view(4, 6, C), y.view(4, 6), mask.view(4, 6))
    rows = mask & (y != -100)
    cut.update(z_s[rows], z_t[rows], y[rows])
    torch.testing.assert_close(kept.compute(), cut.compute())
    unlabelled = CapacityGap()
    unlabelled.update(z_s, z_t)
    assert set(unlabelled.compute()) == {"agreement", "kl", "reverse_kl"}
    empty = CapacityGap()
    empty.update(z_s, z_t, torch.full_like(y, -100))
    assert empty.compute()["agreement"].isnan()
    padded = CapacityGap()  # a vocabulary padded with impossible tokens
    blocked = [torch.cat([z, torch.full((24, 1), -torch.inf)], 1) for z in (z_s, z_t)]
    padded.update(*blocked, y)
    cut.reset()
    cut.update(z_s, z_t, y)
    torch.testing.assert_close(padded.compute(), cut.compute())


def test_a_teacher_of_itself_has_no_gap():
    z, _, y = batch()
    metric = CapacityGap(classes=C)
    metric.update(z, z.clone(), y)
    found = metric.compute()
    assert found["agreement"] == 1
    assert found["kl"] == found["reverse_kl"] == found["gap"] == found["lost"] == found["won"] == 0


def test_mistakes_and_names():
    z, _, y = batch(4)
    assert isinstance(registry.create("metric", "CapacityGap", bins=3), CapacityGap)
    assert isinstance(registry.create("metric", "Reliability"), Reliability)
    with pytest.raises(LossplugError, match=r"got \(4, 5\), \(4, 4\)"):
        CapacityGap().update(z, z[:, :4])
    with pytest.raises(LossplugError, match=r"got \(4, 5\), \(4, 5\), \(3,\)"):
        CapacityGap().update(z, z, y[:3])
    with pytest.raises(LossplugError, match="5 classes, expected 3"):
        CapacityGap(classes=3).update(z, z, y)
    with pytest.raises(LossplugError, match="counts no classes"):
        CapacityGap().per_class()
    with pytest.raises(LossplugError, match="bins is 0"):
        CapacityGap(bins=0)
    with pytest.raises(LossplugError, match="bins is 0"):
        Reliability(bins=0)
    with pytest.raises(LossplugError, match=r"logits \(4, 5\) and targets \(2,\)"):
        Reliability().update(z, y[:2])
