"""N:M masks under FSDP2 on two gloo ranks: equal to one process, zeros stay zero, a checkpoint goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_fsdp2 import LAYERS, MIDDLE, RECIPES, STEPS, Net, fit

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import load_plugged, read_checkpoint
from lightning_lossplug.surgery import latent, plugged_layers

SCRIPT = Path(__file__).parent / "train_fsdp2.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(SCRIPT.parent.parent.parent),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def test_two_shards_hold_the_masks_of_one_process(tmp_path):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for recipe in RECIPES:
        alone = fit(tmp_path, recipe, 1)
        one, two = first[recipe]["straight"], second[recipe]["straight"]
        resumed, shards = first[recipe]["resumed"], first[recipe]["from shards"]
        assert one["step"] == alone["step"] == resumed["step"] == shards["step"] == STEPS
        assert one["rows"] == {"net.0": 16, "net.2": 16, "net.4": 4}
        assert two["rows"]["net.4"] == 3
        assert one["health"][-6:] == resumed["health"][-6:]
        for ours, theirs in zip(one["health"], alone["health"], strict=True):  # whole weights, gradients and moments
            for key, value in theirs.items():
                assert ours[key] == (pytest.approx(value, rel=1e-3, abs=1e-6) if isinstance(value, float) else value)
        for name in LAYERS:
            mask = one["masks"][name]
            assert torch.equal(mask, two["masks"][name])
            assert torch.equal(mask, alone["masks"][name])
            assert (mask.reshape(-1, 4).sum(1) == 2).all()
            torch.testing.assert_close(one["weights"][name], alone["weights"][name], rtol=1e-4, atol=1e-6)
            assert (one["used"][name].reshape(-1, 4).count_nonzero(1) <= 2).all()
            assert torch.equal(one["used"][name], two["used"][name])
            assert torch.equal(one["weights"][name], resumed["weights"][name])
            assert torch.equal(mask, resumed["masks"][name])
            assert torch.equal(one["weights"][name], shards["weights"][name])
            assert torch.equal(mask, shards["masks"][name])
            if recipe == "nm_oneshot":
                assert not one["weights"][name][~mask].any()
            else:
                assert one["weights"][name][~mask].any()  # the dense weight lives on
    folder = tmp_path / "nm_srste_shards.ckpt"
    with pytest.raises(LossplugError, match=r"a folder of shards\. Make one file of it"):
        read_checkpoint(folder)
    module = "lightning.fabric.utilities.consolidate_checkpoint"
    subprocess.run([sys.executable, "-m", module, str(folder)], env=ENVIRONMENT, check=True, timeout=100)
    assert torch.load(tmp_path / "nm_srste.ckpt", weights_only=True)["global_step"] == MIDDLE
    whole, single = (  # the second file is by now that of the run on one process
        dict(plugged_layers(load_plugged(Net(False), tmp_path / name)))
        for name in ("nm_srste_shards.ckpt.consolidated", "nm_srste.ckpt")
    )
    for name in LAYERS:
        torch.testing.assert_close(latent(whole[name]), latent(single[name]), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(whole[name].weight, single[name].weight, rtol=1e-4, atol=1e-6)
        assert torch.equal(whole[name].weight == 0, single[name].weight == 0)
