"""Folders in the layout of compressed-tensors: codes, words, schemes; loaded by transformers where it can be."""

import importlib.util
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.integrations.compressed import save_compressed
from lightning_lossplug.quantization import QATSettings, QATTechnique
from lightning_lossplug.surgery import fold

TOKENS = torch.arange(12)[None]


def trained(bits_w, bits_a, **settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    technique = QATTechnique(QATSettings(bits_w, bits_a, first_last_bits=None, **settings))
    technique.attach(model)
    with torch.no_grad():
        model.train()(TOKENS)
    return model.eval()


CASES = {
    "w4 groups": (4, None, {"granularity": "group", "group_size": 32}, "pack-quantized"),
    "w4 channels": (4, None, {}, "pack-quantized"),
    "w2": (2, None, {"granularity": "tensor", "weight": "lsq"}, "pack-quantized"),
    "w8a8": (8, 8, {}, "int-quantized"),
    "dynamic": (8, 8, {"activation": "dynamic"}, "int-quantized"),
    "mixed": (8, 8, {"include": {"*.mlp.*": "w4a8", "*.self_attn.*": "w8a8"}}, "mixed-precision"),
}


def unpacked(tensors, name):
    scale = tensors[f"{name}.weight_scale"]
    if f"{name}.weight" in tensors:
        codes = tensors[f"{name}.weight"].float()
    else:
        words = tensors[f"{name}.weight_packed"].view(torch.uint8)
        codes = torch.stack([words & 15, words >> 4], -1).flatten(1).float() - 8
        assert list(codes.shape) == tensors[f"{name}.weight_shape"].tolist()
    return codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)


@pytest.mark.parametrize("case", CASES)
def test_the_folder_holds_the_trained_weights(case, tmp_path):
    bits_w, bits_a, settings, form = CASES[case]
    model = trained(bits_w, bits_a, **settings)
    config = save_compressed(model, tmp_path / "a")
    assert config["format"] == form
    assert config["ignore"] == ["lm_head"]
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "compressed-tensors"
    assert written["architectures"] == ["LlamaForCausalLM"]
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    for name, layer in fold(model).named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            assert torch.equal(unpacked(tensors, name), layer.weight)
            assert (f"{name}.input_scale" in tensors) == (bits_a is not None and case != "dynamic")
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert (inputs or {}).get("dynamic", False) == (case == "dynamic")


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_the_trained_model_does(case, tmp_path):
    if importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("needs the package compressed-tensors")
    bits_w, bits_a, settings, _ = CASES[case]
    model = trained(bits_w, bits_a, **settings)
    save_compressed(model, tmp_path / "a")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    with torch.no_grad():
        want, got = model(TOKENS).logits, loaded(TOKENS).logits
    tolerance = 1e-5 if bits_a is None else 0.02  # a value between two codes may go either way
    assert (got - want).abs().max() <= tolerance * (want.max() - want.min())
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, fold(model).model.layers[0].mlp.up_proj.weight)


def test_what_has_no_form_is_refused(tmp_path):
    with pytest.raises(LossplugError, match="Linear is no transformers model"):
        save_compressed(nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(LossplugError, match=r"q_proj: its input has codes from -4 to 3\. Use 8 or 4 bits"):
        save_compressed(trained(4, 3), tmp_path / "a")
    with pytest.raises(LossplugError, match="binarydm has no symmetric codes of 8 bits or fewer"):
        save_compressed(trained(2, None, weight="binarydm"), tmp_path / "a")
    with pytest.raises(LossplugError, match="the model has no quantised layer"):
        save_compressed(fold(trained(4, None)), tmp_path / "a")
    assert not (tmp_path / "a").exists()
