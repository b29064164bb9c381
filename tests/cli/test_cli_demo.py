"""``lossplug demo`` in a short form: the same path, one epoch."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def demo(cli):
    done = cli("demo", "--epochs", "1", "--output", "out")
    assert done.code == 0, done
    return done


def test_it_trains_compares_exports_and_draws(demo, cli):
    results = json.loads(Path("out/results.json").read_text())
    assert [record["name"] for record in results["runs"]] == ["dense", "2:4, SR-STE", "1:16, mask decay"]
    dense, half, least = results["runs"]
    assert dense["sparsity"] < 1e-3
    assert 0.4 < half["sparsity"] < 0.5
    assert 0.85 < least["sparsity"] < 0.95
    assert half["layers"]["blocks.0.mlp.fc1.weight"] == 0.5
    assert least["layers"]["blocks.0.mlp.fc1.weight"] == pytest.approx(15 / 16)
    assert least["nominal_bytes"] < half["nominal_bytes"] < dense["nominal_bytes"] == dense["bytes"]
    assert results["artifact"]["loaded_without_package"]["max_difference"] == 0.0
    assert results["artifact"]["loaded_without_package"]["accuracy"] == pytest.approx(least["accuracy"])
    assert all(record["curves"]["accuracy"] for record in results["runs"])
    assert Path("out/comparison.png").read_bytes().startswith(b"\x89PNG")
    assert demo.err == ""
    assert all(name in demo.out for name in ("dense", "2:4, SR-STE", "1:16, mask decay", "out/comparison.png"))
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["out"]


@pytest.mark.parametrize("output", ["/proc/nowhere", __file__])
def test_a_bad_output_is_refused_before_training(mistake, output):
    mistake("demo", "--output", output)


def test_other_peoples_folders_are_left_alone(mistake):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("keep")
    assert "holds other files" in mistake("demo", "--output", "mine")
