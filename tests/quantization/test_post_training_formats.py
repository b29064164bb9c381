"""Searched float formats, the bit counter, channels given to others without data, blocks that share a search."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.quantization import fp_quant, quantize_post_training
from lightning_lossplug.quantization.post import (
    entropy_bits,
    entropy_proxy,
    exponent_bias,
    l2_bits,
    l2_decode,
    l2_encode,
    l2_round,
    largest_value,
    preshifted_bias,
    q_vlm_blocks,
    q_vlm_range,
    udfc_coefficients,
    udfc_prune,
    udfc_rescale,
)

DOUBLE = torch.float64


def random(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def linear(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8)).to(dtype).eval()


@pytest.mark.parametrize(("bits", "mantissa"), [(4, 1), (4, 0), (6, 2), (8, 3)])
def test_bias_and_largest_value_are_inverse(bits, mantissa):
    e = bits - 1 - mantissa
    top = random(7).abs() + 0.1
    bias = exponent_bias(top, e, mantissa)
    torch.testing.assert_close(largest_value(bias, e, mantissa), top)
    x = random(50) * 2
    # the step of the card: 2^(p - M - bias), p = max(floor(log2|x| + bias), 1)
    p = (x.abs().log2() + bias[0]).floor().clamp_min(1)
    step = torch.exp2(p - mantissa - bias[0])
    clipped = x.clamp(-top[0], top[0])
    p = (clipped.abs().log2() + bias[0] + 1e-9).floor().clamp_min(1)
    step = torch.exp2(p - mantissa - bias[0])
    torch.testing.assert_close(fp_quant(x, top[0], bits, mantissa), (clipped / step).round() * step)


def test_preshifted_biases_differ_by_whole_numbers():
    b = torch.tensor([3.3, 4.8, 12.1, 3.9], dtype=DOUBLE)
    shifted = preshifted_bias(b, 2)
    steps = shifted - b.min()
    torch.testing.assert_close(steps, torch.tensor([0.0, 2.0, 3.0, 1.0], dtype=DOUBLE))
    torch.testing.assert_close(preshifted_bias(torch.full((4,), 3.3, dtype=DOUBLE), 2), torch.full((4,), 3.3).double())


@pytest.mark.parametrize("bits_a", [None, 4])
def test_format_search_is_never_worse_than_the_largest_value(bits_a):
    x = [random(64, 32, seed=i, dtype=torch.float32) for i in range(3)]
    x[0][:, 5] *= 20
    options = {"weight": "fp_quant", "activation": "fp_quant", "first_last_bits": None, "include": ["0"]}
    found = quantize_post_training(linear(), x, "llm_fp4", 4, bits_a, **options).layers["0"]
    if bits_a is None:
        assert found.error < 0.9 * found.nearest_error
    else:
        assert found.error < found.nearest_error
    with pytest.raises(LossplugError, match="needs a minifloat, affine is none"):
        quantize_post_training(linear(), x, "llm_fp4", 4)
    with pytest.raises(LossplugError, match="gamma_range"):
        quantize_post_training(linear(), x, "llm_fp4", method_options={"gamma_range": (1.0, 0.5)})


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), e=st.floats(0.01, 0.5), s=st.floats(0.01, 0.5))
def test_l2_codes_go_there_and_back(seed, e, s):
    w = random(200, seed=seed)
    e, s = torch.tensor(e, dtype=DOUBLE), torch.tensor(s, dtype=DOUBLE)
    c = l2_encode(w, e, s)
    torch.testing.assert_close(l2_decode(c, e, s), w)
    rounded = l2_round(w, e, s)
    assert (rounded[w.abs() < e * 0.999] == 0).all()
    outside = w.abs() > e
    assert ((rounded - w)[outside].abs() <= s / 2 + 1e-12).all()
    torch.testing.assert_close(l2_encode(rounded, e, s)[rounded != 0], c.round()[rounded != 0])


def test_l2_counter_becomes_the_entropy():
    c = random(3000) * 4
    want = entropy_bits(c.round())
    coarse, fine = float(l2_bits(c, 64)), float(l2_bits(c, 20000))
    assert fine == pytest.approx(want, rel=1e-4)
    assert coarse == pytest.approx(want, rel=0.01)
    for kernel in ("lin", "tri"):
        assert float(l2_bits(c, 20000, kernel)) == pytest.approx(want, rel=1e-4)
    assert float(l2_bits(torch.zeros(50, dtype=DOUBLE))) == 0
    assert entropy_bits(torch.arange(8)) == 24
    big = torch.round(random(200_000) * 3)
    guess = float(l2_bits(big, 20000, generator=torch.Generator().manual_seed(0)))
    assert guess == pytest.approx(entropy_bits(big), rel=0.01)
    with pytest.raises(LossplugError, match="kernel is 'sin'"):
        l2_bits(c, 64, "sin")


def test_l2_gradients_shrink_the_file():
    w = random(2000)
    e, s = (torch.tensor(0.02, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    before = float(l2_bits(l2_encode(w, e, s)))
    for _ in range(20):
        bits = l2_bits(l2_encode(w, e, s))
        grads = torch.autograd.grad(bits, (e, s))
        assert all(math.isfinite(float(g)) for g in grads)
        with torch.no_grad():
            for leaf, grad in zip((e, s), grads, strict=True):
                leaf -= 0.002 * grad.sign()
    assert float(bits) < 0.9 * before
    assert e > 0.02
    assert s > 0.02


def reference_bits(c, resolution):
    """The O(n^2) counter written out, with straight-through codes."""
    q = c + (c.round() - c).detach()
    width = ((c.max() - c.min()) / resolution).detach()

    def below(t):
        u = ((t[:, None] - c[None]) / width).clamp(-1, 1)
        return (0.5 - 0.5 * ((u + 1) * math.pi / 2).cos()).sum(1)

    return -((below(q + 0.5) - below(q - 0.5)) / len(c)).log2().mean() * len(c)


def test_l2_counter_and_its_gradient_equal_the_written_out_one():
    c = (random(80) * 2).requires_grad_()
    a, b = l2_bits(c, 16), reference_bits(c, 16)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(v, c)[0] for v in (a, b)))


def pair():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3)]
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        model[1].running_mean.copy_(random(8))
        model[1].running_var.copy_(random(8).abs() + 0.5)
        model[1].bias.copy_(random(8, seed=1))
        for tensor in (model[0].weight, model[1].weight, model[1].bias, model[1].running_mean, model[1].running_var):
            tensor[6] = tensor[2]
    return model


def test_a_duplicate_channel_is_given_to_its_twin():
    model, x = pair(), random(2, 3, 8, 8)
    with torch.no_grad():
        before = model(x)
        s = udfc_prune(model[0], model[1], model[3], [6], alpha1=0.01, alpha2=1e-12)[6]
        torch.testing.assert_close(s, torch.eye(7, dtype=DOUBLE)[2], rtol=0, atol=1e-6)
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert (model[3].weight[:, 6] == 0).all()
    assert udfc_prune(model[0], model[1], model[3], []) == {}


def test_coefficients_are_least_squares():
    kept, lost = random(4, 9), random(9, seed=1)
    zero = torch.zeros(4, dtype=DOUBLE)
    s = udfc_coefficients(kept, zero, lost, zero[0], 0.0, 0.0)
    torch.testing.assert_close(s, torch.linalg.lstsq(kept.T, lost).solution)
    b, bj = random(4, seed=2), random(1, seed=3)[0]
    s = udfc_coefficients(kept, b, lost, bj, 0.3, 0.2).requires_grad_()
    loss = (lost - s @ kept).square().sum() + 0.3 * (bj - s @ b).square() + 0.2 * s.square().sum()
    assert torch.autograd.grad(loss, s)[0].abs().max() < 1e-10


def test_pruning_by_combination_beats_dropping():
    x, errors = random(4, 3, 8, 8), []
    for alpha2 in (1e9, 0.008):  # a huge ridge drops the channel
        model, before = pair(), pair()
        with torch.no_grad():
            udfc_prune(model[0], model[1], model[3], [6, 1], alpha2=alpha2)
            errors.append(float((model(x) - before(x)).norm()))
    assert errors[1] < errors[0]
    w = random(4, 9)
    q = (w * 2).round() / 2
    factor = udfc_rescale(w, q)
    assert ((w - factor[:, None] * q).norm(dim=1) <= (w - q).norm(dim=1) + 1e-12).all()
    with pytest.raises(LossplugError, match="has 8 channels"):
        udfc_prune(pair()[0], None, pair()[3], [8])
    with pytest.raises(LossplugError, match="reads 8 channels of 5"):
        udfc_prune(pair()[3], None, pair()[3], [0])


def test_blocks_share_a_search_where_dependency_is_low():
    assert q_vlm_blocks([1.0] * 5) == [[0], [1], [2], [3], [4]]
    assert q_vlm_blocks([5.0, 1.0, 1.0, 1.0, 1.0, 9.0]) == [[0, 1, 2], [3, 4], [5]]
    assert q_vlm_blocks([]) == []
    with pytest.raises(LossplugError, match="value 1 is nan"):
        q_vlm_blocks([1.0, math.nan])


def test_entropy_proxies():
    even = torch.ones(16, 3)
    assert float(entropy_proxy(even)) == pytest.approx(math.log(16), rel=1e-5)
    assert float(entropy_proxy(torch.eye(16))) == pytest.approx(0.0, abs=1e-5)


def test_searched_range_is_min_max_or_better():
    x = random(400)
    x[0] = 40.0
    lo, hi = x.min().reshape(1), x.max().reshape(1)
    least = q_vlm_range(x, lo, hi)[2]
    _, _, plain = q_vlm_range(x, lo, hi, n_scale=1)
    assert least < plain
    low, high, _ = q_vlm_range(x, lo, hi, n_scale=1)
    assert (low, high) == (lo, hi)
