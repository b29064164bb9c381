"""Recipe files from elsewhere: callbacks or one line, and no import or code of anybody else's.

``LOSSPLUG_FUZZ=2000`` sets the examples per test; the default is small.
"""

import inspect
import os
import sys

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback

from lightning_lossplug import LossplugError
from lightning_lossplug.cli.recipe import build_callbacks, read_recipe
from lightning_lossplug.recipes import config_names, config_path
from lightning_lossplug.registry import registry

EXAMPLES = int(os.environ.get("LOSSPLUG_FUZZ", "25"))
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
VALID = [config_path(name).read_text() for name in config_names()] + [
    "callbacks:\n  - class_path: SwapLoss\n    init_args: {loss: focal, parameters: {gamma: 2.0}}\n  - NMSparsity\n"
]
CLASSES = {entry.name: entry.load() for entry in registry if entry.kind == "callback"}


@pytest.fixture(autouse=True)
def _canary(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported; no test may leave that file."""
    (tmp_path / "canary.py").write_text(
        f"open({str(tmp_path / 'sang')!r}, 'w')\nclass Bird: pass\ndef sing(*a): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("canary", None)
    assert not (tmp_path / "sang").exists()


def outcome(text, tmp_path, build=False):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        entries = read_recipe(path)
        return build_callbacks(entries, str(path)) if build else entries
    except LossplugError as error:
        assert len(str(error).splitlines()) == 1
        return None


@FUZZ
@given(content=st.binary(max_size=200))
def test_any_bytes(content, tmp_path):
    outcome(content, tmp_path)


PIECES = [
    "&a ",
    "*a",
    "!!python/object/apply:os.system [echo]",
    "!!timestamp x",
    "!!int ''",
    "!!bool x",
    "<<: *a",
    "? ",
]
PIECES += [
    "- - - ",
    "{",
    "}",
    "\t",
    "\0",
    "\x85",
    "1e999",
    "9" * 5000,
    "0x",
    "2001-99-99",
    ": :",
    "!!binary \\",
    "\ufeff",
]


@FUZZ
@given(choice=st.data(), text=st.sampled_from(VALID))
def test_damaged_recipes(choice, text, tmp_path):
    for _ in range(choice.draw(st.integers(1, 3))):
        at = choice.draw(st.integers(0, len(text)))
        new = choice.draw(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)))
        text = text[:at] + new + text[at + choice.draw(st.integers(0, 9)) :]
    outcome(text.encode("utf-8", "replace"), tmp_path)


STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**70, 1e308, float("nan"), float("inf"), -0.5]),
    st.sampled_from(["", "x", "canary.Bird", "canary.sing", "os.system", "../../x", "a\nb", "cache:/nowhere"]),
    st.sampled_from([[], {}, [None], [[1]], {"a": 1}, {"class_path": "canary.Bird"}, [{"class_path": "os.system"}]]),
)


@FUZZ
@given(choice=st.data(), name=st.sampled_from(sorted(CLASSES)))
def test_any_value_for_any_setting(choice, name, tmp_path):
    known = [key for key in inspect.signature(CLASSES[name].__init__).parameters if key != "self"]
    keys = choice.draw(st.lists(st.sampled_from([*known, "nonsense"]), max_size=3))
    arguments = {key: choice.draw(STRANGE) for key in keys}
    found = outcome(yaml.safe_dump({"callbacks": [{"class_path": name, "init_args": arguments}]}), tmp_path, build=True)
    assert found is None or all(isinstance(callback, Callback) for callback in found)


@pytest.mark.parametrize("where", ["class", "inside", "function", "string"])
def test_nothing_of_others_is_imported(where, tmp_path):
    entry = {
        "class": {"class_path": "canary.Bird"},
        "inside": {"class_path": "Distillation", "init_args": {"teacher": {"class_path": "canary.Bird"}}},
        "function": {"class_path": "Distillation", "init_args": {"teacher": "timm:x", "kd_loss": "canary.sing"}},
        "string": "canary.Bird",
    }[where]
    assert outcome(yaml.safe_dump({"callbacks": [entry]}), tmp_path, build=True) is None


def bomb(levels):
    lines = [f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]" for i in range(1, levels)]
    return "\n".join(["b0: &b0 [x, x]", *lines, f"callbacks: [*b{levels - 1}]"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("callbacks: []\ncallbacks: [SwapLoss]\n", "gives the key 'callbacks' twice"),
        ("callbacks:\n- class_path: SwapLoss\n  class_path: QAT\n", "gives the key 'class_path' twice"),
        ("callbacks: !!python/object/apply:os.system ['touch sang']\n", "no valid YAML"),
        (bomb(40), "10000 values"),
        ("callbacks: " + "[" * 5000, "no valid YAML"),
        ("callbacks: " + "[" * 60 + "]" * 60, "50 levels"),
        ("#" + "x" * (1 << 20), "at most"),
        ("callbacks: &a\n- *a\n", "50 levels"),
    ],
)
def test_refusals(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(LossplugError, match=message) as caught:
        read_recipe(path)
    assert len(str(caught.value).splitlines()) == 1
