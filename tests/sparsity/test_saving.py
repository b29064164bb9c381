"""A masked layer keeps no masked weight for its backward pass, and gives the gradients of one that does."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lossplug import LossplugError
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import NMSettings, NMTechnique
from lightning_lossplug.surgery import fold, latent

OPTIONS = {
    "nm_srste": {},
    "mdgf_linear": {"dense_fraction": 0.0},
    "mdgf_exponential": {"dense_fraction": 0.0, "grad_mode": "masked"},
    "nm_sste": {},
}


class Seen(nn.Linear):
    """Remembers, weakly, what its product read."""

    reads: list = []

    def forward(self, x):
        weight = self.weight
        self.reads.append(weakref.ref(weight))
        if x.numel() == 0:
            raise RuntimeError("empty")
        return F.linear(x, weight, self.bias)


class Experts(nn.Module):
    """Two parameters read by one forward pass, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(2, 16, 8)), nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        down = self.down_proj
        both = torch.einsum("eoi,bi->ebo", self.gate_up_proj, x)
        return torch.tanh(both[..., :8] * both[..., 8:]) @ down @ down


def attached(model, recipe="nm_srste", step=3, include=None, **options):
    technique = NMTechnique(NMSettings(2, 4, recipe, include=include, **options))
    technique.attach(model)
    technique.advance(Progress(0, 10))
    technique.advance(Progress(step, 10))
    return technique


def no_hooks_left():
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.mark.parametrize("recipe", OPTIONS)
def test_the_masked_weight_is_gone_after_the_forward_pass_and_gradients_are_right(recipe):
    torch.manual_seed(0)
    layer = Seen(16, 8).double()
    plain = copy.deepcopy(layer)
    technique = attached(layer, recipe, include=[""], **OPTIONS[recipe])
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    used = layer.weight.detach().requires_grad_()
    F.linear(x, used, plain.bias).square().sum().backward()
    expected, x.grad = x.grad, None
    Seen.reads.clear()
    loss = layer(x).square().sum()
    assert Seen.reads[0]() is None
    assert no_hooks_left()
    loss.backward()
    assert torch.equal(x.grad, expected)
    if OPTIONS[recipe].get("grad_mode") == "masked":
        factor = torch.where(used == latent(layer), 1.0, used / latent(layer))
        assert torch.allclose(latent(layer).grad, used.grad * factor)
    else:
        assert torch.equal(latent(layer).grad, used.grad)
    technique.advance(Progress(10, 10))
    folded = fold(layer)
    assert not (folded._forward_pre_hooks or folded._forward_hooks or folded._forward_hooks_always_called)


def test_second_derivatives_two_passes_and_a_kept_graph():
    torch.manual_seed(0)
    layer = Seen(8, 8).double()
    attached(layer, include=[""])
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    loss = layer(torch.tanh(layer(x))).pow(3).sum()
    used = layer.weight.detach().requires_grad_()
    again = F.linear(torch.tanh(F.linear(x, used, layer.bias)), used, layer.bias).pow(3).sum()
    ours = torch.autograd.grad(loss, (x, latent(layer)), create_graph=True)
    theirs = torch.autograd.grad(again, (x, used), create_graph=True)
    second = [torch.autograd.grad(g[0].square().sum() + g[1].sum(), p) for g, p in ((ours, x), (theirs, x))]
    for a, b in zip((*ours, *second[0]), (*theirs, *second[1]), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_several_parameters_of_one_module():
    torch.manual_seed(0)
    model = nn.Sequential(Experts()).double()
    technique = attached(model, include=["0.gate_up_proj", "0.down_proj"])
    assert len(technique.layers) == 2
    assert len(model[0]._forward_pre_hooks) == 1
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    twin = fold(model)
    for net in (model, twin):
        net(x).square().sum().backward()
    for name in ("gate_up_proj", "down_proj"):
        assert torch.allclose(latent(model[0], name).grad, getattr(twin[0], name).grad, rtol=1e-12)
    technique.detach(model)
    assert not model[0]._forward_pre_hooks


def test_hooks_of_others_are_left_alone():
    torch.manual_seed(0)
    layer = Seen(16, 8).double()
    attached(layer, include=[""])
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    expected = x.grad.clone(), latent(layer).grad.clone()
    x.grad = latent(layer).grad = None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(latent(layer).grad, expected[1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert kept
    dense = Seen(16, 8)
    attached(dense, "mdgf_linear", include=[""], dense_fraction=0.5)
    assert torch.func.grad(lambda x: dense(x).square().sum())(torch.randn(3, 16)).any()
    with torch.no_grad():
        layer(x)
    assert no_hooks_left()


def test_an_exception_and_a_changed_weight():
    torch.manual_seed(0)
    layer = Seen(16, 8)
    attached(layer, include=[""])
    with pytest.raises(RuntimeError, match="empty"):
        layer(torch.zeros(0, 16))
    assert no_hooks_left()
    loss = layer(torch.randn(3, 16, requires_grad=True)).square().sum()
    with torch.no_grad():
        latent(layer).add_(1.0)
    with pytest.raises(LossplugError, match="changed between the forward and the backward pass"):
        loss.backward()
