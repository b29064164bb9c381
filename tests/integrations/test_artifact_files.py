"""The optional files of an artifact: masks and ONNX, for timm and transformers models."""

import json

import lightning.pytorch as pl
import pytest
import timm
import torch
import transformers
from torch import nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.export import read_masks
from lightning_lossplug.integrations.artifact import export_artifact
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import NMSettings, NMTechnique


class Own(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def sparse(module, include):
    technique = NMTechnique(NMSettings(n=2, m=4, recipe="nm_ste", include=include))
    technique.attach(module)
    technique.advance(Progress(0, 1))
    return technique


def vit():
    options = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, in_chans=1, img_size=8, **options)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def test_masks_and_kernels_of_every_layer(tmp_path):
    module = Own(vit())
    technique = sparse(module, ["*.mlp.*"])
    manifest = export_artifact(module, tmp_path / "out", techniques=[technique], masks=True)
    masks = read_masks(tmp_path / "out")
    assert manifest["masks"] == "masks.safetensors"
    assert set(masks) == set(manifest["layers"]) == {"blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"}
    for name, mask in masks.items():
        assert torch.equal(mask, technique.layers[f"net.{name.removesuffix('.weight')}"].transform.mask)
        assert manifest["layers"][name]["kernel_2to4"] == "usable"
    assert manifest["kernels_2to4"]["usable"] == 2
    assert json.loads((tmp_path / "out" / "lossplug.json").read_text())["kernels_2to4"] == manifest["kernels_2to4"]
    with pytest.raises(LossplugError, match="no N:M layer"):
        export_artifact(Own(vit()), tmp_path / "dense", masks=True)
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("build", [vit, llama])
def test_onnx_beside_the_weights(build, tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"needs the package {package} (extra: onnx)")
    torch.manual_seed(0)
    module = Own(build().eval())
    manifest = export_artifact(module, tmp_path / "out", techniques=[sparse(module, ["*.mlp.*"])], onnx=True)
    assert manifest["onnx"]["file"] == "model.onnx"
    assert 0 <= manifest["onnx"]["max_difference"] <= 1e-4
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    if build is llama:
        given = torch.randint(0, 64, (3, 9))
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        with torch.no_grad():
            expected = again(input_ids=given).logits
    else:
        given = torch.randn(3, 1, 8, 8)
        with torch.no_grad():
            expected = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()(given)
    (found,) = session.run(None, {entry.name: given.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


def test_onnx_of_a_plain_network_needs_inputs(tmp_path):
    module = Own(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))
    with pytest.raises(LossplugError, match="nothing tells the inputs"):
        export_artifact(module, tmp_path / "out", onnx=True)
    assert not list(tmp_path.iterdir())
