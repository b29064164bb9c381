"""SAM on two gloo ranks: equal on both, equal to one process on the joint batches, and no rank is left waiting."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from train_sam import RHO, Net, samples

SCRIPT = Path(__file__).parent / "train_sam.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(SCRIPT.parent.parent.parent),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def by_hand():
    net = copy.deepcopy(Net().net)
    params = list(net.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for x, y in DataLoader(samples(), 16):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        norm = nn.utils.get_total_norm([p.grad for p in params])
        old = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p.add_(RHO * p.grad / (norm + 1e-12))
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            for p, o in zip(params, old, strict=True):
                p.copy_(o)
        optimizer.step()
    return net.state_dict()


def test_two_ranks(tmp_path):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    for name, passes in (("plain", 8), ("spiked", 7)):  # the step with the spike has one pass, on both ranks
        assert len(one[name]["seen"]) == len(two[name]["seen"]) == passes
        for a, b in zip(one[name]["seen"], two[name]["seen"], strict=True):
            assert torch.equal(a, b)  # the perturbed weights too
        for key, value in one[name]["net"].items():
            assert torch.equal(value, two[name]["net"][key])
            assert value.isfinite().all()
    assert one["scale"] == two["scale"] == 128.0
    expected = by_hand()
    for key, value in one["plain"]["net"].items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
