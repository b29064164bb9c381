"""``lossplug run`` and ``lossplug check``: scripts nobody edited, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from commands import Done

from lightning_lossplug.cli.main import main

SCRIPT = Path(__file__).with_name("their_script.py")
RECIPE = """
callbacks:
  - class_path: SwapLoss
    init_args: {loss: focal, parameters: {gamma: 2.0}}
  - class_path: NMSparsity
    init_args: {n: 2, m: 4, recipe: nm_ste}
"""
# A stock module of Lightning with a Trainer around it; it reads data/wikitext-2.txt, where real text is put.
STOCK = """
import lightning as L
from lightning.pytorch.demos.transformer import LightningTransformer
model = LightningTransformer(vocab_size=20000)
L.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False).fit(model)
print("ZEROS", float((model.model.transformer.encoder.layers[0].linear1.weight == 0).float().mean()))
"""


@pytest.fixture
def lossplug(capfd):
    """``lossplug`` in this process; what the processes it starts print is captured, too."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return Done(code, *capfd.readouterr())

    return run


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def test_the_entry_points_are_installed():
    found = {e.value for e in entry_points(group="lightning.pytorch.callbacks_factory")}
    assert "lightning_lossplug.cli.hook:callbacks" in found, "install the project again: pip install -e ."


def test_the_hook_is_inert_and_light():
    code = (
        "import sys; import lightning_lossplug.cli.hook as hook; assert hook.callbacks() == []; "
        "assert hook.foreign_callbacks() == []; assert not {'torch', 'lightning', 'yaml'} & set(sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if name != "LOSSPLUG_RUN"}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def test_callbacks_reach_every_process_of_a_script_and_its_arguments_stay_its_own(recipe, lossplug):
    done = lossplug("run", "--recipe", recipe, "--", sys.executable, SCRIPT, "--devices", 2, "--debug")
    assert done.code == 0, done.err
    for rank in range(2):
        after = json.loads(Path(f"after_{rank}.json").read_text())
        assert after == {"zeros": 0.5, "debug": True}


def test_a_stock_module_of_lightning(recipe, lossplug):
    import pydoc_data.topics

    Path("data").mkdir()
    Path("data/wikitext-2.txt").write_text(pydoc_data.topics.topics["assignment"] * 2)
    done = lossplug("run", "--recipe", recipe, "--", sys.executable, "-c", STOCK)
    assert done.code == 0, done.err
    assert "ZEROS 0.5" in done.out


def test_exit_codes_are_the_scripts(recipe, lossplug):
    assert lossplug("run", "--recipe", recipe, "--", sys.executable, SCRIPT, "--fail").code == 7
    done = lossplug("run", "--recipe", recipe, "--", sys.executable, "-c", "print('no trainer')")
    assert done.code == 2
    assert "made no Trainer" in done.err.splitlines()[-1]


def test_a_signal_reaches_the_script(recipe):
    code = "import signal, sys, time, pathlib\nsignal.signal(signal.SIGTERM, lambda *a: sys.exit(9))\n"
    code += "pathlib.Path('ready').touch()\ntime.sleep(60)"
    command = [sys.executable, "-m", "lightning_lossplug.cli.main", "run", "--recipe", recipe, "--", sys.executable]
    process = subprocess.Popen([*map(str, command), "-c", code], stderr=subprocess.DEVNULL)
    for _ in range(600):
        if Path("ready").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 9


def test_check_shows_layers_size_and_cost_and_runs_nothing_after_the_fit(recipe, lossplug):
    done = lossplug("check", "--recipe", recipe, "--steps", 4, "--json", "--", sys.executable, SCRIPT)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    sparse = next(c for c in found["recipe"]["callbacks"] if c["name"] == "NMSparsity")
    assert (sparse["taken"], sparse["left"]) == (1, 1)
    assert "output layer" in sparse["table"]
    # 512 of 676 numbers lose half of their values and get two bits for each kept one's place, which is one per entry.
    assert found["recipe"]["dense_bytes"] == 4 * 676
    assert found["recipe"]["bytes"] == 4 * (676 - 256) + 512 // 8
    assert found["plain"]["seconds"] > 0
    assert found["plain"]["callbacks"] == []
    assert not list(Path().glob("after_*.json"))


def test_check_of_a_named_model(recipe, lossplug):
    model = "timm:vit_tiny_patch16_224"
    options = ["--set", "embed_dim=32", "--set", "depth=1", "--set", "num_heads=2", "--set", "img_size=32"]
    done = lossplug("check", "--recipe", recipe, "--model", model, *options, "--batch-size", 2, "--steps", 2)
    assert done.code == 0, done.err
    assert "batch 2x3x32x32, 2" in done.out
    assert "weights, nominal" in done.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("callbacks: [{class_path: NMSparsity, init_args: {n: 3, m: 2}}]", "Choose 1 <= N < M"),
        ("callbacks: [{class_path: NMSparsty}]", "Did you mean 'NMSparsity'"),
        ("callbacks: [{class_path: NMSparsity, init_args: {mm: 2}}]", "has no option 'mm'"),
        ("callbacks: [{class_path: os.path.join}]", "would run code"),
        ("callbacks: [{class_path: NMSparsity, init_args: {score: antigravity.fly}}]", "--allow-import antigravity"),
        ("callbacks: [{class_path: Distillation, init_args: {teacher: {class_path: evil.Net}}}]", "'evil.Net'"),
        ("callbacks: []", "names no callbacks"),
        ("- a\n- b", "no mapping"),
        ("callbacks: [", "no valid YAML"),
        ("callbacks: !!python/object/apply:os.system ['touch owned']", "no valid YAML"),
        ("x0: &a [1,2]\nx1: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nx2: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "x3: &d [*c,*c,*c,*c,*c,*c,*c,*c]\nx4: &e [*d,*d,*d,*d,*d,*d,*d,*d]\ncallbacks: [*e]", "more than 10000"),
        ("# " + "x" * (1 << 20), "is no recipe"),
    ],
)  # fmt: skip
def test_mistakes_in_a_recipe(mistake, text, message):
    Path("bad.yaml").write_text(text)
    assert message in mistake("run", "--recipe", "bad.yaml", "--", sys.executable, "-c", "open('ran', 'w')")


def test_mistakes_on_the_command_line(mistake):
    Path("good.yaml").write_text(RECIPE)
    assert "no command" in mistake("run", "--recipe", "good.yaml")
    assert "no program 'pythn'" in mistake("run", "--recipe", "good.yaml", "--", "pythn", "train.py")
    assert "no such file" in mistake("run", "--recipe", "none.yaml", "--", "python")
    assert "--model or a command" in mistake("check", "--recipe", "good.yaml")
    assert "no value" in mistake("check", "--recipe", "good.yaml", "--model", "timm:x", "--set", "a")


def test_a_refusal_is_one_line(recipe, lossplug):
    Path("refused.yaml").write_text("callbacks: [{class_path: NMSparsity, init_args: {include: ['nothing.*']}}]")
    done = lossplug("check", "--recipe", "refused.yaml", "--", sys.executable, SCRIPT)
    assert done.code == 2
    assert "with the recipe the fit stops: " in done.err
    assert "nothing.*" in done.err
    assert len(done.err.strip().splitlines()) == 1
