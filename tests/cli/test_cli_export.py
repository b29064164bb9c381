"""``lossplug export``: what it writes loads without the package, and mistakes lose nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from commands import FIT, SPARSE

from lightning_lossplug.callbacks import load_plugged, read_checkpoint
from lightning_lossplug.cli.foreign_load import SCRIPT, load_elsewhere
from lightning_lossplug.integrations.network import rebuild_module
from lightning_lossplug.metrics import compliant_groups
from lightning_lossplug.surgery import fold


@pytest.fixture(scope="module")
def folded(checkpoint):
    """The network of the checkpoint with its masks folded in, built without the code of the export."""
    module = rebuild_module(read_checkpoint(checkpoint), str(checkpoint))
    return fold(load_plugged(module, checkpoint)).model.eval()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_it_loads_strictly_in_a_process_without_the_package(artifact, folded):
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = folded(x)
    found = load_elsewhere(artifact, x, logits.argmax(1), logits)
    assert found == {"max_difference": 0.0, "accuracy": 1.0, "tensors": len(folded.state_dict())}


def test_that_process_really_has_no_package(tmp_path):
    probe = SCRIPT.partition("import safetensors")[0] + "print('blocked')"
    done = subprocess.run(
        [sys.executable, "-I", "-c", probe], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout.strip() == "blocked", done.stderr


def test_timm_loads_it_by_name_and_checkpoint_path_too(artifact, folded):
    config = json.loads((artifact / "config.json").read_text())
    path = str(artifact / "model.safetensors")
    model = timm.create_model(config["architecture"], checkpoint_path=path, **config["model_args"])
    for name, value in folded.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_every_group_has_its_zeros(artifact):
    weights = safetensors.torch.load_file(artifact / "model.safetensors")
    manifest = json.loads((artifact / "lossplug.json").read_text())
    assert len(manifest["layers"]) == 8
    for name, layer in manifest["layers"].items():
        good, groups = compliant_groups(weights[name], layer["n"], layer["m"], layer["axis"])
        assert good == groups == weights[name].numel() // 4
        assert layer["sparsity"] == 0.5
    assert manifest["nonzero"] == sum(int(v.count_nonzero()) for v in weights.values())
    assert manifest["techniques"][0]["name"] == "NMSparsity"
    assert manifest["nominal_bytes"] < manifest["dense_bytes"]


def test_preprocessing_of_the_data_is_noted(artifact):
    config = json.loads((artifact / "config.json").read_text())["pretrained_cfg"]
    assert config["mean"] == [0.3053]
    assert config["input_size"] == [1, 8, 8]


def test_anyone_may_read_the_files(artifact):
    assert {oct(path.stat().st_mode & 0o777) for path in artifact.iterdir()} == {"0o644"}


def test_json_and_table(cli, checkpoint):
    manifest = json.loads(cli("export", checkpoint, "--output", "one", "--json").out)
    assert manifest["folder"] == "one"
    assert "2:4" in cli("export", checkpoint, "--output", "two").out
    assert snapshot(Path("one")) == snapshot(Path("two"))


def test_overwrite_replaces_an_artifact_and_nothing_else(cli, mistake, checkpoint):
    assert cli("export", checkpoint, "--output", "out").code == 0
    assert "not empty" in mistake("export", checkpoint, "--output", "out")
    assert cli("export", checkpoint, "--output", "out", "--overwrite").code == 0
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("keep")
    assert "no artifact" in mistake("export", checkpoint, "--output", "mine", "--overwrite")
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["mine", "out"]


def test_a_failed_export_keeps_the_old_artifact(cli, mistake, checkpoint):
    assert cli("export", checkpoint, "--output", "out").code == 0
    before = snapshot(Path("out"))
    short = Path.cwd().parent / "short.ckpt"
    short.write_bytes(checkpoint.read_bytes()[:6000])
    assert "can't be read" in mistake("export", short, "--output", "out", "--overwrite")
    saved = torch.load(checkpoint, weights_only=True)
    saved["state_dict"]["model.head.weight"][0, 0] = float("inf")
    torch.save(saved, Path.cwd().parent / "infinite.ckpt")
    line = mistake("export", Path.cwd().parent / "infinite.ckpt", "--output", "out", "--overwrite")
    assert "head.weight: 1 of 320 values are not finite" in line
    assert snapshot(Path("out")) == before


MISTAKES = {
    "no checkpoint": (["nope.ckpt", "--output", "out"], "there is no such checkpoint file"),
    "a text file": ([__file__, "--output", "out"], "can't be read"),
    "not writable": (["CHECKPOINT", "--output", "/proc/nowhere/out"], "can't be written"),
    "a file": (["CHECKPOINT", "--output", __file__], "is no folder"),
    "inside a file": (["CHECKPOINT", "--output", f"{__file__}/out"], "can't be written"),
    "class": (["CHECKPOINT", "--output", "out", "--model", "nowhere.Model"], "nowhere.Model can't be imported"),
    "short name": (["CHECKPOINT", "--output", "out", "--model", "ImageClasifier"], "Did you mean 'ImageClassifier'"),
    "other class": (["CHECKPOINT", "--output", "out", "--model", "torch.nn.Linear"], "is no LightningModule"),
    "network": (["CHECKPOINT", "--output", "out", "--network", "modle"], "Did you mean 'model'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(mistake, checkpoint, name):
    arguments, words = MISTAKES[name]
    arguments = [str(checkpoint) if a == "CHECKPOINT" else a for a in arguments]
    assert words in mistake("export", *arguments)


def test_an_unfinished_schedule_is_refused(cli, mistake):
    decay = "--trainer.callbacks.recipe=mdgf_exponential"
    stop = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=2"]
    assert cli(*FIT, *SPARSE, decay, *stop, "--trainer.callbacks.save_top_k=-1").code == 0
    middle = next(Path("lossplug_runs/version_0/checkpoints").glob("*step=2.ckpt"))
    assert "not 2:4 yet" in mistake("export", middle, "--output", "out")


def test_a_checkpoint_of_a_script_needs_its_class(cli, mistake, checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    for key in ("_class_path", "_instantiator"):
        saved["hyper_parameters"].pop(key)
    torch.save(saved, "script.ckpt")
    assert cli("export", "script.ckpt", "--output", "out").code == 0  # its hyper-parameters are ImageClassifier's
    saved["hyper_parameters"] = {"width": 3}
    torch.save(saved, "other.ckpt")
    assert "Name the class with --model" in mistake("export", "other.ckpt", "--output", "out2")
