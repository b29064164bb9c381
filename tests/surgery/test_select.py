"""Layer selection: defaults, patterns, reasons."""

import pytest
import timm
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lightning_lossplug import LossplugError
from lightning_lossplug.surgery import candidates, select
from lightning_lossplug.surgery.select import require_taken


@pytest.fixture(scope="module")
def vit():
    return timm.create_model("vit_tiny_patch16_224", depth=2)


def taken(selection):
    return [c.name for c in selection.taken]


def notes(selection):
    return {choice.candidate.name: choice.note for choice in selection.choices}


def test_vit_defaults_leave_stem_and_head(vit):
    selection = select(vit)
    blocks = [f"blocks.{i}.{part}" for i in range(2) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert taken(selection) == blocks
    assert "first convolution" in notes(selection)["patch_embed.proj"]
    assert "output layer" in notes(selection)["head"]


def test_resnet_and_mobilenet_defaults():
    resnet = select(timm.create_model("resnet18"))
    assert "conv1" not in taken(resnet)
    assert "fc" not in taken(resnet)
    assert len(taken(resnet)) == 19
    mobile = notes(select(timm.create_model("mobilenetv3_small_050")))
    assert any(note.startswith("depthwise") for note in mobile.values())


@pytest.mark.parametrize("tied", [True, False])
def test_language_model_defaults_leave_embeddings_and_head(tied):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model = nn.ModuleDict({"model": AutoModelForCausalLM.from_config(config)})  # wrapped, as in a LightningModule
    selection = select(model)
    assert all(".layers.0." in name for name in taken(selection))
    assert len(taken(selection)) == 7


def test_conv1d_of_transformers_reduces_over_axis_0():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    found = {c.name: c for c in candidates(model)}
    assert found["transformer.h.0.mlp.c_fc"].reduction_axis == 0
    assert found["transformer.h.0.mlp.c_fc"].shape == (16, 64)


def test_patterns_and_the_override_by_full_name(vit):
    assert taken(select(vit, ["*.mlp.*"])) == [f"blocks.{i}.mlp.fc{j}" for i in range(2) for j in (1, 2)]
    assert "head" not in taken(select(vit, ["*"]))
    assert taken(select(vit, ["head"])) == ["head"]
    assert taken(select(vit, ["*.mlp.*"], ["blocks.0.*"])) == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]


def test_a_pattern_that_matches_nothing_is_an_error_with_a_suggestion(vit):
    with pytest.raises(LossplugError, match=r"'\*\.mpl\.fc1' matches no layer.*Did you mean.*mlp\.fc1"):
        select(vit, ["*.mpl.fc1"])


def test_reasons_and_table(vit):
    selection = select(vit, check=lambda c: "too small" if "proj" in c.path else None)
    assert notes(selection)["blocks.0.attn.proj"] == "too small"
    table = selection.table(compact=True)
    assert "blocks.*.mlp.fc1 (2)" in table
    assert "768x192" in table
    assert "too small" in table
    assert len(selection.table().splitlines()) == len(selection.choices) + 1


def test_nothing_taken_is_an_error_with_the_reason():
    with pytest.raises(LossplugError, match="no layer selected: the model has none"):
        require_taken(select(nn.Sequential(nn.ReLU())), "NMSparsity")
    with pytest.raises(LossplugError, match=r"left out.*embedding"):
        require_taken(select(nn.Sequential(nn.Embedding(4, 4))), "NMSparsity")


def test_a_shared_layer_counts_once():
    layer = nn.Linear(8, 8)
    assert len(candidates(nn.Sequential(layer, nn.ReLU(), layer))) == 1


def test_a_lone_layer_is_taken():
    assert taken(select(nn.Sequential(nn.Linear(8, 8)))) == ["0"]


def test_the_attention_of_torch_offers_both_projections():
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    names = [c.name for c in candidates(encoder)]
    assert "self_attn.in_proj_weight" in names
    assert "self_attn.out_proj" in names
    assert torch.is_tensor(encoder.self_attn.in_proj_weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("says", [False, True])
def test_fused_experts_are_found_by_their_shapes_or_their_flag(transposed, fused, says):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            hidden, inner = 8, 12
            wide = 2 * inner if fused else inner
            up, down = ((hidden, wide), (inner, hidden)) if transposed else ((wide, hidden), (hidden, inner))
            for name in ("gate_up_proj",) if fused else ("gate_proj", "up_proj"):
                self.register_parameter(name, nn.Parameter(torch.empty(3, *up)))
            self.down_proj = nn.Parameter(torch.empty(3, *down))
            self.bias = nn.Parameter(torch.empty(3, hidden))
            if says:
                self.is_transposed = transposed

    found = candidates(nn.ModuleDict({"experts": Experts()}))
    if not says and not fused:  # the shapes fit both ways, so nothing is guessed
        assert found == []
        return
    assert [c.name for c in found][-1] == "experts.down_proj"
    assert len(found) == (2 if fused else 3)
    for candidate in found:
        assert (candidate.reduction_axis, candidate.output_axis) == ((1, 2) if transposed else (2, 1))
        assert candidate.shape[candidate.reduction_axis] == (12 if candidate.parameter == "down_proj" else 8)
