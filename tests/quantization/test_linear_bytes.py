"""Linear layers on bytes: what the function gives against the definition in float64, and when it can't be called."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization import IntegerLayer, QATSettings, QATTechnique, integer_model
from lightning_lossplug.quantization.emission import Emission, emitted
from lightning_lossplug.quantization.linear_bytes import WIDEST, LinearOnBytes, runs_here

ACTS = [
    Emission(),
    Emission("relu"),
    Emission("hardtanh", (0.0, 6.0)),
    Emission("hardswish"),
    Emission("swish"),
    Emission("gelu", (), "none"),
    Emission("gelu", (), "tanh"),
]
BOUNDS = [(0, 255, 128), (1, 255, 128), (0, 254, 127), (0, 15, 0), (0, 255, 3)]

needs_function = pytest.mark.skipif(
    not runs_here(torch.ones(4, 4, dtype=torch.int8)),
    reason="this processor has no VNNI, or has AMX",
)


def layer(rows, inputs, outputs, seed, bounds, bias=True, dynamic=False):
    low, high, zero = bounds
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (outputs, inputs), generator=g, dtype=torch.int8)
    scale = torch.rand(outputs, generator=g) / (100 * math.sqrt(inputs)) + 1e-5
    added = torch.randn(outputs, generator=g) if bias else None
    x = torch.randn(rows, inputs, generator=g)
    step = None if dynamic else 0.03
    return codes, scale, added, x, LinearOnBytes(codes, scale, added, step, zero, (low, high))


def by_definition(codes, scale, bias, x, bounds, step=0.03):
    low, high, zero = bounds
    q = (x.float() / torch.tensor(step)).round().add(zero).clamp(low, high).sub(zero)
    y = (q.double() @ codes.double().T) * scale.double() * step
    return y if bias is None else y + bias.double()


@needs_function
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 130),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 150),
    seed=st.integers(0, 1000),
    bounds=st.sampled_from(BOUNDS),
    act=st.sampled_from(ACTS),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_values_are_those_of_the_definition(rows, inputs, outputs, seed, bounds, act, bias, dtype):
    codes, scale, added, x, function = layer(rows, inputs, outputs, seed, bounds, bias)
    x = x.to(dtype)
    want = by_definition(codes, scale, added, x, bounds)
    got = function(x, torch.float32, act)
    reach = max(1.0, float(want.abs().max()))
    assert (got - emitted(want, act)).abs().max() <= 3e-6 * reach
    assert torch.equal(function(x, torch.bfloat16, act), got.bfloat16())
    # Bytes out: the same codes, where the value does not lie between two.
    to_codes = Emission(scale=0.02, zero=bounds[2], bounds=bounds[:2])
    made = function(x, torch.float32, act._replace(**{n: getattr(to_codes, n) for n in ("scale", "zero", "bounds")}))
    assert made.dtype == torch.uint8 and made.shape == got.shape
    at = got.double() / 0.02
    clear = (at - at.floor() - 0.5).abs() > 1e-3
    assert torch.equal(made[clear], emitted(got, to_codes)[clear])
    assert (made.int() - emitted(got, to_codes).int()).abs().max() <= 1
    # Bytes in.
    q = (x.float() / torch.tensor(0.03)).round().add(bounds[2]).clamp(*bounds[:2]).to(torch.uint8)
    assert torch.equal(function(q, torch.float32, act), got)


@needs_function
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 130), inputs=st.integers(1, 100), outputs=st.integers(1, 80), seed=st.integers(0, 1000))
def test_rows_with_steps_of_their_own(rows, inputs, outputs, seed):
    codes, scale, bias, x, function = layer(rows, inputs, outputs, seed, (0, 254, 127), dynamic=True)
    x = x * torch.logspace(-3, 3, rows)[:, None]
    x[0] = 0
    step = x.abs().amax(1, keepdim=True) / 127
    q = (x / step.where(step > 0, torch.ones(()))).round()
    want = (q.double() @ codes.double().T) * scale.double() * step.double() + bias.double()
    got = function(x, torch.float32, Emission())
    parts = (q.double().abs() @ codes.double().abs().T) * scale * step + bias.abs()  # which may cancel
    assert ((got - want).abs() <= 1e-6 * parts).all()


@needs_function
def test_activations_at_their_ends():
    one = torch.ones(1, 1, dtype=torch.int8)
    x = torch.cat([torch.linspace(-9, 9, 4001), torch.tensor([-1e30, -200.0, -88.0, 88.0, 200.0, 1e30])])
    function = LinearOnBytes(one, torch.ones(1), None, None, 127, (0, 254))
    values = x[:, None]
    for act in ACTS:
        got = function(values, torch.float32, act)[:, 0]
        exact = emitted((values / 127).double() * 127, act)[:, 0].float()
        assert torch.allclose(got, exact, rtol=2e-6, atol=3e-6), act
    lost = LinearOnBytes(one, torch.ones(1), torch.tensor([math.nan]), 1.0, 0, (0, 255))
    for act in ACTS:
        assert lost(torch.ones(3, 1), torch.float32, act).isnan().all(), act


@needs_function
def test_what_it_does_not_take():
    assert not runs_here(torch.ones(1, WIDEST + 1, dtype=torch.int8))
    widest = torch.full((1, WIDEST), 127, dtype=torch.int8)
    function = LinearOnBytes(widest, torch.ones(1), None, 1.0, 0, (0, 255))
    assert float(function(torch.full((1, WIDEST), 255.0), torch.float32, Emission())) == WIDEST * 255 * 127
    assert function(torch.ones(0, WIDEST), torch.float32, Emission()).shape == (0, 1)


def quantised(dynamic=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 8))
    chosen = QATSettings(8, 8, activation="dynamic") if dynamic else QATSettings(4, 4, first_last_bits=4)
    QATTechnique(chosen).attach(net)
    x = torch.randn(64, 16)
    net.train()(x)
    net.eval()
    return net, x


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_traced_call_computes_the_same(dynamic):
    net, x = quantised(dynamic)
    made, left = integer_model(net)
    kernels = {m.backend for m in made.modules() if isinstance(m, IntegerLayer)}
    assert left == {} and len(kernels) == 1
    if not dynamic and kernels == {"native"}:
        assert made[:2](x).dtype == torch.uint8  # four bits, too: this kernel cuts where the codes end
    with torch.no_grad():
        want = made(x)
        assert (want - net(x)).abs().max() <= 0.02 * (want.max() - want.min())
        ways = [
            torch.export.export(made, (x,)).module(),
            torch.jit.trace(made, x),
            torch.compile(made, backend="eager"),
        ]
        for way in ways:
            got = way(x)
            assert (got - want).abs().max() <= 0.02 * (want.max() - want.min())
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(twin(x), want)


@needs_function
def test_kernels_by_name():
    net, x = quantised()
    with torch.no_grad():
        found = {name: integer_model(net, backend=name, fuse=False)[0](x) for name in ("native", "reference", "auto")}
    assert torch.equal(found["native"], found["auto"])
    assert (found["native"] - found["reference"]).abs().max() <= 1e-5 * F.relu(found["reference"]).max()


def test_loaded_codes_count():
    net, x = quantised()
    made, other = integer_model(net)[0], integer_model(net)[0]
    with torch.no_grad():
        want = made(x)
        for m in other.modules():
            if isinstance(m, IntegerLayer):
                m.codes.zero_()
        other.load_state_dict({k: v.clone() for k, v in other.state_dict().items()})
        assert not torch.equal(other(x), want)
        other.load_state_dict(made.state_dict())
        assert torch.equal(other(x), want)


class Odd(torch.Tensor):
    """A subclass: its memory may be anywhere."""


def test_inputs_of_other_kinds():
    net, x = quantised()
    made, _ = integer_model(net)
    with torch.no_grad():
        want = made(x)
        close = 0.1 * (want.max() - want.min())  # a value that goes to the other one of its 16 codes
        for other in (x.double(), x.half(), x.bfloat16(), x.as_subclass(Odd), x.t().contiguous().t()):
            assert (made(other) - want).abs().max() <= close
        assert made(x[:0]).shape == (0, 8) and made(x[0]).shape == (8,)
        with pytest.raises((LossplugError, RuntimeError), match=r"shape|mat1|size"):
            made(torch.randn(4, 17))
        meta = copy.deepcopy(made).to("meta")
        assert meta(x.to("meta")).shape == want.shape
        mapped = torch.func.vmap(made)(x.reshape(4, 16, 16))
        assert (mapped.reshape(want.shape) - want).abs().max() <= close


@needs_function
def test_another_width_is_refused():
    function = layer(1, 16, 4, 0, (0, 255, 128))[-1]
    with pytest.raises(LossplugError, match=r"shape \(4, 17\) for a layer of 16 inputs"):
        function(torch.randn(4, 17), torch.float32, Emission())


@pytest.mark.parametrize("kernel", ["native", "onednn", "reference"])
def test_a_fused_layer_keeps_its_activation_in_every_kernel(kernel):
    net, x = quantised()
    made, _ = integer_model(net)
    with torch.no_grad():
        want = made(x)
        assert any(m.emission.act != "none" for m in made.modules() if isinstance(m, IntegerLayer))
        for m in made.modules():
            if isinstance(m, IntegerLayer) and not m.use(kernel):
                pytest.skip(f"this processor has no {kernel} kernel")
        assert (made(x) - want).abs().max() <= 0.03 * (want.max() - want.min())
