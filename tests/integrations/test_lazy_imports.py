"""The package stays light until a class is touched, and names the extra when a library is missing."""

import subprocess
import sys
from pathlib import Path

import pytest

import lightning_lossplug.integrations as integrations
from lightning_lossplug.registry import BUILTIN_MODULES, registry

ROOT = Path(__file__).resolve().parents[2]


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_import_brings_in_no_library():
    code = (
        "import sys, lightning_lossplug.integrations as i; dir(i);"
        "print([m for m in ('lightning', 'timm', 'transformers', 'torchmetrics', 'sklearn') if m in sys.modules])"
    )
    done = python(code)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("name", "missing", "extra"),
    [
        ("ImageClassifier", "timm", "timm"),
        ("ImageClassifier", "lightning", "lightning"),
        ("CausalLM", "transformers", "transformers"),
        ("DigitsData", "sklearn", "vision"),
        ("TextData", "lightning", "lightning"),
    ],
)
def test_missing_library_names_its_extra(name, missing, extra, monkeypatch):
    class Absent:
        """A finder for which one package does not exist."""

        def find_spec(self, fullname, path=None, target=None):
            if fullname.split(".")[0] == missing:
                raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    for module in [m for m in sys.modules if m.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ValueError, match=rf"{name} needs the package '{missing}'.*lightning_lossplug\[{extra}\]"):
        getattr(integrations, name)


def test_everything_exported_exists_and_nothing_else():
    for name in integrations.__all__:
        assert getattr(integrations, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        integrations.Nothing  # noqa: B018


MODELS = ["ImageClassifier", "CausalLM"]
DATA = ["DigitsData", "IDXData", "FashionMNISTData", "DomainShiftData", "TextData"]


@pytest.mark.parametrize("name", [*MODELS, *DATA])
def test_registered(name):
    entry = registry._entries["data" if name in DATA else "model", name]
    assert "lightning_lossplug.integrations" in BUILTIN_MODULES
    assert entry.load() is getattr(integrations, name)
    assert all(parameter.annotation for parameter in entry.parameters())
