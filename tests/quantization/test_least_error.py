"""Steps and ranges of least squared error: the search in C++, in PyTorch, and by trying everything."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.quantization import LSQ, LSQPlus, QATSettings, least_error
from lightning_lossplug.quantization.grid import EPS
from lightning_lossplug.quantization.least_error import FRACTIONS, mse_ends, mse_step, scale_of_range


def errors(x, step, dims, qn, qp):
    step = step.double().clamp_min(EPS)
    return (x.double() - (x.double() / step).clamp(qn, qp).round() * step).square().sum(dims, keepdim=True)


@pytest.mark.parametrize("native", [True, False])
@given(
    shape=st.sampled_from([(7, 5), (3, 4, 3, 3), (2, 9000), (1, 1), (6, 2, 8)]),
    per=st.sampled_from(["all", "first", "second", "last"]),
    bits=st.sampled_from([(-2, 1), (-4, 3), (-8, 7), (0, 15), (-7, 7), (0, 255)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_no_other_fraction_has_a_smaller_error(native, shape, per, bits, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.rand(shape, generator=g) ** 3
    x = x.abs() if bits[0] == 0 else x
    axes = list(range(len(shape)))
    dims = {"all": axes, "first": axes[1:], "second": [0, *axes[2:]], "last": axes[-1:]}[per]
    kept = least_error._library
    if not native:
        least_error._library = lambda: None
    try:
        found = mse_step(x, dims, *bits)
    finally:
        least_error._library = kept
    full = scale_of_range(x, dims, *bits)
    assert found.shape == full.shape == tuple(1 if d in dims else n for d, n in enumerate(shape))
    tried = torch.stack([errors(x, full * f, dims, *bits) for f in FRACTIONS])
    size = x.double().square().sum(dims, keepdim=True)
    assert (errors(x, found, dims, *bits) <= tried.amin(0) + 1e-6 * size).all()


def test_data_without_a_range():
    x = torch.stack([torch.zeros(5), torch.tensor([1.0, math.nan, 2, 3, 4]), torch.tensor([-7.0, 7, 0, 1, 2])])
    step = mse_step(x, [1], -7, 7).flatten()
    assert step[0] == 0
    assert step[1].isnan()
    assert step[2] == 1
    assert mse_step(torch.ones(0, 3), [1], -7, 7).shape == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_values_are_drawn_from(dtype, monkeypatch):
    # Columns differ in scale: values at equal distances would all be of a few of them.
    x = torch.randn(30, 8, 8, 64, generator=torch.Generator().manual_seed(0)).to(dtype) * torch.linspace(0.1, 4, 64)
    want = mse_step(x, [0, 1, 2, 3], -8, 7)
    monkeypatch.setattr(least_error, "DRAWN", 20_000)
    got = mse_step(x, [0, 1, 2, 3], -8, 7)
    assert got.shape == want.shape == (1, 1, 1, 1)
    assert torch.equal(got, mse_step(x, [0, 1, 2, 3], -8, 7))
    assert float(errors(x, got, [0, 1, 2, 3], -8, 7)) <= 1.01 * float(errors(x, want, [0, 1, 2, 3], -8, 7))
    assert mse_step(x, [1, 2, 3], -8, 7).shape == (30, 1, 1, 1)


def test_float64_and_half_precision():
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    want = mse_step(x, [1], -8, 7)
    assert mse_step(x.double(), [1], -8, 7).dtype == torch.float64
    assert torch.allclose(mse_step(x.double(), [1], -8, 7).float(), want, rtol=0.02)
    lo, hi = mse_ends(x.bfloat16(), 16)
    assert lo < 0 < hi


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["swish", "relu", "normal", "negative", "outlier"])
def test_ends_are_as_good_as_trying_all_of_them(bits, kind):
    x = torch.randn(3000, generator=torch.Generator().manual_seed(bits))
    x = {"swish": torch.nn.functional.silu(2 * x), "relu": x.relu(), "normal": x, "negative": -x.abs()}.get(kind, x)
    if kind == "outlier":
        x[0] = 60.0
    lo, hi = mse_ends(x, 2**bits)
    assert lo <= 0 <= hi

    def error(low, high):
        step = (high - low) / (2**bits - 1)
        return float((((x - low) / step).round().clamp(0, 2**bits - 1) * step + low - x).square().mean())

    fractions = [1 - 0.05 * i for i in range(20)]
    least, most = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    best = min(error(least * a, most * b) for a, b in itertools.product(fractions, fractions))
    assert error(float(lo), float(hi)) <= 1.02 * best


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_ends_of_one_value(value):
    lo, hi = mse_ends(torch.full((5,), value), 16)
    assert lo == min(value, 0)
    assert hi == max(value, 0)


@pytest.mark.parametrize("bits", [3, 4])
def test_lsq_plus_starts_nearer_than_the_range_does(bits):
    x = torch.nn.functional.silu(2 * torch.randn(64, 200, generator=torch.Generator().manual_seed(1)))
    found = {}
    for init in ("lsq_plus", "mse"):
        quantizer = LSQPlus(bits, role="activation", init=init).train()
        found[init] = float((quantizer(x).detach() - x).square().mean())
        weights = LSQPlus(bits, per_channel=True, init=init).train()
        found[init, "weights"] = float((weights(x.T).detach() - x.T).square().mean())
    assert found["mse"] < 0.95 * found["lsq_plus"]
    assert found["mse", "weights"] < found["lsq_plus", "weights"]


def test_up_to_four_bits_training_starts_there():
    for name, published in (("lsq", "auto"), ("lsq_plus", "lsq_plus")):
        settings = QATSettings(4, 4, weight=name, activation=name)
        for role in ("weight", "activation"):
            assert settings.build(4, role).init == "mse"
            assert settings.build(5, role).init == published
    chosen = QATSettings(4, 4, weight_options={"init": "lsq"})
    assert chosen.build(4, "weight").init == "lsq"
    assert chosen.build(4, "activation").init == "mse"
    assert LSQ(4).init == "auto"
