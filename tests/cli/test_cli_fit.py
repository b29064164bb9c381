"""``lossplug fit``: short names, defaults, resume, and every mistake in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import DATA, FIT, LOSS, MODEL, SPARSE, SWAP, TRAINER

from lightning_lossplug.callbacks import read_checkpoint
from lightning_lossplug.cli.fit import expand_recipes, import_named
from lightning_lossplug.recipes import config_names, config_path


def yaml(text: str) -> Path:
    path = Path.cwd().parent / "config.yaml"
    path.write_text(text)
    return path


def test_a_run_leaves_config_metrics_checkpoint_and_results(run, checkpoint):
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 4
    assert {"train_loss", "val_accuracy"} <= set(results["metrics"])
    assert (run / "config.yaml").is_file()
    assert (run / "metrics.csv").is_file()
    saved = read_checkpoint(checkpoint)
    assert any(key.startswith("ExactResume") for key in saved["callbacks"])
    assert any(key.endswith("sparsity.bits") for key in saved["state_dict"])
    assert saved["hyper_parameters"]["_class_path"].endswith("ImageClassifier")


def test_the_written_config_runs_again(cli, run):
    done = cli("fit", "--config", run / "config.yaml", "--trainer.max_steps", "1")
    assert done.code == 0, done
    assert Path("lossplug_runs/version_0/checkpoints/last.ckpt").is_file()


def test_yaml_with_short_names(cli):
    path = yaml(
        """
        trainer:
          max_steps: 1
          accelerator: cpu
          limit_val_batches: 0
          enable_progress_bar: false
          enable_model_summary: false
          callbacks:
            - class_path: SwapLoss
              init_args: {loss: focal, parameters: {gamma: 1.0}}
            - class_path: NMSparsity
              init_args: {include: {"*.mlp.*": "1:8", "*.attn.qkv": "2:4"}}
        model:
          class_path: ImageClassifier
          init_args: {model: vit_tiny_patch16_224, num_classes: 10, in_chans: 1, img_size: 8,
                      model_kwargs: {patch_size: 4, embed_dim: 32, depth: 1, num_heads: 2}}
        data: {class_path: DigitsData, init_args: {train_limit: 64}}
        """
    )
    done = cli("fit", "--config", path)
    assert done.code == 0, done
    assert "SwapLoss: focal (replace)" in done.out
    assert "NMSparsity" in done.out


def test_resume_gives_the_weights_of_a_run_never_stopped(cli):
    common = [*FIT, "--trainer.max_steps=6", *SWAP, f"{LOSS}=poly_loss", *SPARSE]
    every = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=3"]
    done = cli(*common, *every, "--trainer.callbacks.save_top_k=-1")
    assert done.code == 0, done
    saved = Path("lossplug_runs/version_0/checkpoints")
    done = cli(*common, "--ckpt_path", next(saved.glob("*step=3.ckpt")))
    assert done.code == 0, done
    straight = read_checkpoint(next(saved.glob("*step=6.ckpt")))
    resumed = read_checkpoint("lossplug_runs/version_1/checkpoints/last.ckpt")
    assert resumed["global_step"] == straight["global_step"] == 6
    for name, value in straight["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


@pytest.mark.parametrize("name", config_names())
def test_recipe_files_parse_and_their_parts_exist(name):
    from lightning_lossplug.cli.lightning_cli import FitCLI

    class Parsed(FitCLI):
        def instantiate_classes(self) -> None:
            """Leaves the models unbuilt: one of them is large."""

    arguments = expand_recipes([f"--recipe={name}"])
    assert arguments == ["--config", str(config_path(name))]
    import_named(arguments)
    config = Parsed.parse(arguments).config["fit"]
    assert config["model"]["class_path"].startswith("lightning_lossplug.integrations.")
    assert config["data"]["class_path"].startswith("lightning_lossplug.integrations.")
    callbacks = [c["class_path"].rpartition(".")[2] for c in config["trainer"]["callbacks"]]
    together = ["SwapLoss", "NMSparsity", "QAT", "OnlineDistillation"]
    expected = (together[:2], together[2:3], together[3:], together, [*together, "KVChannelShrink"])
    assert callbacks in expected


def test_a_recipe_trains_and_options_override_it(cli):
    done = cli("fit", "--recipe", "vit_digits_2to4", *TRAINER, "--trainer.max_epochs=1", "--data.train_limit=64")
    assert done.code == 0, done
    assert json.loads(Path("lossplug_runs/version_0/results.json").read_text())["steps"] == 1


MISTAKES = {
    "unknown loss": ([*FIT, *SWAP, f"{LOSS}=focall"], "unknown loss 'focall'. Did you mean 'focal'"),
    "loss parameter": ([*FIT, *SWAP, f"{LOSS}=focal", "--trainer.callbacks.parameters={gama: 3}"], "'gamma'"),
    "unknown recipe": ([*FIT, *SPARSE, "--trainer.callbacks.recipe=nm_srst"], "'nm_srste'"),
    "unknown callback": ([*FIT, "--trainer.callbacks+=NMSparsty"], "Did you mean 'NMSparsity'"),
    "N above M": ([*FIT, *SPARSE, "--trainer.callbacks.n=5"], "5:4"),
    "N equal to M": ([*FIT, *SPARSE, "--trainer.callbacks.n=4"], "4:4 keeps every weight"),
    "M divides nothing": ([*FIT, *SPARSE, "--trainer.callbacks.m=7"], "M = 7 does not divide"),
    "pattern without layer": ([*FIT, *SPARSE, "--trainer.callbacks.include=[nothing.*]"], "matches no layer"),
    "no layer left": ([*FIT, *SPARSE, "--trainer.callbacks.exclude=['*']"], "no layer selected"),
    "criterion": ([*FIT, *SWAP, f"{LOSS}=focal", "--trainer.callbacks.where=criterion"], "no attribute 'criterion'"),
    "option": ([*FIT, "--trainer.max_epocsh=3"], "Did you mean '--trainer.max_epochs'"),
    "callback option": ([*FIT, *SWAP, "--trainer.callbacks.los=focal"], "SwapLoss has no option 'los'"),
    "model option": ([*FIT, "--model.lrr=3"], "ImageClassifier has no option 'lrr'. Did you mean 'lr'"),
    "type": ([*FIT, "--model.num_classes=abc"], "num_classes: expected a whole number, got 'abc'"),
    "choice": (
        [*FIT, "--trainer.precision=bf16-mixd"],
        "trainer.precision: 'bf16-mixd' is none of its values. Did you mean 'bf16-mixed'",
    ),
    "accelerator": ([*FIT, "--trainer.accelerator=foo"], "invalid accelerator"),
    "model": (
        ["fit", "--model=ImageClasifier", *DATA],
        "unknown model 'ImageClasifier'. Did you mean 'ImageClassifier'",
    ),
    "data": (["fit", *MODEL, "--data=DigitData"], "Did you mean 'DigitsData'"),
    "timm model": ([*FIT, "--model.model=vit_tinny_patch16_224"], "timm has no model"),
    "nothing given": (["fit"], "--model missing"),
    "no config": (["fit", "--config", "nope.yaml"], "nope.yaml: there is no such file"),
    "no recipe": (["fit", "--recipe", "vit_digits_2to5"], "'vit_digits_2to4'"),
    "no checkpoint": ([*FIT, "--ckpt_path=nope.ckpt"], "no such checkpoint file"),
    "not writable": ([*FIT, "--trainer.default_root_dir=/proc/nowhere"], "the output folder can't be written"),
    "a file as folder": ([*FIT, f"--trainer.default_root_dir={__file__}"], "the output folder can't be written"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(mistake, name):
    arguments, words = MISTAKES[name]
    assert words in mistake(*arguments)


BLOCK = "model: {class_path: ImageClassifier, init_args: {num_classes: 10}}\ndata: DigitsData\n"
YAML_MISTAKES = {
    "trainer key": (
        "trainer: {max_epoch: 3}\n" + BLOCK,
        "unknown key 'trainer.max_epoch'. Did you mean 'trainer.max_epochs'",
    ),
    "top key": ("trainr: {max_epochs: 3}\n" + BLOCK, "unknown key 'trainr.max_epochs'"),
    "model key": ("model: {class_path: ImageClassifier, init_args: {modle: x}}\n", "Did you mean 'model'"),
    "init_args": ("model: {class_path: ImageClassifier, init_arg: {model: x}}\n", "Did you mean 'init_args'"),
    "callback key": (
        "trainer: {callbacks: [{class_path: NMSparsity, init_args: {nn: 2}}]}\n" + BLOCK,
        "NMSparsity has no option 'nn'",
    ),
    "callback name": ("trainer: {callbacks: [{class_path: Sparsity}]}\n" + BLOCK, "unknown class 'Sparsity'"),
    "value": ("trainer: {callbacks: [{class_path: SwapLoss, init_args: {loss: focl}}]}\n" + BLOCK, "'focal'"),
    "N:M text": (
        "trainer: {callbacks: [{class_path: NMSparsity, init_args: {include: {'*.mlp.*': '2-4'}}}]}\n" + BLOCK,
        "'2-4' is no N:M pattern",
    ),
    "syntax": ("trainer: [3\n", "no valid YAML"),
    "no mapping": ("- a\n- b\n", "no mapping"),
}


@pytest.mark.parametrize("name", YAML_MISTAKES)
def test_yaml_mistake(mistake, name):
    text, words = YAML_MISTAKES[name]
    assert words in mistake("fit", "--config", yaml(text))


def test_a_truncated_checkpoint_is_refused_before_anything_starts(mistake, checkpoint):
    short = Path.cwd().parent / "short.ckpt"
    short.write_bytes(checkpoint.read_bytes()[:4000])
    assert "can't be read" in mistake(*FIT, "--ckpt_path", short)


def test_nothing_intercepted_leaves_no_folder_behind(mistake):
    # a regression loss stands in for calls of mse_loss and its kin, which this step doesn't make
    assert "no loss that could be swapped" in mistake(*FIT, *SWAP, f"{LOSS}=pseudo_huber")


def test_weights_that_are_not_finite_at_mask_time(mistake, monkeypatch):
    from lightning_lossplug.integrations.vision import ImageClassifier

    def poison(self) -> None:
        with torch.no_grad():
            self.model.blocks[0].mlp.fc1._parameters["weight"][0, 0] = float("nan")

    monkeypatch.setattr(ImageClassifier, "on_fit_start", poison)
    line = mistake(*FIT, *SPARSE)
    assert "blocks.0.mlp.fc1" in line
    assert "finite" in line


def test_what_was_there_before_a_mistake_stays(mistake):
    Path("lossplug_runs").mkdir()
    Path("lossplug_runs/mine.txt").write_text("keep")
    mistake(*FIT, *SWAP, f"{LOSS}=pseudo_huber")
    assert Path("lossplug_runs/mine.txt").read_text() == "keep"


def test_a_missing_package_names_its_extra(mistake, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert "pip install 'lightning_lossplug[cli]'" in mistake(*FIT)


def test_an_interrupted_fit_ends_with_130(tmp_path):
    # Started in the background (as CI may be), a process inherits an ignored SIGINT; a terminal gives the default one.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from lightning_lossplug.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [*FIT, "--trainer.max_steps=-1", "--trainer.max_epochs=100000"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        saved = tmp_path / "lossplug_runs" / "version_0" / "checkpoints"
        for _ in range(600):
            if saved.is_dir() and any(saved.iterdir()):
                break
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        try:
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
