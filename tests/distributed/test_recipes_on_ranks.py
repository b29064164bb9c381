"""Every N:M recipe on two gloo ranks, DDP and FSDP2, with bf16, accumulation, clipping and a resume half-way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_recipes import EPOCHS, LAYERS, RECIPES

from lightning_lossplug import registry

SCRIPT = Path(__file__).parent / "train_recipes.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(SCRIPT.parent.parent.parent),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
REFUSED = {"fsdp2": {"nm_maskllm"}, "ddp": set()}


def test_every_recipe_is_here():
    assert set(RECIPES) == {entry.name for entry in registry if entry.kind == "recipe"}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_zeros_masks_and_resume_on_two_ranks(strategy, tmp_path):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), strategy, str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for recipe in RECIPES:
        one, two, resumed = first[recipe]["straight"], second[recipe]["straight"], first[recipe]["resumed"]
        if recipe in REFUSED[strategy]:
            assert "are sharded" in one["refused"]
            assert "\n" not in one["refused"]
            continue
        assert "refused" not in one, one
        assert one["step"] == resumed["step"] == 2 * EPOCHS
        for name in LAYERS:
            where = f"{recipe} {name}"
            mask = one["masks"][name]
            assert (mask.reshape(-1, 4).sum(1) == 2).all(), where
            assert not one["used"][name][~mask].any(), where
            for key in ("masks", "weights", "used"):
                assert torch.equal(one[key][name], two[key][name]), f"ranks differ in {key} of {where}"
                assert torch.equal(one[key][name], resumed[key][name]), f"resumed differs in {key} of {where}"
