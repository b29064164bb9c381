"""Inputs with steps of their own: closed form, tokens that don't see each other, what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.integrations.onnx_qdq import export_onnx_qdq
from lightning_lossplug.quantization import (
    IntegerLayer,
    QATSettings,
    QATTechnique,
    create,
    dynamic,
    dynamic_step,
    integer_model,
)
from lightning_lossplug.quantization.rows import _library, to_bytes, to_values


def test_rows_are_made_in_cpp_here():
    assert _library() is not None, "no C++ compiler: the tests of this file compare nothing"


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), axis=st.sampled_from([-1, 1, 2, -2]), seed=st.integers(0, 99))
def test_it_equals_its_closed_form(bits, axis, seed):
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[0] = 0
    dims = list(range(axis % 3, 3))
    step = x.abs().amax(dims, keepdim=True) / (2 ** (bits - 1) - 1)
    step[step == 0] = 1
    assert torch.equal(dynamic_step(x, bits, axis), step)
    leaf = x.clone().requires_grad_()
    y = dynamic(leaf, bits, axis)
    torch.testing.assert_close(y, (x / step).round() * step, rtol=0, atol=0)
    assert ((y - x).abs() <= step / 2 * (1 + 1e-12)).all()
    (gradient,) = torch.autograd.grad(y, leaf, x)
    assert torch.equal(gradient, x)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 70), bits=st.integers(2, 8), seed=st.integers(0, 99))
def test_rows_in_cpp_equal_those_of_pytorch(rows, columns, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-30, 30, rows)[:, None]
    x[0] = (x[0] * 1e30).round() / 2  # codes between which a value lies exactly, and zeros
    top = 2 ** (bits - 1) - 1
    for value in (x, x.bfloat16(), torch.zeros_like(x), -x.abs()):
        q, steps = to_bytes(value, top)
        want = dynamic_step(value.float(), bits)
        assert torch.equal(steps, want)
        assert torch.equal(q, ((value.float() / want).round() + top).to(torch.uint8))
    y, bias = torch.randn(rows, columns, generator=generator), torch.randn(columns, generator=generator)
    steps = torch.rand(rows, 1, generator=generator)
    for added in (None, bias):
        want = y.double() * steps + (0 if added is None else added.double())
        for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
            got = to_values(y.clone(), steps, added, dtype)
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), want, rtol=error, atol=1e-6)
    assert to_values(torch.tensor([[float("nan")]]), torch.ones(1, 1), None, torch.bfloat16).isnan()


def test_a_token_is_quantised_without_the_others():
    quantizer = create("dynamic")
    x = torch.randn(2, 6, 16)
    y = quantizer(x)
    assert torch.equal(quantizer(x[:, 2:3]), y[:, 2:3])
    x[:, 0] *= 1e4  # the one large token that costs a static step its resolution
    assert torch.equal(quantizer(x)[:, 1:], y[:, 1:])
    torch.testing.assert_close(quantizer(x)[:, 0], 1e4 * y[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_integer_layers_take_the_steps_along(backend, dtype):
    torch.manual_seed(0)
    linear, convolution = nn.Linear(24, 10), nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2)
    net = nn.ModuleList([linear, convolution])
    QATTechnique(QATSettings(8, 8, activation="dynamic", include=["0", "1"])).attach(net)
    made, left = integer_model(net.eval(), backend=backend)
    assert not left
    spread = torch.logspace(-3, 3, 5)
    for index, x in (
        (0, torch.randn(2, 5, 24) * spread[:, None]),
        (1, torch.randn(5, 8, 9, 9) * spread[:, None, None, None]),
    ):
        x = x.to(dtype)
        with torch.no_grad():
            want, got = net[index](x.float()), made[index](x)
        assert got.dtype == dtype
        rows = want.flatten(0, 1) if index == 0 else want.flatten(1)
        bound = (1e-5 if dtype == torch.float32 else 2**-7) * rows.abs().amax(1, keepdim=True)
        assert ((got.float().reshape(rows.shape) - rows).abs() <= bound).all()  # to each token's own range
    with pytest.raises(LossplugError, match=r"an input of shape \(8, 9, 9\) has no batch"):
        made[1](torch.randn(8, 9, 9))


def test_what_has_no_form_is_refused(tmp_path):
    with pytest.raises(LossplugError, match="QAT: dynamic is no quantiser of weights"):
        QATTechnique(QATSettings(8, 8, weight="dynamic")).attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(LossplugError, match="dynamic: bits is 9, allowed is 2 to 8"):
        create("dynamic", bits=9)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    QATTechnique(QATSettings(8, 8, activation="dynamic")).attach(net)
    assert all(m.dynamic for m in integer_model(net)[0].modules() if isinstance(m, IntegerLayer))
    with pytest.raises(LossplugError, match="0: its input has a step per token, and QuantizeLinear has one for all"):
        export_onnx_qdq(net, {"input": torch.randn(2, 4)}, tmp_path / "a.onnx")
