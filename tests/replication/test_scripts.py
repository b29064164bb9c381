"""The evidence scripts run, resume and mean what they say; the evidence itself takes a GPU and their own commands."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import calibration
import common
import compressed_gradients
import distillation_smollm2
import distillation_vision
import gaqat_domains
import golden_smollm2
import golden_vision
import label_noise
import long_tail
import nm_recipes
import nm_smollm2
import number_text
import probability
import pytest
import qat_bits
import qat_smollm2
import runner
import scoring
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lossplug.losses import create

TINY = ["--device", "cpu", "--width", "2", "--epochs", "1", "--seeds", "0", "--batch", "64"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Handwritten digits in the files and the size of Fashion-MNIST."""
    folder, digits = tmp_path_factory.mktemp("idx"), load_digits()
    images = F.interpolate(torch.tensor(digits.images)[:, None] * 15.9, size=28).to(torch.uint8)
    for part, rows in (("train", slice(0, 1200)), ("t10k", slice(1200, 1797))):
        x, y = images[rows], digits.target[rows].astype("uint8")
        header = struct.pack(">4B3I", 0, 0, 8, 3, len(x), 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + x.numpy().tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, len(y)) + y.tobytes())
    return str(folder)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "results.json"


def records(output):
    return json.loads(output.read_text())


def test_flipped_labels_are_as_many_as_asked_and_all_wrong():
    y = torch.arange(10).repeat(1000)
    flipped = label_noise.flip_symmetric(y, 0.4, seed=3)
    assert (flipped != y).sum() == 4000
    assert set(flipped.tolist()) == set(range(10))
    moved = ((flipped - y) % 10)[flipped != y].bincount(minlength=10)
    assert moved[0] == 0
    assert moved[1:].min() > 350
    assert torch.equal(flipped, label_noise.flip_symmetric(y, 0.4, seed=3))
    assert not torch.equal(flipped, label_noise.flip_symmetric(y, 0.4, seed=4))


def test_long_tail_counts():
    y = torch.arange(10).repeat(500)
    kept, counts = long_tail.long_tail(y, 100.0, seed=0)
    assert torch.equal(y[kept].bincount(minlength=10), counts)
    assert len(kept.unique()) == len(kept)
    assert counts.max() == 500
    assert counts.min() == 5
    steps = counts.double().sort().values.log().diff()
    torch.testing.assert_close(steps, torch.full((9,), 100.0).log().double() / 9, atol=0.1, rtol=0)


def test_temperature_is_found():
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(20000, 5, generator=generator)
    y = torch.multinomial(z.softmax(1), 1, generator=generator).squeeze(1)
    assert scoring.temperature(3.0 * z, y) == pytest.approx(3.0, rel=0.05)
    before, after = scoring.scores(3.0 * z, y), scoring.scores(z, y)
    assert after["ece"] < 0.02 < before["ece"]
    assert after["accuracy"] == before["accuracy"]


def test_two_class_error_is_that_of_the_second_class():
    z = torch.tensor([[0.0, 2.0]]).repeat(100, 1)
    y = torch.tensor([1, 0]).repeat(50)
    assert scoring.scores(z, y)["ece"] == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item() - 0.5, abs=1e-5)


def test_curve_is_that_of_the_epoch_just_trained(root):
    parts = common.fashion_mnist(root, None, "cpu")
    run = {"loss": "gce", "parameters": {}, "lr": 1e-3, "width": 2, "epochs": 2, "batch": 64, "seed": 0}
    module, curve = common.train_classifier(run, parts["train"], parts["test"], "cpu")
    x, y = parts["test"]
    right = (common.predict(module, x).argmax(1) == y).float().mean()
    assert len(curve) == 2
    assert curve[-1]["accuracy"] == pytest.approx(right.item(), abs=1e-6)


def test_batches_visit_every_sample_once_in_a_new_order():
    x = torch.arange(100)
    batches = common.Batches(x, x, 20, seed=0)
    first, second = (torch.cat([index for _, _, index in batches]) for _ in range(2))
    assert torch.equal(first.sort().values, x)
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat([y for _, y, _ in common.Batches(x, x, 30)]), x)


