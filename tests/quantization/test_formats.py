"""Floating grids: against PyTorch's float8 types, the tables of the standards, and written-out grids."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.quantization import ELEMENTS, fp_quant, mx, nvfp4, round_element


def values(n=2000, spread=6.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g) * torch.exp2(spread * torch.randn(n, generator=g))


@pytest.mark.parametrize(("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_float8_equals_the_types_of_torch(name, dtype):
    top = ELEMENTS[name].max
    x = values().clamp(-top, top)
    assert torch.equal(round_element(x, name), x.to(dtype).float())
    assert round_element(torch.tensor([1e9, -1e9]), name).tolist() == [top, -top]


def test_fp4_is_its_table_and_ties_go_to_even():
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert torch.equal(round_element(torch.linspace(-7, 7, 501), "fp4_e2m1").abs().unique(), grid)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert round_element(ties, "fp4_e2m1").tolist() == [0, 1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize("name", ELEMENTS)
def test_elements_are_idempotent_and_odd(name):
    x = values(500, 2.0)
    y = round_element(x, name)
    assert torch.equal(round_element(y, name), y)
    assert torch.equal(round_element(-x, name), -y)
    assert y.abs().max() <= ELEMENTS[name].max


@settings(max_examples=20, deadline=None)
@given(elem=st.sampled_from(sorted(ELEMENTS)), power=st.integers(-20, 20), seed=st.integers(0, 50))
def test_mx_follows_powers_of_two_and_repeats(elem, power, seed):
    x = values(128, 2.0, seed)
    y = mx(x, elem)
    assert torch.equal(mx(torch.ldexp(x, torch.tensor(power)), elem), torch.ldexp(y, torch.tensor(power)))
    assert torch.equal(mx(y, elem), y)


def test_mx_blocks_axis_padding_and_gradient():
    x = values(7 * 40, 1.0).reshape(7, 40)
    torch.testing.assert_close(mx(x, axis=0), mx(x.T.contiguous()).T)
    torch.testing.assert_close(mx(x)[:, :32], mx(x[:, :32].contiguous()))
    assert torch.equal(mx(torch.zeros(40)), torch.zeros(40))
    normal = x.abs() > x.abs().amax(1, keepdim=True) * 2**-6
    error = ((mx(x, scale_mode="rceil") - x).abs() / x.abs())[normal]
    assert error.max() <= 2**-4
    leaf = torch.tensor([7.9] + [0.1] * 31, requires_grad=True)  # 7.9 / 2^0 is above 6: saturated
    mx(leaf, "fp4_e2m1").sum().backward()
    assert leaf.grad[0] == 0
    assert leaf.grad[1:].eq(1).all()
    leaf.grad = None
    mx(leaf, "fp4_e2m1", scale_mode="rceil").sum().backward()
    assert leaf.grad.eq(1).all()


def test_nvfp4_block_by_block():
    x = values(64, 1.0)
    outer = x.abs().max() / (448 * 6)
    expected = []
    for block in x.split(16):
        inner = (block.abs().max() / 6 / outer).clamp(2**-6, 448).to(torch.float8_e4m3fn).float()
        expected.append(round_element(block / (inner * outer), "fp4_e2m1") * inner * outer)
    torch.testing.assert_close(nvfp4(x), torch.cat(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(nvfp4(3.7 * x), 3.7 * nvfp4(x), rtol=1e-5, atol=1e-7)
    one = torch.tensor([6.0] + [1.0] * 15)
    assert nvfp4(one, two_level=False)[0] == 6
    assert torch.equal(nvfp4(torch.zeros(20)), torch.zeros(20))


def test_fp_quant_against_the_formula_of_the_paper():
    x = values(500, 2.0).double()
    for bits, mantissa, top in ((8, 3, 480.0), (8, 2, 3.3), (6, 2, 1.7), (4, 1, 5.0), (3, 0, 2.0)):
        e = bits - 1 - mantissa
        c = torch.tensor(top, dtype=torch.float64)
        bias = 2**e - c.log2() + torch.log2(torch.tensor(2 - 2.0**-mantissa, dtype=torch.float64)) - 1
        clipped = x.clamp(-top, top)
        p = (clipped.abs().log2() + bias + 1e-12).floor().clamp_min(1)
        step = torch.exp2(p - mantissa - bias)
        torch.testing.assert_close(fp_quant(x, top, bits, mantissa), step * (clipped / step).round(), rtol=1e-9, atol=0)
    y = fp_quant(x, 480.0, 8, 3)
    torch.testing.assert_close(fp_quant(2 * x, 960.0, 8, 3), 2 * y)
    torch.testing.assert_close(fp_quant(y, 480.0, 8, 3), y)
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    torch.testing.assert_close(fp_quant(e4m3, 480.0, 8, 3), e4m3)
    leaf = torch.tensor([0.5, 3.0], requires_grad=True)
    top = torch.tensor([2.0], requires_grad=True)
    fp_quant(leaf, top, 4, 1).sum().backward()
    assert leaf.grad.tolist() == [1, 0]
    assert top.grad.item() == pytest.approx(1.0 + float(fp_quant(torch.tensor(0.5), 2.0, 4, 1) - 0.5) / 2)
