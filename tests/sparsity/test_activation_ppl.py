"""PPL-p%: CETT against its definition, the search against brute force, limits."""

import itertools
import math

import pytest
import torch
from torch import nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import registry
from lightning_lossplug.sparsity import ppl_p_sparsity
from lightning_lossplug.sparsity.activation_ppl import _Layer


class Net(nn.Module):
    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down_proj = nn.Linear(8, 32), activation, nn.Linear(32, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(x + self.down_proj(self.act(self.up(x))))


def loss(net, batch):
    x, y = batch
    return 10 * float(nn.functional.mse_loss(net(x), y)), len(y)  # 0 for the dense net: every cut costs something


def setting(activation=None):
    net = Net(activation or nn.ReLU()).eval()
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(3):
        x = torch.randn(40, 8, generator=generator)
        with torch.no_grad():
            batches.append((x, net(x)))
    return net, batches


def search(p, activation=None, **options):
    net, batches = setting(activation)
    return ppl_p_sparsity(net, batches, p, loss=loss, **{"candidates": 512, "tolerance": 1e-4} | options)


def test_cett_is_its_definition():
    net, batches = setting()
    layer = _Layer(net.down_proj, 64)
    handle = net.down_proj.register_forward_hook(layer.keep)
    with torch.no_grad():
        for x, _ in batches:
            net(x)
        handle.remove()
        layer.prepare(200)
        x = torch.cat([x for x, _ in batches])[:64]
        a = net.act(net.up(x))
        n = a.abs() * net.down_proj.weight.norm(dim=0)
        for index in (0, 30, 120, 199):
            gone = torch.where(n <= float(layer.grid[index]), a, 0) @ net.down_proj.weight.T
            want = (gone.norm(dim=1) / net.down_proj(a).norm(dim=1)).mean()
            assert layer.cett(index) == pytest.approx(float(want), rel=1e-4, abs=1e-7)
    values = [layer.cett(i) for i in range(200)]
    assert all(b >= a - 0.02 for a, b in itertools.pairwise(values))  # neurons may cancel each other
    for c in (0.0, 0.05, 0.3, 0.9):
        index = layer.grid.tolist().index(layer.threshold(c))
        assert values[index] <= c
        assert index == 199 or values[index + 1] > c
    assert layer.threshold(-1.0) == float(layer.grid[0])  # where nothing is within c


def test_the_result_is_within_p_and_grows_with_it():
    found = [search(p) for p in (0.5, 5.0, 50.0)]
    for result, p in zip(found, (0.5, 5.0, 50.0), strict=True):
        assert result.sparse_loss - result.loss <= math.log1p(p / 100)
        assert result.p == p
        assert result.sparsity == result.layers["down_proj"]
    assert found[0].sparsity <= found[1].sparsity <= found[2].sparsity
    assert found[0].cett < found[2].cett
    assert found[0].loss == found[2].loss


def test_a_vanishing_p_leaves_the_exact_zeros_of_relu_and_nothing_of_silu():
    net, batches = setting()
    with torch.no_grad():
        zeros = torch.cat([net.act(net.up(x)) == 0 for x, _ in batches]).float().mean()
    assert search(1e-9).sparsity == pytest.approx(float(zeros), abs=0.01)
    assert search(1e-9, nn.SiLU()).sparsity < 0.02


def test_layouts_agree():
    conv1d = pytest.importorskip("transformers", reason="needs transformers").pytorch_utils.Conv1D
    net, batches = setting()
    other = Net(nn.ReLU()).eval()
    swapped = conv1d(8, 32)
    with torch.no_grad():
        swapped.weight.copy_(other.down_proj.weight.T)
        swapped.bias.copy_(other.down_proj.bias)
    other.down_proj = swapped
    options = {"loss": loss, "candidates": 128}
    one, two = (ppl_p_sparsity(m, batches, 5.0, **options) for m in (net, other))
    assert one.sparsity == pytest.approx(two.sparsity, abs=2e-3)


def test_a_language_model_of_transformers():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(0, 32, (2, 9))} for _ in range(2)]
    metric = registry.get("metric", "ppl_p_sparsity").load()
    result = metric(model, batches, 1.0, candidates=256, tolerance=0.05)
    assert set(result.layers) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_mistakes():
    net, batches = setting()
    for options, words in (
        ({"p": 0}, "p is 0"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"include": ["*.nothing"]}, "no layer matches"),
        ({"batches": []}, "there is no batch"),
    ):
        with pytest.raises(LossplugError, match=words):
            ppl_p_sparsity(**{"model": net, "batches": batches, "loss": loss} | options)
    with pytest.raises(LossplugError, match="training mode"):
        ppl_p_sparsity(net.train(), batches, loss=loss)
