"""``lossplug list`` and ``lossplug show``."""

import json
import re

import pytest
import torch

from lightning_lossplug.cli import margin
from lightning_lossplug.cli.catalog import docstring, entries, readable, split_docstring
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.recipes import config_names
from lightning_lossplug.registry import registry

FIELDS = {"name", "aliases", "family", "kind", "paper", "arxiv", "module", "parameters"}


def test_json_has_every_registered_thing(cli):
    records = json.loads(cli("list", "--json").out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert {(r["kind"], r["name"]) for r in records if r["kind"] != "config"} == {(e.kind, e.name) for e in registry}
    assert {r["name"] for r in records if r["kind"] == "config"} == set(config_names())
    for record in records:
        assert set(record) >= FIELDS
        assert "unavailable" not in record
        for parameter in record["parameters"]:
            assert set(parameter) == {"name", "default", "annotation", "required"}


def test_json_keeps_the_names_of_the_cards(cli):
    by_name = {r["name"]: r for r in json.loads(cli("list", "losses", "--json").out)}
    assert by_name["focal"]["arxiv"] == "1708.02002"
    assert by_name["focal"]["module"] == "lightning_lossplug.losses.focal"
    gamma = next(p for p in by_name["focal"]["parameters"] if p["name"] == "gamma")
    assert gamma == {"name": "gamma", "default": 2.0, "annotation": "float", "required": False}


@pytest.mark.parametrize(
    ("what", "kind"),
    [("loss", "loss"), ("losses", "loss"), ("recipes", "recipe"), ("schedules", "schedule"), ("callbacks", "callback")]
    + [("models", "model"), ("data", "data"), ("metrics", "metric"), ("configs", "config")]
    + [("strategies", "strategy"), ("plugins", "plugin")],
)
def test_kinds_singular_and_plural(cli, what, kind):
    records = json.loads(cli("list", what, "--json").out)
    assert records
    assert {r["kind"] for r in records} == {kind}


def test_family_filter_and_table(cli):
    done = cli("list", "classification")
    assert done.code == 0
    assert "focal" in done.out
    assert "supcon" not in done.out


def test_unknown_kind(mistake):
    assert "Did you mean 'losses'" in mistake("list", "lossses")


def test_n_m_recipes_and_recipe_files_are_told_apart(cli):
    assert "nm_srste" in cli("list", "recipes").out
    assert "vit_digits_2to4" not in cli("list", "recipes").out
    assert "vit_digits_2to4" in cli("list", "configs").out


def test_show_prints_formula_parameters_and_source(cli):
    out = cli("show", "focal").out
    assert "(1-p_y)^γ" in out
    assert ":math:" not in out
    assert "https://arxiv.org/abs/1708.02002" in out
    assert "Focusing exponent" in out
    assert "2.0" in out


def test_show_describes_inherited_parameters(cli):
    assert "Group size" in cli("show", "nm_ste").out


def test_show_json(cli):
    record = json.loads(cli("show", "focal", "--json").out)
    assert record["name"] == "focal"
    assert "focal loss" in record["docstring"].lower()


def test_show_alias_kind_and_config(cli):
    assert cli("show", "poly").out.startswith("poly_loss")
    assert cli("show", "loss/focal").out == cli("show", "focal", "--kind", "losses").out
    assert "class_path: NMSparsity" in cli("show", "vit_digits_2to4").out


def test_every_entry_can_be_shown(cli):
    for entry in entries():
        done = cli("show", f"{entry.kind}/{entry.name}")
        assert (done.code, done.err) == (0, ""), (entry, done)
        assert entry.name in done.out


def test_unknown_name_is_suggested(mistake):
    assert "Did you mean 'focal'" in mistake("show", "focl")


def test_plot_is_a_png(cli, tmp_path):
    path = tmp_path / "focal.png"
    done = cli("show", "focal", "--set", "gamma=5", "--plot", path)
    assert done.code == 0, done
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in done.out


def test_curve_is_the_loss_and_its_derivative():
    found = margin.curve(registry.get("loss", "cross_entropy"), {}, points=9, reach=4.0)
    expected = torch.log1p((margin.CLASSES - 1) * torch.exp(-found.x))
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.gradient, torch.exp(-expected) - 1)


LIBRARIES = ("ctc", "rnnt", "pytorch_metric_learning")  # a lattice sum, or whatever class is named
# By default the powers are of the means of the batch; centroids have no default.
WITHOUT_CURVE = {"exp_ibp", "mcmi_teacher"}
FALLING = ("logits_index", "binary_logits", "scores_sets", "margin_bounds", "embeddings_labels_head")


def test_every_loss_with_a_margin_has_a_curve():
    drawn = [e for e in registry if margin.can_draw(e) and e.family != "adapter" and e.name not in WITHOUT_CURVE]
    assert len(drawn) > 38
    wrong = {}
    for entry in drawn:
        try:
            found = margin.curve(entry, {"outside": "clamp"} if entry.name == "lmse" else {}, points=33)
        except LossplugError as error:
            wrong[entry.name] = str(error)
            continue
        finite = found.loss.isfinite().all() and found.gradient.isfinite().all()
        # The squared error of the confidence is the exception: it grows on both sides.
        falls = entry.signature not in FALLING or found.loss[0] >= found.loss[-1]
        if not (finite and (falls or entry.name == "correctness_aware")):
            wrong[entry.name] = f"{found.loss[0]} to {found.loss[-1]}"
    assert wrong == {}
    assert margin.curve(registry.get("loss", "exp_ibp"), {"per_sample": True}, points=9).loss.isfinite().all()


def test_every_loss_says_its_equation_and_when_to_use_it():
    silent = []
    for entry in registry:
        if entry.kind != "loss" or entry.family in ("distillation", "adapter"):
            continue
        text = " ".join(docstring(entry).split("Args:")[0].split())
        equation = ":math:" in text or re.search(r"``[^`]*[=/+(*][^`]*``", text) or entry.name in LIBRARIES
        if not (equation and re.search(r"\b[Ww]hen\b|\b[Uu]se (it|them)\b|\b[Ff]or \w+", text)):
            silent.append(entry.name)
    assert silent == []


def test_sparkline_spans_the_range():
    assert margin.sparkline(torch.linspace(0, 1, 8), width=8) == margin.SPARKS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["linear", "--plot", "x.png"], "has no margin"),
        (["focal", "--plot", "x.abc"], "can't be written as '.abc'"),
        (["focal", "--plot", "nowhere/x.png"], "can't write there"),
        (["focal", "--set", "gama=3", "--plot", "x.png"], "Did you mean 'gamma'"),
        (["focal", "--set", "gamma"], "has no value"),
    ],
)
def test_mistakes_with_plots(mistake, arguments, words):
    assert words in mistake("show", *arguments)


def test_docstring_is_split():
    text, described = split_docstring(
        "Head.\n\nArgs:\n    a: One\n        more.\n    b: Two.\n\nRaises:\n    E: Never."
    )
    assert described == {"a": "One more.", "b": "Two."}
    assert text == "Head.\n\nRaises:\n    E: Never."


def test_formulas_are_readable():
    assert readable(r":math:`\frac{a}{b} \le \gamma^{2}` and ``x``") == "(a)/(b) ≤γ^2 and x"
