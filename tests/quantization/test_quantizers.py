"""Every quantiser: values and gradients against closed forms in float64, identities, codes, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug import LossplugError, quantization, registry
from lightning_lossplug.quantization import (
    affine_parameters,
    binarydm,
    biper,
    create,
    dorefa,
    dorefa_activation,
    ewgs,
    fake_quant,
    lsq,
    lsq_plus,
    minmax_range,
    mse_range,
    pact,
    paretoq,
    percentile_range,
    reste,
    self_compress,
    tbt,
)

# Every registered quantiser with arguments for a weight, and whether it has integer codes.
WEIGHTS = {
    "fake_quant": ({"bits": 4, "per_channel": True}, True),
    "affine": ({"bits": 4, "per_channel": True, "symmetric": False}, True),
    "lsq": ({"bits": 3, "per_channel": True}, True),
    "lsq_plus": ({"bits": 4}, True),
    "dorefa": ({"bits": 3}, True),
    "ewgs": ({"bits": 3}, False),
    "paretoq": ({"bits": 1.58}, True),
    "reste": ({}, True),
    "biper": ({"stage": 2}, True),
    "tbt": ({"weight_bits": 2}, True),
    "binarydm": ({}, False),
    "bivit": ({}, True),
    "denseshift": ({"bits": 3}, True),
    "self_compress": ({"bits": 4}, True),
    "fp_quant": ({"bits": 8}, False),
    "mx": ({"elem": "fp4_e2m1"}, False),
    "nvfp4": ({}, False),
}
ACTIVATIONS = {
    "fake_quant": ({"bits": 8}, True),
    "lsq": ({"bits": 4}, True),
    "lsq_plus": ({"bits": 4}, True),
    "pact": ({"bits": 4, "alpha_init": None}, True),
    "dorefa": ({"bits": 4}, True),
    "ewgs": ({"bits": 4}, False),
    "reste": ({}, True),
    "bivit": ({}, True),
    "fp_quant": ({"bits": 8}, False),
    "mx": ({}, False),
    "nvfp4": ({}, False),
    "dynamic": ({"bits": 8}, True),
}


def weight(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 0.3


def gradients(function, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    g = weight(*y.shape, dtype=y.dtype, seed=7)
    return y.detach(), g, torch.autograd.grad(y, leaves, g)


def test_the_tables_are_complete():
    entries = [e for e in registry if e.kind == "quantizer"]
    assert {e.name for e in entries if "weight" in e.facts["roles"]} == set(WEIGHTS)
    assert {e.name for e in entries if "activation" in e.facts["roles"]} == set(ACTIVATIONS)


@pytest.mark.parametrize(("role", "name"), [("weight", n) for n in WEIGHTS] + [("activation", n) for n in ACTIVATIONS])
def test_common_behaviour(role, name):
    options, has_codes = (WEIGHTS if role == "weight" else ACTIVATIONS)[name]
    quantizer = create(name, role=role, **options)
    x = weight(6, 4, 16).requires_grad_()
    if role == "activation" and name != "dynamic":
        quantizer.eval()
        assert quantizer(x) is x  # nothing is set by a validation batch
        quantizer.train()
    y = quantizer(x)
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert quantizer(x.to(torch.bfloat16)).dtype == torch.bfloat16
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    for parameter in quantizer.parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all()
    quantizer.eval()
    y = quantizer(x).detach()
    if has_codes:
        codes = quantizer.quantize(x)
        assert codes.codes.dtype == torch.int32
        assert torch.equal(quantizer.dequantize(codes), y)
    twin = create(name, role=role, **options)
    twin.load_state_dict(quantizer.state_dict())
    twin.eval()
    if hasattr(quantizer, "power"):
        twin.advance(0.0)
    assert torch.equal(twin(x), y)
    quantizer.bfloat16()
    assert all(p.dtype == torch.float32 for p in quantizer.parameters())


def lsq_reference(x, s, qn, qp, g, factor):
    v = x / s
    inside = (v >= qn) & (v <= qp)
    value = s * v.clamp(qn, qp).round()
    slope = torch.where(inside, v.round() - v, torch.where(v < qn, qn, qp).to(v))
    return value, g * inside, (g * slope * factor).sum_to_size(s.shape)


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(2, 8), signed=st.booleans(), narrow=st.booleans(), seed=st.integers(0, 99), rows=st.booleans())
def test_lsq_equals_its_closed_form(bits, signed, narrow, seed, rows):
    x = weight(5, 7, dtype=torch.float64, seed=seed)
    s = torch.full((5, 1) if rows else (1,), 0.11, dtype=torch.float64)
    y, g, (dx, ds) = gradients(lambda a, b: lsq(a, b, bits, signed, narrow), x, s)
    qn, qp = quantization.integer_range(bits, signed, narrow)
    value, rx, rs = lsq_reference(x, s, qn, qp, g, 1 / math.sqrt(35 * qp))
    torch.testing.assert_close(y, value, rtol=0, atol=1e-15)
    torch.testing.assert_close(dx, rx, rtol=0, atol=0)
    torch.testing.assert_close(ds, rs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shape", [(1,), (6, 1, 1, 1), (1, 4, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("signed", [True, False])
def test_float32_gradients_are_those_of_float64(shape, layout, signed):
    x = weight(6, 4, 3, 5).contiguous(memory_format=layout)
    s = 0.05 + 0.1 * torch.rand(shape, generator=torch.Generator().manual_seed(1))
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 0, 0  # an end of the unsigned range, where the gradient passes
    _, g, (dx, ds) = gradients(lambda a, b: lsq(a, b, 3, signed), x, s)
    leaves = [t.double().requires_grad_() for t in (x, s)]
    wide = torch.autograd.grad(lsq(*leaves, 3, signed), leaves, g.double())
    assert torch.equal(dx, wide[0].float())
    torch.testing.assert_close(ds, wide[1].float(), rtol=1e-4, atol=1e-6)


def test_lsq_identities():
    x = weight(64, dtype=torch.float64)
    s = torch.tensor([0.05], dtype=torch.float64)
    torch.testing.assert_close(lsq(3 * x, 3 * s), 3 * lsq(x, s), rtol=0, atol=1e-14)
    grid = torch.arange(-8, 8, dtype=torch.float64) * s
    _, _, (dx, ds) = gradients(lsq, grid, s)
    assert dx.abs().min() > 0
    assert ds.abs().max() < 1e-12
    # beyond the range the derivative by s is exact, so a finite difference sees it
    far = torch.tensor([9.0, -9.0, 30.0], dtype=torch.float64)
    g, h = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64), 1e-6
    s.requires_grad_()
    (ds,) = torch.autograd.grad((lsq(far, s, grad_scale="none") * g).sum(), s)
    with torch.no_grad():
        difference = ((lsq(far, s + h) - lsq(far, s - h)) * g).sum() / (2 * h)
    torch.testing.assert_close(ds.sum(), difference, rtol=1e-6, atol=1e-8)


def test_lsq_gradient_between_the_edge_and_half_a_step_beyond_it():
    # PyTorch's fused learnable op differs exactly here
    _, g, (dx, ds) = gradients(
        lambda a, b: lsq(a, b, 4, grad_scale="none"), torch.tensor([7.3, -8.2]), torch.tensor([1.0])
    )
    assert dx.abs().max() == 0
    torch.testing.assert_close(ds, (7 * g[0] - 8 * g[1]).reshape(1))


def test_lsq_initialisation_and_sign():
    x = weight(8, 16)
    assert create("lsq", bits=4).initialize(x).s.item() == pytest.approx(2 * float(x.abs().mean()) / math.sqrt(7))
    rows = create("lsq", bits=4, per_channel=True).initialize(x)
    torch.testing.assert_close(rows.s[:, 0], 2 * x.abs().mean(1) / math.sqrt(7))
    groups = create("lsq", bits=4, group_size=4).initialize(x)
    torch.testing.assert_close(groups.s[..., 0], 2 * x.reshape(8, 4, 4).abs().mean(2) / math.sqrt(7))
    torch.testing.assert_close(groups(x)[:, :4], lsq(x[:, :4].contiguous(), groups.s[:, 0], 4), rtol=0, atol=0)
    columns = create("lsq", bits=4, per_channel=True, axis=1).initialize(x)
    torch.testing.assert_close(columns(x), create("lsq", bits=4, per_channel=True).initialize(x.T)(x.T.contiguous()).T)
    assert create("lsq", role="activation").train().initialize(x.relu()).bounds == (0, 15)
    assert create("lsq", role="activation").train().initialize(x).bounds == (-8, 7)
    assert (
        create("lsq", init="mse").initialize(x)(x).sub(x).square().mean()
        <= create("lsq", init="minmax").initialize(x)(x).sub(x).square().mean()
    )
    log = create("lsq", bits=4, scale_param="log").initialize(x)
    torch.testing.assert_close(log(x), create("lsq", bits=4).initialize(x)(x))
    dead = x.clone()
    dead[3] = 0
    assert (create("lsq", per_channel=True).initialize(dead).s > 0.01).all()


def test_activation_scales_are_the_mean_of_the_first_batches_and_then_learned():
    quantizer = create("lsq", bits=4, role="activation", init_batches=2)
    one, two = weight(8, 4), 3 * weight(8, 4, seed=1)
    quantizer(one)
    with quantization.paused(quantizer):
        quantizer(100 * one)
    quantizer.eval()(100 * one)
    quantizer.train()(two)
    expected = sum(2 * float(t.abs().mean()) / math.sqrt(7) for t in (one, two)) / 2
    assert quantizer.s.item() == pytest.approx(expected)
    quantizer(100 * one)
    assert quantizer.s.item() == pytest.approx(expected)


def test_lsq_plus():
    x = weight(50, dtype=torch.float64)
    s, beta = torch.tensor([0.07], dtype=torch.float64), torch.tensor([-0.25], dtype=torch.float64)
    zero = torch.zeros_like(beta)
    torch.testing.assert_close(lsq_plus(x, s, zero, signed=True), lsq(x, s))
    torch.testing.assert_close(lsq_plus(x + 5, s, beta + 5), lsq_plus(x, s, beta) + 5)
    y, g, (dx, ds, db) = gradients(lambda a, b, c: lsq_plus(a, b, c, grad_scale="none"), x, s, beta)
    v = (x - beta) / s
    inside = (v >= 0) & (v <= 15)
    torch.testing.assert_close(y, s * v.clamp(0, 15).round() + beta)
    torch.testing.assert_close(dx, g * inside)
    torch.testing.assert_close(db.sum(), (g * ~inside).sum())
    slope = torch.where(inside, v.round() - v, v.clamp(0, 15))
    torch.testing.assert_close(ds.sum(), (g * slope).sum())
    whole = create("lsq_plus", bits=4, role="activation")
    swish = torch.nn.functional.silu(4 * weight(100))
    whole(swish)
    assert whole(torch.zeros(3)).abs().max() == 0  # padding is exact
    assert whole.quantize(swish).codes.min() >= 0


def test_pact_dorefa_ewgs():
    x = weight(40, dtype=torch.float64) * 4
    alpha = torch.tensor([0.6], dtype=torch.float64)
    y, g, (dx, da) = gradients(pact, x, alpha)
    torch.testing.assert_close(y, (x.clamp(0, 0.6) * 15 / 0.6).round() * 0.6 / 15)
    torch.testing.assert_close(y, lsq(x, alpha / 15, signed=False), rtol=0, atol=1e-14)
    torch.testing.assert_close(dx, g * ((x >= 0) & (x <= 0.6)))
    torch.testing.assert_close(da.sum(), (g * (x >= 0.6)).sum())
    quantizer = create("pact", alpha_decay=0.5)
    quantizer(x.float()).sum().backward()
    before = quantizer.alpha.grad.clone()
    quantizer.add_gradients()
    torch.testing.assert_close(quantizer.alpha.grad - before, quantizer.alpha.detach())

    y, g, (dw,) = gradients(lambda w: dorefa(w, 3), x)
    t = x.tanh()
    m = t.abs().max()
    torch.testing.assert_close(y, m * (2 * ((t / (2 * m) + 0.5) * 7).round() / 7 - 1))
    torch.testing.assert_close(dw, g * (1 - t**2))
    assert y.unique().numel() <= 8
    assert y.abs().min() > 0
    torch.testing.assert_close(y.unique(), -y.unique().flip(0))
    torch.testing.assert_close(gradients(lambda w: dorefa(w, 3, keep_scale=False), x)[2][0], g * (1 - t**2) / m)
    assert torch.equal(dorefa(x, 32), x)
    y, g, (dw,) = gradients(lambda w: dorefa(w, 1), x)
    torch.testing.assert_close(y, x.abs().mean() * x.sign())
    torch.testing.assert_close(dw, g)
    y, g, (dx,) = gradients(lambda a: dorefa_activation(a, 2), x)
    torch.testing.assert_close(y, (x.clamp(0, 1) * 3).round() / 3)
    torch.testing.assert_close(dx, g * ((x >= 0) & (x <= 1)))

    unit = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, g, (dx,) = gradients(lambda a: ewgs(a, 4, 0.3), unit)
    torch.testing.assert_close(y, (unit * 3).round() / 3)
    torch.testing.assert_close(dx, g * (1 + 0.3 * g.sign() * (unit - y)))
    torch.testing.assert_close(gradients(lambda a: ewgs(a, 4, 0.0), unit)[2][0], g)
    with pytest.warns(UserWarning, match="can flip"):
        ewgs(unit, 4, 6.0)


@pytest.mark.parametrize("bits", [1, 1.58, 2])
def test_paretoq_levels_and_gradients(bits):
    w, alpha = weight(4, 30, dtype=torch.float64), torch.full((4, 1), 0.4, dtype=torch.float64)
    y, g, (dw, da) = gradients(lambda a, b: paretoq(a, b, bits), w, alpha)
    levels = {1: [-1, 1], 1.58: [-2 / 3, 0, 2 / 3], 2: [-0.75, -0.25, 0.25, 0.75]}[bits]
    torch.testing.assert_close((y / 0.4).unique(), torch.tensor(levels, dtype=torch.float64))
    v, factor = w / alpha, 1 / math.sqrt(120)
    if bits == 1:
        torch.testing.assert_close(dw, g * (v.abs() <= 1))
        torch.testing.assert_close(da, (g * w.sign()).sum(1, keepdim=True) * factor)
        return
    span, shift = (1.5, 0) if bits == 1.58 else (2, 0.5)
    top, q = (span - shift) / span, y / alpha
    slope = torch.where(v > 0.99, top, torch.where(v < -0.99, -top, q - v))
    torch.testing.assert_close(dw, g * (v.abs() <= 0.99))
    torch.testing.assert_close(da, (g * slope).sum(1, keepdim=True) * factor)
    assert paretoq(torch.zeros(1), torch.ones(1), 2).item() == 0.25


@pytest.mark.parametrize("bits", [3, 4])
def test_paretoq_is_lsq_from_three_bits_on(bits):
    w, alpha = weight(4, 30, dtype=torch.float64), torch.full((4, 1), 0.1, dtype=torch.float64)
    for a, b in zip(
        gradients(lambda a, b: paretoq(a, b, bits), w, alpha)[2],
        gradients(lambda a, b: lsq(a, b, bits), w, alpha)[2],
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_binary_methods():
    x = torch.linspace(-2, 2, 401, dtype=torch.float64)
    y, g, (dx,) = gradients(lambda a: reste(a, 3.0), x)
    assert set(y.unique().tolist()) == {-1.0, 1.0}
    a = x.abs()
    h = torch.where(a <= 0.1, 0.1 ** (1 / 3) / 0.1, a.clamp_min(1e-9) ** (-2 / 3) / 3) * (a <= 1.5)
    torch.testing.assert_close(dx, g * h)
    torch.testing.assert_close(gradients(lambda a: reste(a, 1.0), x)[2][0], g * (a <= 1.5))
    quantizer = create("reste")
    quantizer.advance(1.0)
    assert quantizer.power == pytest.approx(3)

    w = weight(3, 20, dtype=torch.float64)
    for stage in (1, 2):
        y, g, (dw,) = gradients(lambda a, stage=stage: biper(a, 20, stage), w)
        torch.testing.assert_close(y, (20 * w).sin() if stage == 1 else (20 * w).sin().sign())
        torch.testing.assert_close(dw, g * 20 * (20 * w).cos())

    y, g, (dw,) = gradients(lambda a: tbt(a, 2), w)
    s = 4 / 3 * w.abs().mean(1, keepdim=True)
    torch.testing.assert_close(y, torch.where(w.abs() > s / 2, w.sign() * s, 0.0))
    assert torch.equal(dw, g)
    torch.testing.assert_close(tbt(w, 1), w.sign() * w.abs().mean(1, keepdim=True))
    torch.testing.assert_close(tbt(5 * w, 2), 5 * tbt(w, 2))

    a1, a2 = torch.full((3, 1), 0.2, dtype=torch.float64), torch.full((3, 1), 0.1, dtype=torch.float64)
    y, g, (dw, d1, d2) = gradients(binarydm, w, a1, a2)
    r = w - a1 * w.sign()
    through = g * a2 * (r.abs() <= 1)
    torch.testing.assert_close(y, a1 * w.sign() + a2 * r.sign())
    torch.testing.assert_close(d2, (g * r.sign()).sum(1, keepdim=True))
    torch.testing.assert_close(d1, ((g - through) * w.sign()).sum(1, keepdim=True))
    torch.testing.assert_close(dw, (g - through) * a1 * (w.abs() <= 1) + through)
    errors = [create("binarydm", order=o).initialize(w.float())(w.float()).sub(w).square().mean() for o in (1, 2)]
    assert errors[1] <= errors[0]


def test_self_compress():
    w = weight(4, 30, dtype=torch.float64)
    e, b = torch.full((4, 1), -4.0, dtype=torch.float64), torch.tensor([[3.0], [2.5], [8.0], [0.0]]).double()
    y, g, (dw, de, db) = gradients(self_compress, w, e, b)
    half, ln2 = 2 ** (b - 1), math.log(2)
    v = w / 2**e
    inside = (v >= -half) & (v <= half - 1)
    torch.testing.assert_close(y, 2**e * torch.maximum(torch.minimum(v, half - 1), -half).round())
    assert y[3].abs().max() == 0
    torch.testing.assert_close(dw[:3], (g * inside)[:3])
    torch.testing.assert_close(de[:3], (ln2 * g * (y - w * inside)).sum(1, keepdim=True)[:3])
    end = torch.where(v > half - 1, 1.0, torch.where(v < -half, -1.0, 0.0))
    torch.testing.assert_close(db[:3], (g * end * ln2 * half * 2**e).sum(1, keepdim=True)[:3])
    torch.testing.assert_close(self_compress(w, e * 0 - 20, e * 0 + 32), w, rtol=0, atol=2**-20)
    quantizer = create("self_compress", gamma=0.3)
    quantizer(w.float()).sum().backward()
    before = quantizer.b.grad.clone()
    quantizer.add_gradients()
    torch.testing.assert_close(quantizer.b.grad - before, torch.full((4, 1), 0.3 / 4))


@settings(max_examples=20, deadline=None)
@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 99), shift=st.floats(-1, 1))
def test_fake_quant_identities(bits, symmetric, seed, shift):
    x = weight(4, 33, dtype=torch.float64, seed=seed) + shift
    s, z, low, high = affine_parameters(*minmax_range(x), bits, symmetric)
    y = fake_quant(x, s, z, low, high)
    torch.testing.assert_close(fake_quant(y, s, z, low, high), y)
    assert fake_quant(torch.zeros(1, dtype=torch.float64), s, z, low, high).abs().max() == 0
    assert (x - y).abs().max() <= s.max() * (1 if not symmetric else 0.5) * (1 + 1e-9)
    if symmetric:
        torch.testing.assert_close(fake_quant(-x, s, z, low, high), -y)
    by_mse = fake_quant(x, *affine_parameters(*mse_range(x, bits, symmetric), bits, symmetric))
    assert (x - by_mse).abs().pow(2.4).mean() <= (x - y).abs().pow(2.4).mean() * (1 + 1e-12)
    rows = affine_parameters(*minmax_range(x, [1]), bits, symmetric)
    one = affine_parameters(*minmax_range(x[2]), bits, symmetric)
    torch.testing.assert_close(fake_quant(x, *rows)[2], fake_quant(x[2], *one))


def test_observers():
    x = torch.arange(1001.0)
    assert percentile_range(x, 1.0) == (0, 1000)
    assert percentile_range(x, 0.99) == (10, 990)
    quantizer = create("fake_quant", observer="ema", ema=0.5, role="activation", freeze_after=2)
    for top in (1.0, 3.0, 100.0):
        quantizer(torch.tensor([-top, top]))
    assert quantizer.hi.item() == pytest.approx(2.0)
    quantizer = create("fake_quant", role="activation")
    for top in (1.0, 3.0, 2.0):
        quantizer(torch.tensor([-1.0, top]))
    assert (quantizer.lo.item(), quantizer.hi.item()) == (-1, 3)
    zero = create("fake_quant", bits=4)(torch.zeros(5))
    assert torch.equal(zero, torch.zeros(5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create("lsq", bits=9), "bits is 9, allowed is 2 to 8"),
        (lambda: create("lsq", bits=1), "paretoq"),
        (lambda: create("paretoq", bits=5), "allowed is 1, 1.58, 2, 3 or 4"),
        (lambda: create("lsq", bit=4), "no parameter 'bit'.*Did you mean 'bits'"),
        (lambda: create("lsqq"), "unknown quantizer 'lsqq'.*'lsq'"),
        (lambda: lsq(torch.zeros(1), torch.ones(1), 1), "no positive level"),
        (lambda: create("lsq", role="activation", per_channel=True), "one scale per tensor"),
        (lambda: create("lsq", group_size=5)(torch.zeros(2, 8)), "group_size 5 does not divide the 8 weights"),
        (lambda: create("fake_quant", percentile=0.5), "percentile is 0.5"),
        (lambda: create("fake_quant", per_channel=True)(torch.zeros(())), "without axes"),
        (lambda: create("lsq", role="activation")(torch.tensor([1.0, float("nan")])), "1 of 2 entries.*activation"),
        (lambda: create("fake_quant", role="activation").quantize(torch.zeros(2)), "no training batch"),
        (lambda: create("lsq")(torch.tensor([float("inf"), 1.0])), "1 of 2 entries of the weight"),
        (lambda: reste(torch.zeros(1), 0.5), "o is 0.5"),
        (lambda: ewgs(torch.zeros(1), 4, -1.0), "delta is -1.0"),
        (lambda: create("mx", elem="fp5"), "elem is 'fp5'"),
        (lambda: create("fp_quant", bits=8, mantissa=7), "mantissa is 7"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(LossplugError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_step_that_left_the_positive_numbers_is_refused():
    quantizer = create("lsq", per_channel=True).initialize(weight(4, 8))
    quantizer.s.data[1] = -0.1
    assert quantizer(weight(4, 8)).isfinite().all()
    with pytest.raises(LossplugError, match="1 of 4 values of s are zero, negative"):
        quantizer.quantize(weight(4, 8))