@pytest.mark.parametrize("table", [label_noise.LOSSES, long_tail.METHODS], ids=["label_noise", "long_tail"])
def test_every_method_has_four_settings_that_its_loss_takes(table):
    for loss, grid in table.values():
        assert len({runner.key(setting) for setting in grid}) == 4
        for setting in grid:
            parameters = {name: value for name, value in setting.items() if name not in ("lr", "power")}
            if "dataset_size" in parameters:
                parameters["dataset_size"] = 10
            create(loss, **parameters)


def test_label_noise(root, output):
    losses = ["CE", "NCE+RCE", "ALDR-KL, table"]
    command = ["--root", root, "--output", str(output), *TINY, "--noise", "0.4", "--losses", *losses]
    label_noise.main(command)
    done = records(output)
    assert 4 * 3 + 3 <= len(done) <= 4 * 3 + 3 + 3  # trials, published settings, and the chosen ones that differ
    text = output.with_suffix(".md").read_text()
    assert "tuned, 4 trials per loss" in text
    assert all(f"| {name} |" in text for name in losses)
    label_noise.main(command)
    assert records(output) == done


def test_calibration(root, output):
    calibration.main(["--root", root, "--output", str(output), *TINY, "--calibrator-epochs", "2"])
    rows = output.with_suffix(".md").read_text()
    assert "CE: calibrator: correctness_aware |" in rows
    plain = next(r["result"] for r in records(output) if r["run"]["loss"] is None)
    assert len({round(row["accuracy"], 6) for row in plain.values()}) == 1  # no calibrator moves a prediction


def test_probability(root, output):
    probability.main(["--root", root, "--output", str(output), *TINY, "--cape-epochs", "2"])
    rows = records(output)[0]["result"]
    assert rows["CaPE, bin, k=5, last epoch"] != rows["CE continued, last epoch"]
    assert rows["CaPE, kde, k=5, last epoch"] != rows["CaPE, bin, k=5, last epoch"]


def test_long_tail(root, output):
    methods = ["CE", "CE, class weights", "ALDR-KL"]
    long_tail.main(["--root", root, "--output", str(output), *TINY, "--methods", *methods, "--ratio", "10"])
    assert all(f"| {name} |" in output.with_suffix(".md").read_text() for name in methods)


def test_number_text(output):
    small = ["--copies", "1", "--batch", "16", "--epochs", "3", "--tasks", "diabetes"]
    number_text.main(["--output", str(output), *TINY, *small])
    results = [r["result"] for r in records(output)]
    assert len(results) == len(number_text.LOSSES)
    assert len({r["last_mae"] for r in results}) > 1


@pytest.mark.parametrize("task", number_text.TASKS)
def test_sentences_keep_people_apart_and_read_back(task):
    parts = number_text.sentences(task, 0, 2)
    if task != "sums":
        numbers = {part: len(own[1]) for part, own in parts.items()}
        people = {"diabetes": 442, "cells": 569 * 2}[task]
        assert numbers["test"] + numbers["val"] + numbers["train"] // 2 == people
    else:
        text, number = parts["test"][0][0], parts["test"][1][0]
        assert sum(int(word) for word in text.split() if word.isdigit()) == number
    _, whole, numbers = number_text.tensors(*parts["test"], 4, "cpu")
    read = ["".join(number_text.ALPHABET[i] for i in row[-4:]) for row in whole.tolist()]
    assert [int(number) for number in read] == numbers.tolist()


def test_a_failed_run_stops_no_other(tmp_path):
    arguments = runner.parse("", ["--output", str(tmp_path / "r.json"), "--device", "cpu"], 1)
    with pytest.raises(RuntimeError, match="1 of 3 runs failed"):
        runner.run_all(inverse, [{"n": 1}, {"n": 0}, {"n": 2}], arguments)
    assert [r["result"]["value"] for r in records(tmp_path / "r.json")] == [1.0, 0.5]
    with pytest.raises(RuntimeError, match="1 of 1 runs failed"):  # the two that are there aren't done again
        runner.run_all(inverse, [{"n": 1}, {"n": 0}, {"n": 2}], arguments)


def inverse(run, root, device):
    return {"value": 1 / run["n"]}


@pytest.mark.slow
def test_processes(root, output):
    script = Path(__file__).with_name("label_noise.py")
    few = ["--noise", "0.4", "--protocols", "published", "--losses", "CE", "GCE", "--limit", "200", "--jobs", "2"]
    command = [sys.executable, str(script), "--root", root, "--output", str(output), *TINY, *few]
    subprocess.run(command, check=True, timeout=300)
    assert len(records(output)) == 2


