"""Quantised models of timm and transformers: trained through the Trainer, folded, loaded by their own libraries."""

import pytest
import timm
import torch
from tiny_models import GPT2, LLAMA, train
from transformers import AutoModelForCausalLM

from lightning_lossplug.callbacks import QAT
from lightning_lossplug.integrations.artifact import export_artifact
from lightning_lossplug.quantization import integer_model
from lightning_lossplug.quantization.integer import IntegerLayer
from lightning_lossplug.surgery import plugged_layers, transform_of


def quantised(model, batch, **options):
    return train(model, batch, QAT(**options), lr=1e-3).eval()


@pytest.mark.parametrize(
    ("config", "layer", "shape"),
    [(LLAMA, "model.layers.0.mlp.up_proj", (32, 1)), (GPT2, "transformer.h.0.mlp.c_fc", (1, 64))],
)
def test_transformers_loads_the_folded_weights(config, layer, shape, tmp_path):
    module = quantised(AutoModelForCausalLM.from_config(config), torch.randint(0, 64, (2, 8)), bits_w=4, bits_a=8)
    plugged = module.model.get_submodule(layer)
    assert transform_of(plugged, "quantization").quantizer.s.shape == shape  # one step per output
    weight = plugged.weight.detach()
    assert all(row.unique().numel() <= 16 for row in (weight if shape[1] == 1 else weight.T))
    names = {name for name, _ in plugged_layers(module.model)}
    assert not any("lm_head" in name or "embed" in name for name in names)  # tied: left as they are
    callback = QAT(bits_w=4, bits_a=8)
    callback.technique.fold(module).model.save_pretrained(tmp_path / "folded")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(plain.get_submodule(layer).weight, weight)


def assert_layers_agree(model, integers, batch):
    """Every integer layer, given what the fake-quantised one gets, returns the same to 1e-5 of its output's range."""
    compared = []

    def compare(path):
        def hook(layer, args, output):
            difference = (integers.get_submodule(path)(*args) - output).abs().max()
            assert difference <= 1e-5 * (output.max() - output.min()), path
            compared.append(path)

        return hook

    paths = [p for p, layer in integers.named_modules() if isinstance(layer, IntegerLayer)]
    handles = [model.get_submodule(p).register_forward_hook(compare(p)) for p in paths]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    assert paths
    assert set(compared) == set(paths)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_timm_models_train_and_become_integers(name, tmp_path):
    options = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=10, **options)
    batch = torch.randn(4, 3, 32, 32)
    module = quantised(model, batch, bits_w=8, bits_a=8)
    export_artifact(module, tmp_path / "folded")
    plain = timm.create_model(f"local-dir:{tmp_path / 'folded'}", pretrained=True)
    for path, layer in plugged_layers(module.model):
        assert torch.equal(plain.get_submodule(path).weight, layer.weight)
    made, left = integer_model(module)
    assert not left
    with torch.no_grad():
        want, got = module.model(batch), made.model(batch)
    # A rounding error of a layer moves a value between two codes of the next: the whole model is as near as its steps.
    assert (want - got).abs().max() <= 1e-2 * (want.max() - want.min())
    assert_layers_agree(module.model, integer_model(module, fuse=False)[0].model, batch)
