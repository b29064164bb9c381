"""Sparse models of timm and transformers: trained through the Trainer, saved and loaded by their own libraries."""

import pytest
import timm
import torch
from tiny_models import GPT2, LLAMA, train
from transformers import AutoModelForCausalLM

from lightning_lossplug.callbacks import NMSparsity
from lightning_lossplug.surgery import fold, latent, plugged_layers


def sparse(model, batch, **options):
    return train(model, batch, NMSparsity(**options))


@pytest.mark.parametrize(
    ("config", "layer", "axis"), [(LLAMA, "model.layers.0.mlp.up_proj", 1), (GPT2, "transformer.h.0.mlp.c_fc", 0)]
)
def test_transformers_saves_and_loads_what_it_knows(config, layer, axis, tmp_path):
    module = sparse(
        AutoModelForCausalLM.from_config(config), torch.randint(0, 64, (2, 8)), n=1, m=4, include=["*.mlp.*"]
    )
    weight = module.model.get_submodule(layer).weight.detach()
    groups = weight.movedim(axis, -1).reshape(-1, 4)
    assert torch.equal((groups != 0).sum(1), torch.ones(len(groups), dtype=torch.long))
    # Saving the plugged model in mid-training keeps every weight under its own key, tied embeddings included.
    module.model.save_pretrained(tmp_path / "plugged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plugged")
    assert torch.equal(plain.get_submodule(layer).weight, latent(module.model.get_submodule(layer)))
    # Folding first gives the exact zeros.
    fold(module).model.save_pretrained(tmp_path / "folded")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(plain.get_submodule(layer).weight, weight)
    ids = torch.randint(0, 64, (1, 8))
    module.eval()
    assert torch.allclose(plain.eval()(ids).logits, module.model(ids).logits, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t", "mobilenetv3_small_050"])
def test_timm_models_of_three_kinds(name):
    vit = name.startswith("vit")
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8} if vit else {}
    model = timm.create_model(name, num_classes=10, **options)
    module = sparse(model, torch.randn(4, 3, 32, 32), n=2, m=4, indivisible="skip")
    layers = list(plugged_layers(module))
    assert layers
    for path, layer in layers:
        kept = (layer.weight != 0).movedim(1, -1).reshape(-1, 4).sum(1)
        assert int(kept.max()) <= 2, path
    plain = fold(module)
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(plain.eval().model(x), module.eval().model(x), atol=1e-5)
    twin = timm.create_model(name, num_classes=10, **options)
    twin.load_state_dict(plain.model.state_dict(), strict=True)


def test_groups_of_a_convolution_run_over_its_input_channels():
    module = sparse(timm.create_model("resnet10t", num_classes=10), torch.randn(2, 3, 32, 32), n=1, m=4)
    conv = dict(plugged_layers(module))["model.layer1.0.conv1"]
    assert conv.weight.shape[1:] == (64, 3, 3)
    per_position = (conv.weight != 0).reshape(64, 16, 4, 3, 3).sum(2)
    assert torch.equal(per_position, torch.ones_like(per_position))