def test_recipes_end_with_their_zeros(root, output):
    own = ["--patterns", "1:8", "--recipes", "SR-STE", "MdGf-Exponential", "--depth", "1", "--limit", "400"]
    nm_recipes.main(["--root", root, "--output", str(output), *own, *TINY, "--width", "32"])
    results = {r["run"]["recipe"]: r["result"] for r in records(output)}
    assert set(results) == {None, "nm_srste", "mdgf_exponential"}
    assert all(0 < results["nm_srste"][name] < 1 for name in ("kept_mass", "accuracy"))
    assert len(results["nm_srste"]["flips"]) == 10
    assert results["nm_srste"]["zeros"] == pytest.approx(0.875)
    assert results["mdgf_exponential"]["zeros"] == pytest.approx(0.875)
    assert "1:8 in mlp, last epoch" in output.with_suffix(".md").read_text()


def test_perplexity_rows_are_sparse_and_equal_in_steps(tmp_path, output):
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **size)).save_pretrained(tmp_path / "llama")
    own = ["--model", str(tmp_path / "llama"), "--tokenizer", "bytes", "--steps", "4", "--block", "64", "--lr", "1e-2"]
    rows = ["dense, as it comes", "pruned, Wanda", "dense", "SR-STE, Wanda", "MdGf-Linear"]
    nm_smollm2.main(
        [*own, "--output", str(output), "--seeds", "0", "--test-blocks", "8", "--device", "cpu", "--rows", *rows]
    )
    results = [r["result"] for r in records(output)]
    assert [round(r["zeros"], 3) for r in results] == [0, 0.5, 0, 0.5, 0.5]
    start, _, *trained = [r["perplexity"] for r in results]
    assert 200 < start < 300
    assert max(trained) < start
    assert "| MdGf-Linear | 4 steps |" in output.with_suffix(".md").read_text()


def test_quantised_rows_start_above_the_dense_model_and_learn(tmp_path, output):
    size = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **size)).save_pretrained(tmp_path / "llama")
    own = ["--model", str(tmp_path / "llama"), "--tokenizer", "bytes", "--steps", "4", "--block", "64", "--lr", "1e-2"]
    qat_smollm2.main([*own, "--output", str(output), "--seeds", "0", "--test-blocks", "4", "--device", "cpu"])
    results = {name: r["result"] for name, r in zip(qat_smollm2.ROWS, records(output), strict=True)}
    assert all(r["perplexity"] < r["start"] for r in results.values())
    assert len({r["start"] for r in results.values()}) == len(results)
    assert abs(results["W8A8, a step per token"]["start"] / results["dense"]["start"] - 1) < 1e-3
    assert "| W4, MXFP4 |" in output.with_suffix(".md").read_text()


def test_perplexity_is_that_of_the_mean_loss():
    class Model(torch.nn.Module):
        def forward(self, input_ids, labels):
            return type("Output", (), {"loss": input_ids.float().mean()})()

    assert nm_smollm2.perplexity(Model(), torch.tensor([[1], [2], [6]]), 2) == pytest.approx(torch.tensor(3.0).exp())


def test_students_and_teachers(root, output):
    methods = ["alone", "DOT (KD, delta 0.075)", "DHKD, nonlinear, aligned", "BD-KD"]
    own = ["--methods", *methods, "--limit", "300", "--times", "2"]
    distillation_vision.main(["--root", root, "--output", str(output), *TINY, *own])
    results = {r["run"]["method"]: r["result"] for r in records(output)}
    assert set(results) == set(methods)
    assert len({r["student nll"] for r in results.values()}) == len(methods)
    assert results["alone"]["teacher nll"] == results["DOT (KD, delta 0.075)"]["teacher nll"]  # one frozen teacher
    assert all(f"| {name} |" in output.with_suffix(".md").read_text() for name in methods)


