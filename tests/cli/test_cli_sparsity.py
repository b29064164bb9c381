"""``lossplug sparsity``: the same report from a checkpoint and from its export, and why layers don't fit."""

import json

import pytest


def test_checkpoint_and_artifact_agree(cli, checkpoint, artifact):
    one, two = (json.loads(cli("sparsity", path, "--json").out) for path in (checkpoint, artifact))
    assert one["layers"] == two["layers"]
    manifest = json.loads((artifact / "lossplug.json").read_text())
    assert one["usable"] == manifest["kernels_2to4"]["usable"] > 0
    for row in one["layers"]:
        assert row["usable"] == (f"{row['name']}.weight" in manifest["layers"])


def test_table(cli, artifact):
    done = cli("sparsity", artifact)
    assert done.code == 0, done
    assert "blocks.*.mlp.fc1 (2)" in done.out
    assert "50.0%" in done.out
    assert "layers fit torch's 2:4 kernels (cusparselt, float16)" in done.out
    own = cli("sparsity", artifact, "--dtype", "own").out
    assert "0 of" in own
    assert "has no float32 kernel" in own


def test_the_export_says_it_too(cli, checkpoint):
    done = cli("export", checkpoint, "--output", "out", "--masks")
    assert "fit 2:4 kernels" in done.out
    assert "masks.safetensors" in done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nope.ckpt"], "there is no such checkpoint file"), (["x", "--dtype", "int3"], "invalid choice: 'int3'")],
)
def test_mistake(mistake, arguments, words):
    assert words in mistake("sparsity", *arguments)


def test_onnx_leaves_the_output_clean(cli, checkpoint):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"needs the package {package} (extra: onnx)")
    done = cli("export", checkpoint, "--output", "out", "--onnx", "--json")
    assert done.code == 0, done
    manifest = json.loads(done.out)
    assert manifest["onnx"]["max_difference"] <= 1e-4
    assert manifest["onnx"]["zeros"] >= sum(
        row["sparsity"] * row["shape"][0] * row["shape"][1] for row in manifest["layers"].values()
    )
