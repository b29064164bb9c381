"""QAT and gradient-adaptive QAT on two gloo ranks: scales, masks and weights are equal on both."""

import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).parent / "train_qat.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(SCRIPT.parent.parent.parent),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def test_two_ranks(tmp_path):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    for name in ("qat", "gaqat", "attention"):
        for key, value in one[name].items():
            assert torch.equal(value, two[name][key]), key
            assert value.isfinite().all()
    for name in ("flips", "last", "frozen"):
        assert torch.equal(one["gate"][name], two["gate"][name])
    assert one["gate"]["fill"] == two["gate"]["fill"] == 0
    assert any(key.endswith("input_transforms.quantization.quantizer.s") for key in one["qat"])
    assert any(key.endswith("attention_transforms.quantization.key.s") for key in one["attention"])