def test_dropped_layers_and_their_recovery(output, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    small = ["--steps", "3", "--block", "16", "--keep", "2", "--tests", "2", "--batch", "2", "--seeds", "0"]
    command = ["--model", str(tmp_path / "model"), "--tokenizer", "bytes", "--device", "cpu", *small]
    distillation_smollm2.main(["--output", str(output), *command])
    results = {r["run"]["method"]: r["result"] for r in records(output)}
    assert set(results) == set(distillation_smollm2.METHODS)
    assert len({r["perplexity"] for r in results.values()}) == len(results)
    assert results["BD-KD"]["teacher perplexity"] != results["BD-KD"]["teacher before"]
    assert "96 tokens, test text" in output.with_suffix(".md").read_text()


def test_gaqat_domains(root, output):
    own = ["--bits", "4", "--held-out", "inversion", "--qat-epochs", "1", "--window", "8", "--batch", "48"]
    gaqat_domains.main(["--root", root, "--output", str(output), *TINY[:-2], *own])
    results = {r["run"]["method"]: r["result"] for r in records(output)}
    assert set(results) == set(gaqat_domains.METHODS)
    assert results["GAQAT"]["frozen"] == pytest.approx(0.2, abs=0.02)
    assert results["LSQ+SAGM"]["frozen"] == 0
    assert "| GAQAT |" in output.with_suffix(".md").read_text()


def test_everything_together_and_one_by_one(root, output):
    rows = ["plain", "together", "one after the other, one schedule"]
    own = ["--rows", *rows, "--limit", "128", "--epochs", "4", "--width", "32", "--depth", "1"]
    command = ["--root", root, "--output", str(output), *TINY, *own]
    golden_vision.main(command)
    results = {r["run"]["row"]: r["result"] for r in records(output)}
    for row in rows[1:]:
        assert results[row]["integers"]
        assert results[row]["zeros"] == pytest.approx(0.5, abs=0.05)
        assert results[row]["bytes"] < 0.5 * results["plain"]["bytes"]
        assert results[row]["export agreement"] > 0.98
    assert results["plain"]["export difference"] == 0
    assert "| together |" in output.with_suffix(".md").read_text()


def test_everything_together_on_a_language_model(output, tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    rows = ["plain", "together", "one after the other"]
    own = ["--rows", *rows, "--model", str(tmp_path / "model"), "--tokenizer", "bytes", "--steps", "4"]
    small = ["--block", "96", "--tests", "2", "--seeds", "0", "--batch", "2", "--device", "cpu"]
    golden_smollm2.main(["--output", str(output), *own, *small])
    results = {r["run"]["row"]: r["result"] for r in records(output)}
    for row in rows[1:]:  # the factors of a run serve the model of integers that left it
        assert results[row]["cache share"] == pytest.approx(0.5)
        assert results[row]["decoding"] != results[row]["decoding, exact cache"]
        assert results[row]["perplexity"] == pytest.approx(results[row]["trained perplexity"], rel=0.01)
        assert results[row]["bytes"] < 0.9 * results["plain"]["bytes"]
    assert "| together |" in output.with_suffix(".md").read_text()


def test_quantisers_by_bits(root, output):
    few = ["--bits", "W4A4", "W1A8", "--methods", "LSQ", "BiPer", "--models", "vit", "--limit", "300"]
    command = ["--root", root, "--output", str(output), *TINY, "--width", "8", "--qat-epochs", "1", *few]
    qat_bits.main(command)
    done = records(output)
    assert [r["run"]["bits"] for r in done] == [None, "W4A4", "W1A8"]
    assert len({r["result"]["test_loss"] for r in done}) == 3
    assert "| W1A8 | BiPer |" in output.with_suffix(".md").read_text()


def test_every_quantiser_of_the_table_takes_its_bits():
    for bits, methods in qat_bits.METHODS.items():
        w, _, a = bits.removeprefix("W").partition("A")
        for options in methods.values():
            technique = qat_bits.QAT(float(w), int(a), **options).technique
            technique.attach(qat_bits.resnet(8))
            assert {q.bits for n, q in technique.quantizers() if "layer1.0.conv1.weight" in n} == {float(w)}


@pytest.mark.slow
def test_compressed_gradients(root, output):
    few = ["--methods", "uncompressed", "Top-k, EF14", "--splits", "classes", "--lrs", "0.05", "0.1", "--limit", "400"]
    command = ["--root", root, "--output", str(output), *TINY, *few]
    compressed_gradients.main(command)
    done = records(output)
    assert len(done) == 2 * 2 + 2
    shares = {r["result"]["share"] for r in done if r["run"]["options"] is not None}
    assert 0 < min(shares) <= max(shares) < 1
    assert "| Top-k, EF14 |" in output.with_suffix(".md").read_text()
    compressed_gradients.main(command)
    assert records(output) == done
