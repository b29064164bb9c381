"""Bits per layer by integer programming, and AdaQuant's quantiser."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.quantization import allocate_bits, quantize_post_training
from lightning_lossplug.quantization.post import adaquant, bit_alloc_ip, measure_degradation

DOUBLE = torch.float64


def table(seed, layers, bits):
    generator = torch.Generator().manual_seed(seed)
    loss = torch.rand(layers, len(bits), generator=generator).sort(1, descending=True).values
    rows = {f"l{i}": {b: float(loss[i, j]) for j, b in enumerate(bits)} for i in range(layers)}
    sizes = {f"l{i}": int(n) for i, n in enumerate(torch.randint(1, 50, (layers,), generator=generator))}
    return rows, sizes


def brute_force(rows, sizes, target):
    budget = target * 32 * sum(sizes.values())
    best = float("inf")
    for choice in itertools.product(*(row for row in rows.values())):
        if sum(sizes[name] * b for name, b in zip(rows, choice, strict=True)) <= budget * (1 + 1e-9):
            best = min(best, sum(rows[name][b] for name, b in zip(rows, choice, strict=True)))
    return best


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), layers=st.integers(1, 6), target=st.floats(0.0625, 0.26))
def test_allocation_equals_brute_force_and_keeps_the_budget(seed, layers, target):
    rows, sizes = table(seed, layers, (2, 4, 8))
    found = bit_alloc_ip(rows, sizes, target)
    assert list(found) == list(rows)
    size = sum(sizes[name] * b for name, b in found.items())
    assert size <= target * 32 * sum(sizes.values()) * (1 + 1e-6)
    assert sum(rows[name][b] for name, b in found.items()) == pytest.approx(brute_force(rows, sizes, target), abs=1e-9)


def test_allocation_at_its_ends():
    rows, sizes = table(0, 5, (2, 4, 8))
    assert set(bit_alloc_ip(rows, sizes, 8 / 32).values()) == {8}
    assert set(bit_alloc_ip(rows, sizes, 2 / 32).values()) == {2}
    values = [
        sum(rows[name][b] for name, b in bit_alloc_ip(rows, sizes, target).items())
        for target in (0.0625, 0.1, 0.15, 0.2, 0.25)
    ]
    assert values == sorted(values, reverse=True)
    with pytest.raises(LossplugError, match=r"the fewest bits everywhere take 0\.0625"):
        bit_alloc_ip(rows, sizes, 0.05)
    with pytest.raises(LossplugError, match="target is 2"):
        bit_alloc_ip(rows, sizes, 2)
    with pytest.raises(LossplugError, match="NaN or infinite"):
        bit_alloc_ip({"a": {4: float("nan")}}, {"a": 3}, 0.5)


def trained():
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), [(x, y)]


def test_measured_and_allocated_on_a_trained_network():
    model, batches = trained()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def loss(net, batch):
        return F.cross_entropy(net(batch[0]), batch[1])

    first = lambda net, batch: net(batch[0])  # noqa: E731
    degradation, sizes = measure_degradation(model, batches, loss, (2, 4, 8), forward=first, include=["0", "2", "4"])
    assert sizes == {"0": 64 * 48, "2": 48 * 32, "4": 320}
    assert all(row[2] > row[8] >= 1e-6 for row in degradation.values())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    include = allocate_bits(model, batches, loss, 4.5 / 32, (2, 4, 8), forward=first, include=["0", "2", "4"])
    assert set(include) == {"0", "2", "4"}
    bits = {name: int(text[1:]) for name, text in include.items()}
    assert sum(sizes[name] * b for name, b in bits.items()) <= 4.5 * sum(sizes.values())
    quantize_post_training(model, batches, "gptq", include=include, forward=first)
    assert float(loss(model, batches[0])) < 0.5


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), bits=st.integers(2, 8))
def test_adaquant_grid(seed, bits):
    x = torch.randn(6, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    r, o = (x.max() - x.min()).reshape(1), x.min().reshape(1)
    y = adaquant(x, r, o, bits)
    s = r / (2**bits - 1)
    torch.testing.assert_close(y / s, (y / s).round(), rtol=0, atol=1e-8)
    assert ((y - x).abs() <= s + 1e-12).all()  # rounding, and the zero-point's own
    torch.testing.assert_close(adaquant(y, r, o, bits), y, rtol=0, atol=1e-12)


def test_adaquant_gradients_reach_range_and_offset():
    x = torch.tensor([-0.9, -0.2, 0.31, 2.5], dtype=DOUBLE, requires_grad=True)
    r = torch.tensor([2.0], dtype=DOUBLE, requires_grad=True)
    o = torch.tensor([-1.0], dtype=DOUBLE, requires_grad=True)
    adaquant(x, r, o, 3).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0, 0.0]
    # beyond the top the value is s (2^b - 1 - z) = R (1 - z/7) with z = -O/s: its slopes are 1 and 1
    top = [
        torch.autograd.grad(adaquant(torch.full((1,), 2.5, dtype=DOUBLE), r, o, 3).sum(), leaf)[0].item()
        for leaf in (r, o)
    ]
    z = 4.0  # round(3.5) to even
    assert top[0] == pytest.approx((7 - z) / 7 + 3.5 / 7)
    assert top[1] == pytest.approx(1.0)
