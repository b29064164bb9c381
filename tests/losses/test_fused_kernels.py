"""The Triton kernels, by Triton's interpreter in a process of its own, and on a GPU where there is one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_lossplug.losses import create, fused_linear

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_kernels_equal_the_passes_in_torch():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("triton_cases.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["72", "tiles,", "20", "heads"]


@needs_triton
def test_kernels_compile_for_gpus_without_one():
    script = Path(__file__).with_name("triton_compile.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["20", "kernels"]


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["rows", "tiles"])
@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "z_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(backend, loss, dtype):
    torch.manual_seed(0)
    h = torch.randn(300, 64, device="cuda").to(dtype).requires_grad_()
    w = torch.randn(5000, 64, device="cuda").to(dtype).requires_grad_()
    y = torch.randint(5000, (300,), device="cuda")
    y[::7] = -100
    built = create(loss)
    h64, w64 = (t.detach().double().requires_grad_() for t in (h, w))
    expected = torch.autograd.grad(built(F.linear(h64, w64), y), (h64, w64))
    found = torch.autograd.grad(fused_linear(h, w, y, built, backend=backend, tile=128), (h, w))
    for one, two in zip(found, expected, strict=True):
        assert (one.double() - two).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-4) * two.norm()
