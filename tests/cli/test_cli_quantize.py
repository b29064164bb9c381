"""``lossplug quantize`` on a tiny model with a tokenizer of bytes."""

import json

import pytest
import torch

from lightning_lossplug.integrations.packed import load_packed
from lightning_lossplug.integrations.pretrained import load_causal_lm
from lightning_lossplug.quantization import IntegerLayer

SMALL = ("--block-size", 32, "--tokens", 256)


def test_packed_file_holds_what_was_measured(cli, language_model, text, tmp_path):
    code, out, err = cli(
        "quantize", language_model, "--text", text,
        "--bits", "w4a8", "--migrate", "smoothquant", "-o", tmp_path / "q", *SMALL,
        "--evaluate", 2, "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert len(found["layers"]) == 21
    assert found["calibration"] == "256 tokens"
    assert found["bytes"] < found["float_bytes"] / 6
    assert all(layer["error"] <= layer["nearest_error"] * 1.2 for layer in found["layers"].values())
    net = load_packed(load_causal_lm(str(language_model)), tmp_path / "q" / "quantized.safetensors")
    tokens = torch.tensor([3 + i for i in range(32)])[None]
    assert net(input_ids=tokens).logits.isfinite().all()
    assert 0.5 < found["metrics"]["perplexity"] / found["float_metrics"]["perplexity"] < 2
    assert json.loads((tmp_path / "q" / "quantization.json").read_text()) == found


def test_inputs_per_token(cli, language_model, text, tmp_path):
    code, out, err = cli(
        "quantize", language_model, "--text", text, "--method", "rtn", "--bits", "w8a8", "--per-token",
        "-o", tmp_path / "q", *SMALL, "--evaluate", 2,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "8 bits, 8 bits, a step per token" in " ".join(out.replace("│", " ").split())
    net = load_packed(load_causal_lm(str(language_model)), tmp_path / "q" / "quantized.safetensors")
    layers = [layer for layer in net.modules() if isinstance(layer, IntegerLayer)]
    assert len(layers) == 21
    assert all(layer.dynamic for layer in layers)
    found = json.loads((tmp_path / "q" / "quantization.json").read_text())
    assert abs(found["metrics"]["perplexity"] / found["float_metrics"]["perplexity"] - 1) < 0.02


def test_dense_folder_loads_in_transformers(cli, language_model, text, tmp_path):
    import transformers

    code, out, err = cli(
        "quantize", language_model, "--text", text,
        "--method", "adaround", "--set", "iters=5", "--bits", 4, "--group-size", 16,
        "-o", tmp_path / "q", *SMALL, "--dense",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "rounded to nearest" in out
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    weight = net.model.layers[0].mlp.up_proj.weight.detach().reshape(64, 2, 16)
    assert max(len(group.unique()) for row in weight for group in row) <= 15


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "w9"], "bits is 9.0, allowed is 2 to 8"),
        (["--bits", "x4"], "'x4' says no bits"),
        (["--bits", "a8"], "'a8' says no bits of weights"),
        (["--per-token"], "'w4' says no bits of inputs"),
        (["--method", "gptk"], "unknown post_training 'gptk'. Did you mean 'gptq'"),
        (["--method", "smoothquant"], "smoothquant rounds nothing"),
        (["--migrate", "gptq"], "gptq moves no outliers"),
        (["--set", "damp=-1"], "damp is -1, allowed is [0, inf]"),
        (["--set", "dampp=1"], "has no parameter 'dampp'"),
        (["--group-size", "5"], "group_size 5 does not divide"),
        (["--include", "*.nothing"], "matches no layer"),
        (["--block-size", "4096"], "one block of 4096"),
        (["--device", "tpu"], "there is no device 'tpu'"),
        (["--metod", "rtn"], "unknown option --metod. Did you mean '--method'"),
    ],
)
def test_mistakes_are_one_line(mistake, language_model, text, arguments, words, tmp_path):
    assert words in mistake("quantize", language_model, "--text", text, "-o", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_checkpoint_and_data_module(cli, mistake, checkpoint, tmp_path):
    code, out, err = cli(
        "quantize", checkpoint, "--data", "DigitsData", "--bits", "w4a8", "--method", "adaround", "--set", "iters=20",
        "--samples", 64, "--evaluate", 2, "-o", tmp_path / "q", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["calibration"] == "64 samples"
    assert abs(found["metrics"]["accuracy"] - found["float_metrics"]["accuracy"]) < 0.2
    assert (tmp_path / "q" / "quantized.safetensors").is_file()
    assert "either text or data" in mistake("quantize", checkpoint, "-o", tmp_path / "r")


def test_nan_during_calibration_names_the_layer(mistake, language_model, text, tmp_path):
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(language_model)
    with torch.no_grad():
        net.model.layers[1].input_layernorm.weight[3] = float("nan")
    net.save_pretrained(tmp_path / "broken")
    transformers.AutoTokenizer.from_pretrained(language_model).save_pretrained(tmp_path / "broken")
    line = mistake("quantize", tmp_path / "broken", "--text", text, "-o", tmp_path / "out", *SMALL)
    assert "model.layers.1.self_attn.q_proj: " in line
    assert "of the calibration inputs are NaN or infinite" in line


def test_models_by_kind_and_name(cli, mistake, artifact, language_model, text, tmp_path):
    code, out, err = cli(
        "quantize", f"timm:local-dir:{artifact}", "--data", "DigitsData", "--bits", "w4", "--method", "rtn",
        "--samples", 32, "-o", tmp_path / "q",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert f'load_packed(timm.create_model("local-dir:{artifact}")' in out
    assert (tmp_path / "q" / "quantized.safetensors").is_file()
    code, out, err = cli(
        "quantize", f"hf:{language_model}", "--text", text, "--bits", "w8", "-o", tmp_path / "r", *SMALL
    )
    assert (code, err) == (0, "")
    to = ("-o", tmp_path / "s")
    assert "Give one, or timm:NAME or hf:NAME" in mistake("quantize", "resnet18", "--data", "DigitsData", *to)
    assert "timm has no model 'resnett18'" in mistake("quantize", "timm:resnett18", "--data", "DigitsData", *to)
    assert "--text calibrates language models" in mistake("quantize", "timm:resnet18", "--text", text, *to)


def test_data_of_another_shape_is_one_line(mistake, artifact, tmp_path):
    line = mistake("quantize", artifact, "--data", "TextData", "--data.tokenizer=bytes", "-o", tmp_path / "s")
    assert "can't compute a batch of TextData" in line
