"""Plugged layers: same Parameter, same keys, ordered stack, clean way back."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.surgery import PluggedLayer, WeightTransform, fold, latent, plug, plugged_layers, unplug


class Double(WeightTransform):
    stage = "sparsity"

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(2.0))

    def forward(self, weight):
        return weight * self.factor


class AddOne(WeightTransform):
    stage = "quantization"

    def forward(self, weight):
        return weight + 1


class Unfinished(Double):
    def check_fold(self):
        return "not at its end"


@pytest.mark.parametrize("first", [Double, AddOne])
def test_stages_are_ordered_whatever_the_order_of_plugging(first):
    layer = nn.Linear(4, 3)
    parameter, x = layer.weight, torch.randn(2, 4)
    second = AddOne if first is Double else Double
    plug(layer, first())
    plug(layer, second())
    assert latent(layer) is parameter
    assert torch.equal(layer.weight, 2 * parameter + 1)
    assert torch.equal(layer(x), nn.functional.linear(x, 2 * parameter + 1, layer.bias))
    assert {k for k in layer.state_dict() if "transforms" not in k} == {"weight", "bias"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: (nn.Linear(4, 6), torch.randn(2, 4)),
        lambda: (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 8)),
        lambda: (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 8, 8)),
        lambda: (nn.ConvTranspose2d(4, 6, 3), torch.randn(2, 4, 8, 8)),
        lambda: (nn.Embedding(10, 6), torch.arange(4)),
    ],
)
def test_the_layers_own_forward_runs_on_the_transformed_weight(make):
    layer, x = make()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(2)
    plug(layer, Double())
    assert torch.equal(layer(x), twin(x))
    layer(x).sum().backward()
    assert latent(layer).grad is not None


def test_a_parent_that_reads_the_weight_itself_sees_the_transformed_one():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    twin = copy.deepcopy(attention)
    with torch.no_grad():
        twin.out_proj.weight.mul_(2)
        twin.in_proj_weight.mul_(2)
    plug(attention.out_proj, Double())
    plug(attention, Double(), parameter="in_proj_weight")
    x = torch.randn(2, 5, 8)
    for grad in (True, False):  # without gradients torch takes its fast path
        with torch.set_grad_enabled(grad):
            assert torch.allclose(attention(x, x, x)[0], twin(x, x, x)[0], atol=1e-6)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_keep_the_stack_and_are_independent(clone):
    layer = nn.Sequential(nn.Linear(4, 3))
    plug(layer[0], Double())
    other = clone(layer)
    assert isinstance(other[0], PluggedLayer)
    assert torch.equal(other[0].weight, layer[0].weight)
    with torch.no_grad():
        latent(other[0]).zero_()
    assert layer[0].weight.abs().sum() > 0


def test_dense_checkpoints_load_strictly_and_leave_transforms_alone():
    plain, plugged = nn.Linear(4, 3), nn.Linear(4, 3)
    plug(plugged, Double())
    plugged.weight_transforms["sparsity"].factor.fill_(5)
    assert not any(plugged.load_state_dict(plain.state_dict(), strict=True))
    assert torch.equal(plugged.weight, 5 * plain.weight)
    restored = nn.Linear(4, 3)
    plug(restored, Double())
    restored.load_state_dict(plugged.state_dict(), strict=True)
    assert torch.equal(restored.weight, plugged.weight)


def test_fold_works_on_a_copy_and_gives_plain_layers():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    plug(model[0], Double())
    plug(model[0], AddOne())
    x = torch.randn(5, 4)
    plain = fold(model)
    assert type(plain[0]) is nn.Linear
    assert not list(plugged_layers(plain))
    assert torch.equal(plain(x), model(x))
    assert isinstance(model[0], PluggedLayer)
    assert set(plain.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert fold(model, inplace=True) is model
    assert type(model[0]) is nn.Linear


def test_folding_is_refused_before_the_end_and_loses_nothing():
    model = nn.Sequential(nn.Linear(4, 3))
    plug(model[0], Unfinished())
    before = latent(model[0]).clone()
    with pytest.raises(LossplugError, match=r"0\.weight: not at its end"):
        fold(model, inplace=True)
    assert isinstance(model[0], PluggedLayer)
    assert torch.equal(latent(model[0]), before)


def test_unplug_gives_back_class_and_latent_weight():
    layer = nn.Linear(4, 3)
    before = layer.weight.clone()
    plug(layer, Double())
    unplug(layer, "sparsity")
    unplug(layer, "sparsity")
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, before)
    assert "weight_transforms" not in dict(layer.named_modules())


def test_two_techniques_on_one_stage_are_refused():
    layer = nn.Linear(4, 3)
    plug(layer, Double(), where="mlp.fc1")
    with pytest.raises(LossplugError, match=r"mlp\.fc1: two techniques want the sparsity stage"):
        plug(layer, Double(), where="mlp.fc1")
    with pytest.raises(LossplugError, match="has no parameter 'gate'"):
        plug(layer, Double(), parameter="gate")


def test_compiles_in_one_graph_and_follows_buffers_without_recompiling():
    layer = nn.Linear(4, 3)
    plug(layer, Double())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4)
    assert torch.allclose(compiled(x), layer(x))
    layer.weight_transforms["sparsity"].factor.fill_(7)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.allclose(compiled(x), nn.functional.linear(x, 7 * latent(layer), layer.bias))


def test_optimizer_made_before_plugging_still_moves_the_weight():
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    plug(layer, Double())
    before = layer.weight.detach().clone()
    layer(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
