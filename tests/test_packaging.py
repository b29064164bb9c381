"""What is declared equals what is there."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_is_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"lightning_lossplug"}
    for top in ("callbacks", "integrations"):
        for init in (ROOT / top).rglob("__init__.py"):
            found.add(".".join(["lightning_lossplug", *init.parent.relative_to(ROOT).parts]))
    for init in (ROOT / "lightning_lossplug").glob("*/**/__init__.py"):
        parts = init.parent.relative_to(ROOT / "lightning_lossplug").parts
        if parts[0] not in ("callbacks", "integrations"):
            found.add(".".join(["lightning_lossplug", *parts]))
    assert set(declared) == found


def test_the_top_level_is_the_planned_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in tracked.splitlines()}
    planned = {"pyproject.toml", "lightning_lossplug", "callbacks", "integrations", "tests", "examples", "README.md"}
    assert {name for name in top if not name.startswith(".")} == planned | {"LICENSE"}


def test_the_base_import_needs_torch_alone():
    code = (
        "import sys, lightning_lossplug, lightning_lossplug.losses, lightning_lossplug.sparsity\n"
        "import lightning_lossplug.callbacks, lightning_lossplug.integrations\n"
        "lightning_lossplug.registry.load()\n"
        "optional = {'lightning', 'timm', 'transformers', 'torchmetrics', 'rich', 'matplotlib', 'sklearn'}\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & optional))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_missing_package_is_one_line_that_names_the_extra():
    code = (
        "import sys; sys.modules['lightning'] = None\n"
        "import lightning_lossplug.callbacks as c\n"
        "try:\n    c.NMSparsity\n"
        "except lightning_lossplug.LossplugError as e:\n    print(e)\n"
    ).replace(
        "import lightning_lossplug.callbacks as c", "import lightning_lossplug, lightning_lossplug.callbacks as c"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "pip install 'lightning_lossplug[lightning]'" in done.stdout
    assert len(done.stdout.splitlines()) == 1
