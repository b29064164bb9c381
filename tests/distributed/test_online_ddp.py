"""Distillation on two gloo ranks: equal on both, BD-KD equal to one process on the joint batches."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from train_online import Net, network, samples, sequences

from lightning_lossplug.callbacks import read_report
from lightning_lossplug.distillation import DOT, create

SCRIPT = Path(__file__).parent / "train_online.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(SCRIPT.parent.parent.parent),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def by_hand():
    student, teacher, loss = Net().net, network(16, 5), create("bdkd")
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9) for n in (student, teacher)]
    for _ in range(2):
        for x, y in DataLoader(samples(), 16):
            z_s, z_t = student(x), teacher(x)
            terms = loss(z_s, z_t)
            for optimizer in optimizers:
                optimizer.zero_grad()
            (F.cross_entropy(z_s, y) + F.cross_entropy(z_t, y) + terms.student + terms.teachers[0]).backward()
            for optimizer in optimizers:
                optimizer.step()
    return student.state_dict(), teacher.state_dict()


def dot_by_hand():
    student, teacher, loss = Net().net, network(12, 7).eval(), create("kd")
    sgd = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    dot = DOT(sgd, 0.05)
    for _ in range(2):
        for x, y in DataLoader(samples(), 16):
            z, z_t = student(x), teacher(x)
            kd = loss(z, z_t)
            parts = torch.autograd.grad(kd, dot.parameters, retain_graph=True)
            sgd.zero_grad()
            (F.cross_entropy(z, y) + kd).backward()
            dot.prepare(parts)
            sgd.step()
            dot.restore()
    return student.state_dict()


def tokens_by_hand(joint):
    """The mean over all labelled tokens of all ranks and the whole window."""
    student, teacher, loss = Net().net, network(12, 7).eval(), create("kd")
    sgd = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for x, y in DataLoader(sequences(), joint):
            sgd.zero_grad()
            loss(student(x), teacher(x), y).backward()
            sgd.step()
    return student.state_dict()


def online_tokens_by_hand(joint):
    """The same for a teacher that learns."""
    student, teacher, loss = Net().net, network(12, 7), create("bdkd")
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9) for n in (student, teacher)]
    for _ in range(2):
        for x, y in DataLoader(sequences(), joint):
            for optimizer in optimizers:
                optimizer.zero_grad()
            terms = loss(student(x), teacher(x), y)
            (terms.student + terms.teachers[0]).backward()
            for optimizer in optimizers:
                optimizer.step()
    return student.state_dict(), teacher.state_dict()


def test_two_ranks(tmp_path):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    for name, parts in one.items():
        for part, state in parts.items():
            for key, value in state.items():
                # DDP gives every rank the student's batch statistics before a forward pass, not after it
                if "running" in key and (part == "net" or name in ("switokd", "fitnet")):
                    continue
                assert torch.equal(value, two[name][part][key]), (name, part, key)
                assert value.isfinite().all()
    for name, want in (("dot", dot_by_hand()), ("window", tokens_by_hand(32)), ("ranks", tokens_by_hand(16))):
        for key, value in want.items():
            torch.testing.assert_close(one[name]["net"][key], value, rtol=1e-4, atol=1e-5)
    for name, joint in (("online window", 32), ("online ranks", 16)):
        for part, want in zip(("net", "extras"), online_tokens_by_hand(joint), strict=True):
            for key, value in want.items():
                got = one[name][part]
                torch.testing.assert_close(got.get(key, got.get(f"0.{key}")), value, rtol=1e-4, atol=1e-5)
    assert one["plain"]["report"]["count"].sum() == len(samples())
    assert [row["epoch"] for row in read_report(tmp_path)] == [0, 1]
    student, teacher = by_hand()
    for got, want in ((one["plain"]["net"], student), (one["plain"]["extras"], teacher)):
        for key, value in want.items():
            found = got[key] if key in got else got[f"0.{key}"]
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
