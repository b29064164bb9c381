"""Signals of mask health against their definitions, and the rule for masks that won't settle."""

import math

import pytest
import torch
from torch import nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import NMSettings, NMTechnique
from lightning_lossplug.sparsity.health import Settling, mean_health, nm_health
from lightning_lossplug.sparsity.health_plot import draw_health


def prepared(recipe="nm_srste", steps=1, optimizer=torch.optim.Adam, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    technique = NMTechnique(NMSettings(n=2, m=4, recipe=recipe, include=["0", "2"], **options))
    technique.attach(model)
    technique.advance(Progress(0, 10))
    used = optimizer(model.parameters(), 0.05)
    for step in range(steps):
        model.zero_grad()
        model(torch.randn(32, 16)).square().mean().backward()
        if step < steps - 1:
            used.step()
            technique.advance(Progress(step + 1, 10))
    return model, technique, used


def test_every_signal_is_its_definition():
    _, technique, optimizer = prepared(steps=4)
    rows = {row.layer: row for row in nm_health(technique, optimizer)}
    for name, layer in technique.layers.items():
        row, mask, weight, grad = rows[name], layer.transform.mask, layer.weight.detach(), layer.weight.grad
        assert (row.pattern, row.sparsity) == ("2:4", 0.5)
        assert row.kept_mass == pytest.approx(float((weight.abs() * mask).sum() / weight.abs().sum()))
        assert 0.5 < row.kept_mass < 1
        assert row.pruned_grad_energy == pytest.approx(float(grad[~mask].square().sum() / grad.square().sum()))
        assert row.flip_rate == layer.flip_rate
        state = optimizer.state[layer.weight]
        m, v = state["exp_avg"][~mask] / (1 - 0.9**3), state["exp_avg_sq"][~mask] / (1 - 0.999**3)
        assert row.pruned_grad_noise == pytest.approx(float(1 - m.square().sum() / v.sum()), rel=1e-4)
    means = mean_health(list(rows.values()))
    assert means["kept_mass"] == pytest.approx(sum(row.kept_mass for row in rows.values()) / 2)


def test_a_steady_gradient_has_no_noise_and_an_alternating_one_has():
    _, technique, _ = prepared(steps=0)
    weight = technique.layers["0"].weight
    for signs, low, high in (([1.0] * 40, -1e-5, 1e-5), ([1.0, -1.0] * 20, 0.9, 1.0)):
        optimizer = torch.optim.Adam([weight], lr=0.0)
        for sign in signs:
            weight.grad = torch.full_like(weight, sign)
            optimizer.step()
        (row,) = nm_health(technique, optimizer)  # the other layer isn't the optimizer's
        assert low <= row.pruned_grad_noise <= high


def test_what_cannot_be_measured_is_none():
    _, technique, _ = prepared(steps=0, recipe="mdgf_linear")
    (first, _) = nm_health(technique)
    assert (first.pattern, first.sparsity, first.kept_mass) == ("2:4", 0.0, pytest.approx(first.kept_mass))
    assert first.pruned_grad_energy is first.pruned_grad_noise is first.flip_rate is None
    _, technique, sgd = prepared(steps=2, optimizer=torch.optim.SGD)
    assert nm_health(technique, sgd)[0].pruned_grad_noise is None
    _, technique, _ = prepared(steps=0, recipe="mdgf_linear", dense_fraction=0.5)
    (dense, _) = nm_health(technique)
    assert (dense.pattern, dense.sparsity, dense.kept_mass) == ("dense", 0.0, 1.0)


def test_a_frozen_mask_keeps_all_of_the_mass():
    _, technique, optimizer = prepared(recipe="nm_oneshot", steps=3)
    for layer in technique.layers.values():
        layer.weight.data.mul_(layer.transform.mask)
    assert all(row.kept_mass == 1.0 and row.flip_rate in (None, 0.0) for row in nm_health(technique, optimizer))


@pytest.mark.parametrize(
    ("flips", "settles"),
    [
        ([0.5 * 0.8**i for i in range(12)], True),
        ([0.02 * i for i in range(12)], False),
        ([0.1] * 12, False),
        ([0.0005] * 12, True),  # below the tolerance
        ([0.1] * 9, True),  # too few to say
        ([0.1, 0.3] * 6, False),
    ],
)
def test_settling(flips, settles):
    watch = Settling(window=10)
    found = [watch.update(flip, "2:4") for flip in flips]
    assert (found[-1] is None) == settles
    assert all(value is None for value in found[:9])


def test_another_pattern_starts_again():
    watch = Settling(window=4)
    assert all(watch.update(0.1, "3:4") is None for _ in range(3))
    assert all(watch.update(0.1, "2:4") is None for _ in range(3))
    assert watch.update(0.1, "2:4") == (pytest.approx(0.1), pytest.approx(0.1))
    for wrong in (3, 5, 2):
        with pytest.raises(LossplugError, match="even number, 4 or more"):
            Settling(window=wrong)
    with pytest.raises(LossplugError, match="tolerance is 1"):
        Settling(tolerance=1)


def test_picture(tmp_path):
    signals = {"sparsity": 0.5, "kept_mass": 0.8, "pruned_grad_energy": None, "pruned_grad_noise": math.nan}
    rows = [{"step": s, "layer": f"l{i}", "flip_rate": 0.1 / s, **signals} for s in (1, 2, 3) for i in range(30)]
    draw_health(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(LossplugError, match="no record to draw"):
        draw_health([], tmp_path / "b.png")
