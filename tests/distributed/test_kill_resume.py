"""SIGKILL at an arbitrary moment, then resume: weights, masks and logs are those of a run never killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "train.py"
ROOT = SCRIPT.parent.parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(folder, *options):
    command = [sys.executable, str(SCRIPT), str(folder), *map(str, options)]
    with (folder.parent / f"{folder.name}.out").open("a") as out:
        # Its own process group, so that a kill takes the second rank with it, as a lost machine would.
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=out, start_new_session=True)


def finish(folder, *options):
    process = start(folder, *options)
    assert process.wait(300) == 0, (folder.parent / f"{folder.name}.out").read_text()[-3000:]


def lines(folder):
    log = folder / "log.jsonl"
    return log.read_text().splitlines() if log.exists() else []


def kill_after(folder, count, delay, *options):
    """Starts a run and kills it ``delay`` seconds after its ``count``-th logged batch, and after a first checkpoint."""
    process = start(folder, "--slow", 0.02, *options)
    while len(lines(folder)) < count or not (folder / "last.ckpt").exists():
        assert process.poll() is None, (folder.parent / f"{folder.name}.out").read_text()[-3000:]
        time.sleep(0.002)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check(straight, killed):
    finals = sorted(straight.glob("final_*.pt"))
    for final in finals:
        for key, value in torch.load(final).items():
            assert torch.equal(value, torch.load(finals[0])[key]), f"ranks differ in {key}"
        a, b = torch.load(final), torch.load(killed / final.name)
        assert a.keys() == b.keys()
        assert any(key.endswith("sparsity.bits") for key in a)
        for key in a:
            assert torch.equal(a[key], b[key]), key
    want = {(x["step"], x["batch"]): x for x in map(json.loads, lines(straight))}
    got = {(x["step"], x["batch"]): x for x in map(json.loads, lines(killed))}
    assert got == want


def trial(tmp_path, devices, recipe, seed, score="magnitude"):
    options = ("--devices", devices, "--recipe", recipe, "--score", score)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    finish(straight, *options)
    batches = len(lines(straight))
    generator = random.Random(seed)
    count, delay = generator.randint(7, batches - 3), generator.uniform(0, 0.05)
    kill_after(killed, count, delay, *options)
    assert not list(killed.glob("final_*.pt"))
    finish(killed, *options)
    check(straight, killed)


@pytest.mark.parametrize(("devices", "recipe"), [(1, "nm_srste"), (2, "mdgf_linear")])
def test_killed_and_resumed(devices, recipe, tmp_path):
    seed = random.randrange(1000)
    print(f"seed {seed}")
    trial(tmp_path, devices, recipe, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    "recipe",
    [
        *("nm_oneshot", "nm_ste", "nm_srste", "mdgf_exponential", "sdgf_stepwise", "sdgf_geometric"),
        *("nm_sste", "nm_transposable", "nm_tsrste", "nm_bimask", "nm_maskllm", "nm_cast"),
    ],
)
def test_killed_and_resumed_at_random_steps(recipe, devices, seed, tmp_path):
    trial(tmp_path, devices, recipe, seed)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(("recipe", "score"), [("nm_ste", "wanda"), ("nm_srste", "gradient"), ("nm_oneshot", "wanda")])
def test_killed_and_resumed_with_scores(recipe, score, devices, tmp_path):
    trial(tmp_path, devices, recipe, random.randrange(1000), score)
