"""Gated feed-forward modules in integers: the same values as their three layers, in real architectures."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config

from lightning_lossplug.quantization import IntegerLayer, QATSettings, QATTechnique, integer_model
from lightning_lossplug.quantization.gated_layer import GatedLayer
from lightning_lossplug.quantization.linear_bytes import runs_here

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
pytestmark = pytest.mark.skipif(
    not runs_here(torch.ones(4, 4, dtype=torch.int8)),
    reason="this processor has no VNNI, or has AMX",
)


def quantised(config, **chosen):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    QATTechnique(QATSettings(8, 8, **chosen)).attach(model)
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        model.train()(input_ids=ids)
    return model.eval(), ids


@pytest.mark.parametrize("chosen", [{}, {"activation": "dynamic"}], ids=["one step", "a step per token"])
@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SIZES, mlp_bias=True), Qwen2Config(**SIZES), Gemma3TextConfig(**SIZES, head_dim=8)],
    ids=["llama", "qwen2", "gemma3"],
)
def test_language_models(config, chosen):
    model, ids = quantised(config, **chosen)
    made, left = integer_model(model)
    apart, _ = integer_model(model, fuse=False)
    assert left == {}
    found = [m for m in made.modules() if isinstance(m, GatedLayer)]
    assert len(found) == 2
    assert {m.act.act for m in found} == ({"gelu"} if "Gemma" in type(model).__name__ else {"swish"})
    assert list(made.state_dict()) == list(apart.state_dict())
    assert isinstance(made.model.layers[0].mlp.gate_proj, IntegerLayer)
    with torch.no_grad():
        want, got = apart(input_ids=ids).logits, made(input_ids=ids).logits
        reach = want.max() - want.min()
        assert (got - want).abs().max() <= 0.03 * reach
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(twin(input_ids=ids).logits, got)
        half = copy.deepcopy(made).bfloat16()(input_ids=ids).logits
        assert half.dtype == torch.bfloat16
        assert (half - want).abs().max() <= 0.1 * reach


@pytest.mark.parametrize("chosen", [{}, {"activation": "dynamic"}], ids=["one step", "a step per token"])
def test_its_function_and_its_layers_agree(chosen):
    model, _ = quantised(LlamaConfig(**SIZES), **chosen)
    made = integer_model(model)[0].model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        want = made(x)
        exported = torch.export.export(made, (x,)).module()(x)
        plain = copy.deepcopy(made)
        for layer in plain.children():
            layer.use("onednn")
        for got in (exported, plain(x), made(x.double()), made(x.half()), made(x.transpose(0, 1)).transpose(0, 1)):
            assert got.shape == want.shape
            assert (got - want).abs().max() <= 0.05 * want.abs().max()  # codes may differ
        assert made(x.half()).dtype == torch.float16


class Shifted(nn.Module):
    """One that adds something to the product."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.SiLU()

    def forward(self, x):
        return self.c(self.act(self.a(x)) * self.b(x) + 1)


class Other(Shifted):
    """One whose second factor has another input, and one whose layers are wired otherwise."""

    def forward(self, x):
        return self.c(self.act(self.a(x)) * self.b(x + 1))


class Gated(Shifted):
    """The activation on the right, dropout on the way."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.c(self.drop(self.b(x) * self.act(self.a(x)))))


def test_only_what_is_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), Shifted(), Other(), Gated(), nn.Linear(8, 8))
    QATTechnique(QATSettings(8, 8)).attach(net)
    x = torch.randn(32, 8)
    with torch.no_grad():
        net.train()(x)
        made, _ = integer_model(net.eval())
        assert [isinstance(m, GatedLayer) for m in made] == [False, False, False, True, False]
        want = net(x)
        assert (made(x) - want).abs().max() <= 0.05 * (want.max() - want.min())
