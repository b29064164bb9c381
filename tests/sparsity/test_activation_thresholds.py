"""CHESS and CATS: the exact quantile, realised sparsity, identities, and hooks that leave nothing behind."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import registry
from lightning_lossplug.sparsity import ActivationThresholds
from lightning_lossplug.sparsity.kth import KthSmallest


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(1, 300), fraction=st.floats(0, 0.999), ties=st.booleans())
def test_kth_smallest_is_exact(seed, count, fraction, ties):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator).abs() * 10 ** torch.randn(count, generator=generator)
    values = values.round() if ties else values
    stream = KthSmallest()
    for part in values.split(7):
        stream.first(part)
    stream.choose(fraction)
    for part in values.split(7):
        stream.second(-part)  # signs don't count
    rank = int(fraction * count + 1e-9)
    assert stream.value() == (float(values.kthvalue(rank).values) if rank else 0.0)


class Gated(nn.Module):
    def __init__(self, width=16, inner=32):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj, self.act_fn = nn.Linear(inner, width, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        return self.o_proj(torch.softmax(self.q_proj(x) @ self.k_proj(x).mT, -1) @ x)


def model():
    torch.manual_seed(0)
    return nn.Sequential(Attention(), Gated(), Gated()).eval()


BATCHES = [torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize("method", ["chess", "cats"])
@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.9])
def test_calibration_data_gets_the_asked_sparsity(method, q):
    net = nn.Sequential(Gated()).eval()
    thresholds = ActivationThresholds(q, method)
    thresholds.calibrate(net, BATCHES)
    entries = 3 * 2 * 8 * 32
    with thresholds.applied(net) as measured, torch.no_grad():
        for batch in BATCHES:
            net(batch)
        (share,) = measured().values()
    assert abs(share - int(q * entries) / entries) <= 3 / entries
    if q == 0:
        assert share == 0


def test_chess_is_its_definition():
    net = nn.Sequential(Gated()).eval()
    thresholds = ActivationThresholds(0.5)
    thresholds.calibrate(net, BATCHES)
    with torch.no_grad():
        x = torch.cat(BATCHES)
        a, u = F.silu(net[0].gate_proj(x)), net[0].up_proj(x)
        scale = u.abs().flatten(0, 1).mean(0)
        tau = (a.abs() * scale).flatten().kthvalue(a.numel() // 2).values
        torch.testing.assert_close(thresholds.thresholds["0.act_fn"], tau / scale, rtol=1e-4, atol=0)
        kept = torch.where(a.abs() < tau / scale, 0, a)
        with thresholds.applied(net):
            torch.testing.assert_close(net(x), net[0].down_proj(kept * u))


def test_equal_up_channels_reduce_chess_to_cats():
    net = nn.Sequential(Gated()).eval()
    with torch.no_grad():
        net[0].up_proj.weight.copy_(net[0].up_proj.weight[:1].expand(32, 16))
    found = []
    for method in ("chess", "cats"):
        thresholds = ActivationThresholds(0.6, method)
        thresholds.calibrate(net, BATCHES)
        found.append(thresholds.thresholds["0.act_fn"])
    torch.testing.assert_close(found[0], found[1].expand(32), rtol=1e-5, atol=0)


def test_attention_touches_the_query_and_the_output_projection_only():
    net = model()
    thresholds = ActivationThresholds(0.5, attention=True, per_layer={"1.*": 0.0, "2.*": 0.0})
    thresholds.calibrate(net, BATCHES)
    assert set(thresholds.thresholds) == {"0.q_proj", "0.o_proj", "1.act_fn", "2.act_fn"}
    x, seen = BATCHES[0], {}
    for name in ("q_proj", "k_proj", "o_proj"):
        layer = getattr(net[0], name)
        layer.register_forward_hook(lambda m, args, out, n=name: seen.setdefault(n, args[0]))
    with thresholds.applied(net) as measured, torch.no_grad():
        for batch in BATCHES:
            net(batch)
        found = measured()
    assert torch.equal(seen["k_proj"], x)
    assert (seen["q_proj"] == 0).float().mean() > 0.3
    assert found["1.act_fn"] == found["2.act_fn"] == 0
    assert found["0.q_proj"] == pytest.approx(0.5, abs=0.01)
    assert 0.1 < found["0.o_proj"] < 0.9  # the attention output is another one once the query is cut


def test_it_leaves_nothing_behind_and_can_be_saved():
    net = model()
    before, x = list(net.state_dict()), BATCHES[0]
    with torch.no_grad():
        dense = net(x)
        thresholds = ActivationThresholds(0.5, include=["1.*"])
        thresholds.calibrate(net, BATCHES)
        again = ActivationThresholds(0.5, include=["1.*"])
        again.load_state_dict(thresholds.state_dict())
        with thresholds.applied(net):
            one = net(x)
        with pytest.raises(ZeroDivisionError), again.applied(net):
            two = net(x)
            raise ZeroDivisionError
        assert torch.equal(one, two)
        assert not torch.equal(one, dense)
        assert torch.equal(net(x), dense)
    assert list(net.state_dict()) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_mistakes():
    for options in ({"sparsity": 1.0}, {"sparsity": -0.1}, {"method": "dogs"}, {"per_layer": {"*": 2.0}}):
        with pytest.raises(LossplugError):
            ActivationThresholds(**options)
    with pytest.raises(LossplugError, match="Use method='cats'"):
        ActivationThresholds().calibrate(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval(), BATCHES)
    with pytest.raises(LossplugError, match="training mode"):
        ActivationThresholds().calibrate(model().train(), BATCHES)
    with pytest.raises(LossplugError, match="didn't run on the batches"):
        ActivationThresholds().calibrate(model(), [])
    with pytest.raises(LossplugError, match="Call calibrate"), ActivationThresholds().applied(model()):
        pass
    thresholds = ActivationThresholds()
    thresholds.calibrate(model(), BATCHES)
    with pytest.raises(LossplugError, match="those of another model"), thresholds.applied(nn.Sequential(Gated())):
        pass
    assert registry.create("activation", "chess", sparsity=0.3).sparsity == 0.3


def test_a_llama_keeps_its_logits_at_zero_and_loses_little_at_low_sparsity():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(0, 32, (2, 8)), "use_cache": False} for _ in range(2)]
    errors = []
    with torch.no_grad():
        dense = llama(**batches[0]).logits
        for q in (0.0, 0.3, 0.9):
            thresholds = ActivationThresholds(q)
            thresholds.calibrate(llama, batches)
            with thresholds.applied(llama):
                errors.append(float((llama(**batches[0]).logits - dense).norm()))
    assert errors[0] == 0 < errors[1] < errors[2]
