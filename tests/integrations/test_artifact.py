"""Exports of modules that were written by someone else."""

import json

import lightning.pytorch as pl
import pytest
import safetensors.torch
import timm
import torch
import transformers
from torch import nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.artifact import export_artifact
from lightning_lossplug.integrations.network import find_network, rebuild_data, rebuild_module
from lightning_lossplug.metrics import compliant_groups
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import NMSettings, NMTechnique


class Own(pl.LightningModule):
    """A module as users write them."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def sparse(module: nn.Module, n: int = 2, m: int = 4, **options: object) -> NMTechnique:
    technique = NMTechnique(NMSettings(n=n, m=m, recipe="nm_ste", **options))
    technique.attach(module)
    technique.advance(Progress(0, 1))
    return technique


def resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=3, in_chans=1)


def test_a_timm_convnet_in_a_foreign_module(tmp_path):
    module = Own(backbone=resnet(), criterion=nn.CrossEntropyLoss()).eval()
    technique = sparse(module, indivisible="skip")
    x = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        expected = module.backbone(x)
    manifest = export_artifact(module, tmp_path / "out", techniques=[technique])
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(again(x), expected)
    assert manifest["network"] == "backbone"
    assert all(not name.startswith("backbone") for name in manifest["layers"])
    for name, layer in manifest["layers"].items():
        good, groups = compliant_groups(again.state_dict()[name], 2, 4, layer["axis"])
        assert good == groups
    assert module.backbone.layer1[0].conv1.__class__.__name__.startswith("Plugged")  # the live module goes on


def test_a_transformers_model_with_tied_weights(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    module = Own(lm=transformers.LlamaForCausalLM(config)).eval()
    technique = sparse(module, include=["*.mlp.*"])
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        expected = module.lm(input_ids=ids).logits
    manifest = export_artifact(module, tmp_path / "out", techniques=[technique])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        assert torch.equal(again(input_ids=ids).logits, expected)
    assert manifest["library"] == "transformers"
    assert manifest["parameters"] == sum(p.numel() for p in again.parameters())  # the tied embedding once


def test_a_plain_network(tmp_path):
    module = Own(net=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), loss=nn.CrossEntropyLoss())
    manifest = export_artifact(module, tmp_path / "out", techniques=[sparse(module, include=["net.0"])])
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    assert int(plain[0].weight.count_nonzero()) == 32
    assert json.loads((tmp_path / "out" / "lossplug.json").read_text())["network"] == manifest["network"] == "net"


def test_layers_changed_after_creation_are_told(tmp_path):
    model = resnet()
    model.fc = nn.Sequential(model.get_classifier(), nn.Linear(3, 3))
    with pytest.raises(LossplugError, match="timm can't build the network again"):
        export_artifact(Own(model=model), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_pattern_that_was_not_reached(tmp_path):
    module = Own(net=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))
    technique = NMTechnique(NMSettings(n=2, m=4, recipe="mdgf_linear", include=["net.0"]))
    technique.attach(module)
    technique.advance(Progress(0, 100))
    with pytest.raises(LossplugError, match=r"net\.0: the weight is dense, not 2:4 yet"):
        export_artifact(module, tmp_path / "out", techniques=[technique])


def test_weights_moved_after_masking_are_counted(tmp_path):
    module = Own(net=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))
    technique = sparse(module, include=["net.0"])
    technique.layers["net.0"].transform.bits.fill_(255)
    with pytest.raises(LossplugError, match="16 of 16 groups have more than 2 nonzeros"):
        export_artifact(module, tmp_path / "out", techniques=[technique])


def test_finding_the_network():
    teacher, student = resnet(), resnet()
    assert find_network(Own(model=student)).path == "model"
    assert find_network(student).path == ""
    both = Own(student=student, teacher=teacher)
    with pytest.raises(LossplugError, match="holds 2 models: student, teacher"):
        find_network(both)
    assert find_network(both, "student").library == "timm"
    assert find_network(Own(a=nn.Linear(2, 2), b=nn.Linear(2, 2))).path == ""
    with pytest.raises(LossplugError, match="Did you mean 'student'"):
        find_network(both, "studnt")


def test_rebuilding_by_hyper_parameters():
    from lightning_lossplug.integrations import DigitsData, ImageClassifier

    options = {"num_classes": 3, "in_chans": 1, "lr": 0.25}
    first = ImageClassifier("test_resnet", **options)
    again = rebuild_module({"hyper_parameters": dict(first.hparams)}, "x.ckpt")
    assert isinstance(again, ImageClassifier)
    assert again.lr == 0.25
    data = rebuild_data({"datamodule_hyper_parameters": dict(DigitsData(batch_size=7).hparams)}, "x.ckpt")
    assert isinstance(data, DigitsData)
    assert data.batch_size == 7
    assert rebuild_data({}, "x.ckpt") is None


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ({}, "has no hyper-parameters"),
        ({"hyper_parameters": {"width": 3}}, "does not say which class"),
        ({"hyper_parameters": {"_class_path": "nowhere.Model"}}, "can't be imported"),
        (
            {"hyper_parameters": {"_class_path": "lightning_lossplug.integrations.ImageClassifier", "width": 3}},
            "can't be built",
        ),
    ],
)
def test_modules_that_cannot_be_rebuilt(checkpoint, words):
    with pytest.raises(LossplugError, match=words):
        rebuild_module(checkpoint, "x.ckpt")
