"""Fused experts, fused qkv, grouped convolutions and mixed patterns in small models of transformers and timm."""

import pytest
import timm
import torch
from tiny_models import TINY, train
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3MoeConfig,
)

from lightning_lossplug.callbacks import NMSparsity
from lightning_lossplug.surgery import fold, latent, plugged_layers, select

MOE = {
    "mixtral": MixtralConfig(**TINY, num_local_experts=3),
    "qwen3": Qwen3MoeConfig(**TINY, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8),
    "gpt_oss": GptOssConfig(**TINY, num_local_experts=3, num_experts_per_tok=2),
    "llama4": Llama4TextConfig(
        **TINY, intermediate_size_mlp=32, num_local_experts=3, num_experts_per_tok=1, pad_token_id=0
    ),
}
# Axis of the inputs of [experts, ., .] parameters.
INPUTS = {"mixtral": 2, "qwen3": 2, "gpt_oss": 1, "llama4": 1}


def sparse(model, batch, **options):
    return train(model, batch, NMSparsity(**options))


def kept(weight, axis, m):
    return (weight != 0).movedim(axis, -1).reshape(-1, m).sum(1).unique().tolist()


@pytest.mark.parametrize("name", MOE)
def test_fused_experts(name, tmp_path):
    module = sparse(
        AutoModelForCausalLM.from_config(MOE[name]), torch.randint(0, 64, (2, 8)), include=["*.experts.*"], m=4, n=2
    )
    layers = dict(plugged_layers(module))
    assert len(layers) == 2
    for layer in layers.values():
        for parameter in ("gate_up_proj", "down_proj"):
            assert latent(layer, parameter).ndim == 3
            assert kept(getattr(layer, parameter), INPUTS[name], 4) == [2]
    plain = fold(module)
    ids = torch.randint(0, 64, (1, 8))
    assert torch.allclose(plain.eval().model(ids).logits, module.eval().model(ids).logits, atol=1e-5)
    plain.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(ids).logits, plain.model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_compute_experts_reads_the_masked_weight(implementation):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MOE["mixtral"])
    model.set_experts_implementation(implementation)
    module = sparse(model, torch.randint(0, 64, (2, 8)), include=["*.experts.*"], recipe="nm_ste")
    ids = torch.randint(0, 64, (1, 8))
    plain = fold(module).eval().model
    plain.set_experts_implementation("eager")
    assert torch.allclose(plain(ids).logits, module.eval().model(ids).logits, atol=1e-4)
    assert not torch.equal(
        latent(model.model.layers[0].mlp.experts, "down_proj"), plain.model.layers[0].mlp.experts.down_proj
    )


def test_experts_with_transposable_masks():
    module = sparse(
        AutoModelForCausalLM.from_config(MOE["gpt_oss"]),
        torch.randint(0, 64, (2, 8)),
        include=["*.experts.*"],
        recipe="nm_transposable",
    )
    weight = module.model.model.layers[0].mlp.experts.gate_up_proj
    assert kept(weight, 1, 4) == kept(weight, 2, 4) == [2]


@pytest.mark.parametrize(
    ("config", "layer", "axis"),
    [
        (Phi3Config(**{k: v for k, v in TINY.items() if k != "head_dim"}, pad_token_id=0), "self_attn.qkv_proj", 1),
        (GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2), "attn.c_attn", 0),
    ],
    ids=["phi3", "gpt2"],
)
def test_fused_qkv_of_language_models(config, layer, axis):
    module = sparse(AutoModelForCausalLM.from_config(config), torch.randint(0, 64, (2, 8)), include=[f"*.{layer}"])
    found = dict(plugged_layers(module))
    assert found
    for path, plugged in found.items():
        assert path.endswith(layer)
        assert kept(plugged.weight, axis, 4) == [2]


def test_mixed_patterns_on_a_vit_with_fused_qkv():
    vit = timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, img_size=16, patch_size=8, num_classes=4
    )
    module = sparse(
        vit, torch.randn(4, 3, 16, 16), include={"*.mlp.*": "1:8", "*.attn.qkv": "2:4"}, recipe="mdgf_exponential"
    )
    for path, layer in plugged_layers(module):
        assert kept(layer.weight, 1, 8 if ".mlp." in path else 4) == ([1] if ".mlp." in path else [2]), path
    assert not any(path.endswith("attn.proj") for path, _ in plugged_layers(module))


@pytest.mark.parametrize("name", ["resnext26ts", "regnety_002"])
def test_grouped_convolutions_are_grouped_inside_their_groups(name):
    model = timm.create_model(name, num_classes=4)
    module = sparse(model, torch.randn(2, 3, 32, 32), n=2, m=8, recipe="nm_oneshot", indivisible="skip")
    grouped = [layer for _, layer in plugged_layers(module) if layer.groups > 1]
    assert grouped
    for layer in grouped:
        assert kept(layer.weight, 1, 8) == [2]


def test_groups_too_narrow_for_m_are_left_out_with_the_reason():
    selection = NMSparsity(2, 16, indivisible="skip").technique.attach(timm.create_model("regnety_002"))
    assert any(choice.note.startswith("grouped convolution with 8 input channels") for choice in selection.choices)


def test_experts_are_listed_and_chosen_by_name():
    model = AutoModelForCausalLM.from_config(MOE["mixtral"])
    names = [c.name for c in select(model).taken]
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert [c.name for c in select(model, ["*.down_proj"]).taken] == [
        f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)
    ]
