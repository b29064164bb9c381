"""The attention over codes by Triton: its interpreter, compiled for GPUs without one, on one where there is one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import model_of, tokens
from test_kv_generate import HALF, factors_of

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache import ChannelShrunkCache
from lightning_lossplug.kv_cache import triton_attention

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(script, **environment):
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, str(Path(__file__).with_name(script))]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@needs_triton
def test_the_kernel_decodes_as_pytorch_does():
    assert run("triton_kv_cases.py", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")[-1] == "logits"


@needs_triton
def test_it_compiles_for_gpus_without_one():
    assert run("triton_kv_compile.py") == ["3", "kernels"]


def test_a_model_on_a_cpu_says_so():
    model = model_of("llama")
    with pytest.raises(LossplugError, match=r"Triton attention can't be used: .*attention='auto'"):
        ChannelShrunkCache(model, factors_of(model, HALF), attention="triton")


@pytest.mark.parametrize("failure", ["raises", "is wrong"])
@torch.no_grad()
def test_a_kernel_that_does_not_hold_is_left(failure, monkeypatch):
    def broken(query, *rest):
        if failure == "raises":
            raise RuntimeError("no such instruction\nmore")
        return torch.ones_like(query)

    monkeypatch.setattr(triton_attention, "triton_attention", broken)
    monkeypatch.setattr(triton_attention, "triton_fits", lambda tokens: True)
    model = model_of("llama")
    factors, ids, found = factors_of(model, HALF), tokens(2, 21), []
    for triton in (False, True):
        cache = ChannelShrunkCache(model, factors, attention="latent")
        model(input_ids=ids[:, :19], past_key_values=cache)
        logits = [model(input_ids=ids[:, 19:20], past_key_values=cache).logits]
        if triton:
            for layer in cache.shrunk_layers().values():
                layer.triton = True
            monkeypatch.setattr(triton_attention.attend, "known", {})
            with pytest.warns(UserWarning, match="can't be used: (no such instruction|it is off by)") as seen:
                logits.append(model(input_ids=ids[:, 20:], past_key_values=cache).logits)
            assert len(seen) == 1
        else:
            logits.append(model(input_ids=ids[:, 20:], past_key_values=cache).logits)
        found.append(logits[1])
    assert torch.equal(*found)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_on_a_gpu(dtype):
    model = model_of("llama")
    factors, ids = factors_of(model, HALF), tokens(2, 150)
    there = type(model)(model.config).to("cuda", dtype).eval()
    there.load_state_dict(model.state_dict())
    found = []
    for attention in ("latent", "triton"):
        cache = ChannelShrunkCache(there, factors, attention=attention)
        there(input_ids=ids[:, :140].cuda(), past_key_values=cache)
        rows = [there(input_ids=ids[:, t : t + 1].cuda(), past_key_values=cache).logits for t in range(140, 150)]
        found.append(torch.cat(rows, dim=1).float())
    assert all(triton_attention.attend.known.values())
    tolerance = 1e-3 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(*found, rtol=0, atol=tolerance * float(found[0].abs().amax()))
