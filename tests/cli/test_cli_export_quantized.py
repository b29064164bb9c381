"""``lossplug export --format``: a quantised run leaves as packed codes or as ONNX, and reads back."""

import json
import os
from pathlib import Path

import pytest
import torch
from commands import FIT, command

from lightning_lossplug.callbacks import load_plugged, read_checkpoint
from lightning_lossplug.integrations.network import rebuild_module
from lightning_lossplug.integrations.packed import load_packed


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The checkpoint of a tiny QAT run."""
    root, before = tmp_path_factory.mktemp("qat"), Path.cwd()
    os.chdir(root)
    try:
        done = command(*FIT, "--trainer.callbacks+=QAT", "--trainer.callbacks.bits_w=4")
    finally:
        os.chdir(before)
    assert done.code == 0, done
    return root / "lossplug_runs" / "version_0" / "checkpoints" / "last.ckpt"


def test_packed(quantised, tmp_path):
    done = command("export", quantised, "--output", tmp_path / "a", "--format", "packed")
    assert done.code == 0, done
    assert "their codes and scales" in done.out
    manifest = json.loads((tmp_path / "a" / "lossplug.json").read_text())
    assert manifest["codes_and_scales"] < 0.3 * manifest["float_bytes"]
    module = load_plugged(rebuild_module(read_checkpoint(quantised), str(quantised)), quantised).eval()
    plain = rebuild_module(read_checkpoint(quantised), str(quantised)).model
    loaded = load_packed(plain, tmp_path / "a" / "model.safetensors")
    x = torch.randn(8, 1, 8, 8)
    with torch.no_grad():
        want, got = module.model(x), loaded(x)
    assert (got - want).abs().max() <= 0.02 * (want.max() - want.min())


def test_dense_weights_say_that_they_are_not_packed(quantised, tmp_path):
    done = command("export", quantised, "--output", tmp_path / "a")
    assert done.code == 0, done
    assert "10, in floating point here" in done.out


def test_onnx(quantised, tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"needs the package {package} (extra: onnx)")
    done = command("export", quantised, "--output", tmp_path / "a", "--format", "onnx_qdq", "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["max_difference"] <= 0.05
    assert (tmp_path / "a" / "model.onnx").is_file()


def test_mistakes(quantised, checkpoint, tmp_path):
    def failed(*arguments):
        done = command("export", *arguments, "--output", tmp_path / "b")
        assert done.code == 2
        assert len(done.err.strip().splitlines()) == 1
        assert not (tmp_path / "b").exists()
        return done.err

    for format in ("compressed_tensors", "bitsandbytes_int8", "bitsandbytes_nf4"):
        assert "is no transformers model" in failed(quantised, "--format", format)
    assert "--masks and --onnx belong to dense weights" in failed(quantised, "--format", "packed", "--onnx")
    assert "no weight with integer codes" in failed(checkpoint, "--format", "packed")


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("format", [None, "packed", "evaluate"])
def test_scales_that_left_the_positive_numbers(quantised, tmp_path, value, format):
    """The name of the layer and what to do, in one line, instead of a model without sense."""
    content = torch.load(quantised, weights_only=True)
    name = next(key for key in content["state_dict"] if key.endswith("qkv.weight_transforms.quantization.quantizer.s"))
    content["state_dict"][name].flatten()[:1] = value
    torch.save(content, tmp_path / "bad.ckpt")
    if format == "evaluate":
        done = command("evaluate", tmp_path / "bad.ckpt")
    else:
        done = command(
            "export", tmp_path / "bad.ckpt", "--output", tmp_path / "a", *(["--format", format] if format else [])
        )
    assert done.code == 2, done
    assert len(done.err.strip().splitlines()) == 1
    assert "zero, negative or not finite" in done.err
    assert not (tmp_path / "a").exists()
