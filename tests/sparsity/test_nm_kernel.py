"""The N:M kernel by Triton's interpreter, compiled, and on a GPU where there is one; ``nm_apply`` against its parts."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_lossplug import LossplugError
from lightning_lossplug.sparsity import decayed_ste, nm_apply, nm_mask, pack_rows

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(script, **environment):
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, str(Path(__file__).with_name(script))]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@needs_triton
def test_the_kernel_equals_the_passes_in_torch():
    assert run("triton_nm_cases.py", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="") == ["63", "weights"]


@needs_triton
def test_it_compiles_for_gpus_without_one():
    assert run("triton_nm_compile.py") == ["24", "kernels"]


def test_nm_apply_is_mask_weight_and_pull():
    weight, grad = torch.randn(6, 16).double(), torch.randn(6, 16).double()
    mask, used = nm_apply(weight, 2, 8, decay=0.3, grad=(after := grad.clone()), lambda_w=0.7)
    assert torch.equal(mask, nm_mask(weight, 2, 8))
    assert torch.equal(used, decayed_ste(weight, mask, 0.3))
    assert torch.allclose(after, grad + 0.7 * ~mask * weight)
    assert not nm_apply(weight, 2, 8)[1][~mask].any()
    assert torch.equal(nm_apply(weight, 2, 8, packed=True)[0], pack_rows(mask))
    with pytest.raises(LossplugError, match="decay=2 is outside"):
        nm_apply(weight, 2, 8, decay=2)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 32), (8, 64)])
def test_on_a_gpu(n, m, dtype):
    weight, grad = (torch.randn(96, 256, 3, dtype=dtype) for _ in range(2))
    expected, there = grad.clone(), grad.cuda()
    ours, theirs = nm_apply(weight, n, m, 1, 0.5, expected, 0.1), nm_apply(weight.cuda(), n, m, 1, 0.5, there, 0.1)
    for a, b in zip((*ours, expected), (*theirs, there), strict=True):
        torch.testing.assert_close(a, b.cpu())
    flat = weight.flatten(1)
    assert torch.equal(nm_apply(flat.cuda(), n, m, packed=True)[0].cpu(), pack_rows(nm_mask(flat, n, m)))
