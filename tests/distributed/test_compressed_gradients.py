"""Compressed gradients between two gloo processes: against the definition in float64, buckets, faults, resuming."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_compressed import COMPRESSORS, LR, MIN_NUMEL, RULES, SHAPES, STEPS, TRAINED, pieces

from lightning_lossplug.communication import Draw, create, create_rule

SCRIPT = Path(__file__).parent / "train_compressed.py"
ROOT = SCRIPT.parent.parent.parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed")
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    found[0]["printed"] = run.stderr
    return found


def reference(rule, compressor, steps=STEPS):
    """Gradient descent on the mean of the quadratics; small tensors exact, the others by the rule in one process."""
    parts, small = [pieces(rank) for rank in range(2)], []
    x = [torch.ones(shape, dtype=torch.float64) for shape in SHAPES.values()]
    states = [[None, None] for _ in x]
    for step in range(steps):
        for place, name in enumerate(SHAPES):
            grads = [part[place][0] * (x[place] - part[place][1]) for part in parts]
            taken = x[place].numel() >= MIN_NUMEL and compressor.message_bytes(x[place].shape, 8) <= x[place].nbytes
            if taken:
                out, states[place] = rule.step(states[place], grads, compressor, Draw(5, step, name))
            else:
                small.append(name)
                out = sum(grads) / 2
            x[place] = x[place] - LR * out
    return dict(zip(SHAPES, x, strict=True)), set(small)


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("rule", RULES)
def test_trajectories_are_those_of_the_definition(ranks, rule, compressor):
    expected, small = reference(create_rule(rule, **RULES[rule]), create(compressor, **COMPRESSORS[compressor]))
    assert "c" in small
    one, two = (found["hooks"][rule, compressor][0] for found in ranks)
    for name, value in expected.items():
        torch.testing.assert_close(one[name], value, rtol=1e-10, atol=1e-10)
        assert torch.equal(one[name], two[name])  # bit by bit on both ranks


def test_in_float32_too(ranks):
    expected, _ = reference(create_rule("econtrol"), create("topk", ratio=0.1))
    for name, value in expected.items():
        torch.testing.assert_close(ranks[0]["hooks"]["float32"][name].double(), value, rtol=1e-5, atol=1e-5)


def test_bytes_are_those_handed_to_collectives(ranks):
    _, sent, dense = ranks[0]["hooks"]["ef21", "topk"]
    # A bucket takes one flag for non-finite gradients; DDP splits these parameters into at most three.
    per_step = (3 + 4) * (8 + 4) + 3 * 8
    assert dense == STEPS * 73 * 8
    assert STEPS * (per_step + 8) <= sent <= STEPS * (per_step + 3 * 8)


def test_buckets_do_not_matter(ranks):
    found = ranks[0]["hooks"]
    assert same(found["small buckets"], found["large buckets"])


def test_accumulated_gradients_are_exchanged_once(ranks):
    found = ranks[0]["hooks"]
    for name, value in found["large buckets"].items():
        torch.testing.assert_close(found["accumulated"][name], value, rtol=1e-12, atol=1e-12)


def test_a_nan_on_one_rank_moves_no_state_on_any(ranks):
    for found in ranks:
        assert found["hooks"]["skipped"] == 1
        assert same(found["hooks"]["spiked"], found["hooks"]["large buckets"])


def test_the_average_stays_that_of_the_estimates(ranks):
    one, two = (found["hooks"]["long"] for found in ranks)
    for name in one:
        mean = (one[name]["estimate"] + two[name]["estimate"]) / 2
        assert float((one[name]["average"] - mean).norm() / one[name]["estimate"].norm()) < 1e-5
        assert torch.equal(one[name]["average"], two[name]["average"])


@pytest.mark.parametrize("name", TRAINED)
def test_resumed_is_bit_identical(ranks, name):
    for found in ranks:
        straight, resumed = found[name]
        assert same(straight["net"], resumed["net"])
        assert straight["step"] == resumed["step"] == 16
        assert straight["states"].keys() == resumed["states"].keys() == {"net.0.weight", "net.0.bias", "net.2.weight"}
        for key, state in straight["states"].items():
            assert same(state, resumed["states"][key])
    assert same(ranks[0][name][0]["net"], ranks[1][name][0]["net"])


def test_one_process_in_between(ranks):
    alone, again = ranks[0]["alone"], [found["again"] for found in ranks]
    assert alone["step"] == 16
    for key, state in alone["states"].items():
        for found in again:
            for name in ("average", "estimate", "momentum"):
                assert torch.equal(found[key][name], state["average"])
    assert same(ranks[0]["longer"]["net"], ranks[1]["longer"]["net"])
    assert ranks[0]["longer"]["step"] == 24
    assert "written by 2 processes, now there are 1" in ranks[0]["printed"]


def test_what_is_logged(ranks):
    logged = ranks[0]["topk"][0]["logged"]
    assert 0.04 < logged["CompressedGradients/share_of_dense"] < 0.25
    assert logged["CompressedGradients/bytes_sent"] > 0
    assert 0 < logged["CompressedGradients/relative_error"] < 1
    assert logged["CompressedGradients/skipped_steps"] == 0


def test_a_checkpoint_of_another_rule_is_refused(ranks):
    assert "holds the state of 'ef21_sgdm', the run uses 'ef14'" in ranks[0]["other rule"]


def test_local_rounds_resume_from_their_middle(ranks):
    for found in ranks:
        straight, resumed = found["local"]["straight"], found["local"]["resumed"]
        assert same(straight["net"], resumed["net"])
        assert straight["step"] == resumed["step"] == 6  # rounds of 3, 3 and 2 steps, twice
        assert all(same(state, resumed["states"][name]) for name, state in straight["states"].items())
    for name in ("straight", "scallion", "every step"):
        assert same(ranks[0]["local"][name]["net"], ranks[1]["local"][name]["net"])
    one, two = (found["local"]["straight"]["states"]["net.0.weight"] for found in ranks)
    assert torch.equal(one["average"], two["average"])
    torch.testing.assert_close(one["average"], (one["control"] + two["control"]) / 2)


def test_messages_at_every_step_without_compression_are_plain_ddp(ranks):
    found, plain = ranks[0]["local"]["every step"]["net"], ranks[0]["local"]["plain"]["net"]
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_strategy_is_the_callback(ranks):
    for found in ranks:
        strategies = found["strategy"]
        for form in ("strategy", "resumed"):
            assert same(strategies[form]["net"], strategies["callback"]["net"]), form
            assert strategies[form]["step"] == strategies["callback"]["step"]
        assert strategies["name"]["logged"]["CompressedGradients/skipped_steps"] == 0
    assert same(ranks[0]["strategy"]["name"]["net"], ranks[1]["strategy"]["name"]["net"])
