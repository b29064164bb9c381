"""The scripts about KV caches run on a small model."""

import json

import kv_caches
import kv_smollm2
import kv_training
import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(folder)
    return str(folder)


def test_every_row_is_found_and_calibration_happens_once(model, tmp_path, capsys):
    output = tmp_path / "kv.json"
    small = ["--tokenizer", "bytes", "--blocks", "4", "--windows", "1", "--length", "64", "--steps", "2"]
    command = ["--output", str(output), "--model", model, "--device", "cpu", *small]
    kv_smollm2.main([*command, "--rows", "dense", "80 %"])
    kv_smollm2.main(command)
    assert capsys.readouterr().out.count("calibration on 4 x 64 tokens") == 1
    results = {r["run"]["kind"] + json.dumps(r["run"]["settings"]): r["result"] for r in json.loads(output.read_text())}
    assert len(results) == len(kv_smollm2.ROWS)
    rows = {row: results[kind + json.dumps(settings)] for row, (kind, settings) in kv_smollm2.ROWS.items()}
    closed, start, trained = (rows[f"80 %, {name}"] for name in ("closed form alone", "ASVD", "ASVD, 1000 steps"))
    for error in ("k_error", "v_error"):
        assert closed[error] <= trained[error] + 1e-6 <= start[error] + 2e-6
    assert "| 80 %, window 128 |" in output.with_suffix(".md").read_text()


def test_training_ends_above_the_closed_form(model, tmp_path, capsys):
    output = tmp_path / "training.json"
    small = ["--model", model, "--tokenizer", "bytes", "--blocks", "4", "--length", "64", "--layers", "0", "2"]
    command = ["--output", str(output), "--moments", str(tmp_path / "moments.pt"), *small]
    kv_training.main([*command, "--budgets", "300:1e-2", "20:5e-5"])
    for found in json.loads(output.read_text()).values():
        assert found["closed form"] <= found["300 steps at 0.01"] + 1e-9
        assert found["300 steps at 0.01"] < found["20 steps at 5e-05"] < found["ASVD"]
    assert "4 projections" in capsys.readouterr().out


def test_caches_beside_each_other(model, tmp_path):
    output = tmp_path / "caches.json"
    small = ["--tokenizer", "bytes", "--blocks", "4", "--windows", "2", "--length", "64", "--prefill", "56"]
    own = ["DynamicCache", "codes of a half", kv_caches.CODES, "codes of a fifth, 4 bits", "KIVI, 4 bits"]
    command = ["--output", str(output), "--moments", str(tmp_path / "moments.pt"), "--model", model, *small]
    kv_caches.main([*command, "--dtype", "float32", "--rows", *own])
    done = json.loads(output.read_text())
    assert list(done) == own
    assert done["DynamicCache"]["bytes"] == 3 * 2 * 2 * 2 * 63 * 16 * 4  # layers, keys and values, rows, heads
    shares = [done[name]["share"] for name in own[:4]]
    assert shares == sorted(shares, reverse=True)
    assert output.with_suffix(".png").stat().st_size > 1000
    whole = kv_caches.decode(*dense(model))[0]
    assert done["DynamicCache"]["perplexity"] == pytest.approx(whole, rel=1e-4)


def dense(model):
    loaded, _, test = kv_caches.loaded(model, "bytes")
    ids = torch.cat(kv_caches.spread(test, 2, 64))
    return loaded, transformers.DynamicCache(config=loaded.config), ids, 56
