"""``lossplug evaluate``: the same numbers from a checkpoint and from its export."""

import json
from pathlib import Path

import pytest
import torch
from commands import DATA

from lightning_lossplug.callbacks import read_checkpoint
from lightning_lossplug.cli.evaluate import split_data
from lightning_lossplug.integrations import DigitsData
from lightning_lossplug.integrations.network import rebuild_module

QUICK = ["--latency-rounds", "2"]


def test_checkpoint_and_artifact_side_by_side(cli, checkpoint, artifact):
    done = cli("evaluate", checkpoint, artifact, "--json", "out.json", *QUICK)
    assert done.code == 0, done
    results = json.loads(Path("out.json").read_text())
    one, two = results["results"]
    assert results["data"] == "DigitsData"
    same = ("accuracy", "calibration_error", "nll", "parameters", "nonzero", "sparsity", "bytes", "nominal_bytes")
    assert [one[key] for key in same] == [two[key] for key in same]
    assert one["latency_ratio"] == 1.0
    assert two["latency_ms"] > 0
    assert "accuracy" in done.out
    manifest = json.loads((artifact / "lossplug.json").read_text())
    assert (one["nonzero"], one["nominal_bytes"]) == (manifest["nonzero"], manifest["nominal_bytes"])


def test_the_metrics_are_right(cli, checkpoint):
    found = json.loads(cli("evaluate", checkpoint, "--json", "-", *QUICK).out)["results"][0]
    module = rebuild_module(read_checkpoint(checkpoint), "")
    from lightning_lossplug.callbacks import load_plugged

    load_plugged(module, checkpoint).eval()
    data = DigitsData(train_limit=128)
    data.setup("test")
    with torch.inference_mode():
        logits, labels = zip(*((module(x), y) for x, y in data.test_dataloader()), strict=True)
    logits, labels = torch.cat(logits), torch.cat(labels)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert found["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_data_by_name(cli, artifact):
    done = cli("evaluate", artifact, *DATA, "--data.batch_size", "100", "--limit-batches", "2", "--json", "-", *QUICK)
    assert done.code == 0, done
    assert json.loads(done.out)["batches"] == 2


def test_data_arguments_are_split_off():
    assert split_data(["a", "--data", "X", "--data.k=1", "b", "--data.l", "2"]) == (
        ["--data", "X", "--data.k=1", "--data.l", "2"],
        ["a", "b"],
    )


MISTAKES = {
    "nothing there": (["nope.ckpt"], "there is no such checkpoint file"),
    "no data": (["ARTIFACT"], "Add --data NAME"),
    "data name": (["ARTIFACT", "--data", "DigitData"], "Did you mean 'DigitsData'"),
    "data key": (["ARTIFACT", "--data", "DigitsData", "--data.batchsize", "3"], "Did you mean 'batch_size'"),
    "other data": (["ARTIFACT", "--data=TextData", "--data.tokenizer=bytes"], "Choose the data it was trained on"),
    "json folder": (["CHECKPOINT", "--json", "nowhere/x.json"], "can't write there"),
    "json on an input": (["CHECKPOINT", "--json", "CHECKPOINT"], "not to be written"),
    "device": (["CHECKPOINT", "--device", "tpu"], "there is no device 'tpu'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(mistake, checkpoint, artifact, name):
    arguments, words = MISTAKES[name]
    known = {"CHECKPOINT": str(checkpoint), "ARTIFACT": str(artifact)}
    assert words in mistake("evaluate", *(known.get(a, a) for a in arguments))


def test_broken_artifacts(mistake, artifact):
    folder = Path.cwd().parent / "broken"
    folder.mkdir()
    assert "no readable config.json" in mistake("evaluate", folder, *DATA)
    (folder / "config.json").write_bytes((artifact / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes((artifact / "model.safetensors").read_bytes()[:3000])
    assert "the artifact can't be loaded" in mistake("evaluate", folder, *DATA)


def test_a_language_model(cli):
    config = (
        "{model_type: llama, vocab_size: 256, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, "
        "num_attention_heads: 2, num_key_value_heads: 1, tie_word_embeddings: true}"
    )
    done = cli(
        *("fit", "--model=CausalLM", f"--model.from_config={config}", "--data=TextData", "--data.tokenizer=bytes"),
        *(
            "--data.block_size=32",
            "--trainer.max_steps=2",
            "--trainer.accelerator=cpu",
            "--trainer.limit_val_batches=0",
        ),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        *("--trainer.callbacks+=NMSparsity", "--trainer.callbacks.include=['*.mlp.*']"),
    )
    assert done.code == 0, done
    saved = "lossplug_runs/version_0/checkpoints/last.ckpt"
    assert cli("export", saved, "--output", "out").code == 0
    done = cli("evaluate", saved, "out", "--limit-batches", "2", "--json", "-", *QUICK)
    assert done.code == 0, done
    one, two = json.loads(done.out)["results"]
    assert one["perplexity"] == pytest.approx(two["perplexity"], rel=1e-6)
    assert one["perplexity"] == pytest.approx(torch.tensor(one["nll"], dtype=torch.float64).exp().item())
    assert one["sparsity"] == two["sparsity"] > 0.15
