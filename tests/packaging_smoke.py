"""Run with an installed wheel, from another folder: the three import names, the command, the package data."""

import importlib.resources
import subprocess
import sys
from pathlib import Path

import lightning_lossplug
import lightning_lossplug.callbacks
import lightning_lossplug.integrations
from lightning_lossplug.callbacks import NMSparsity
from lightning_lossplug.losses import create

home = Path(lightning_lossplug.__file__).parent
assert "site-packages" in home.parts, home
assert "site-packages" in Path(lightning_lossplug.callbacks.__file__).parts
assert (home / "py.typed").is_file()
assert any(f.name.endswith(".yaml") for f in importlib.resources.files("lightning_lossplug.recipes").iterdir())
assert NMSparsity(2, 4)
assert create("focal")
listing = subprocess.run([Path(sys.executable).parent / "lossplug", "list"], capture_output=True, text=True, check=True)
assert "nm_srste" in listing.stdout
print("wheel:", home)
