"""Other libraries' kernels behind the fused head: when they serve, what is said when not, and which one is taken."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import CrossEntropy, create, fused_linear
from lightning_lossplug.losses.fused import engines
from lightning_lossplug.losses.fused.engines import PACKAGES, Ask, choose, describe, fastest, obstacle
from lightning_lossplug.losses.fused.linear import head_loss
from lightning_lossplug.losses.fused.objective import Objective

ENGINES = pytest.mark.parametrize("engine", PACKAGES)


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    h, w = torch.randn(6, 4, dtype=dtype, requires_grad=True), torch.randn(9, 4, dtype=dtype, requires_grad=True)
    return h, w, torch.randint(9, (6,))


def ask(loss=None, dtype=torch.bfloat16, bias=None, **objective):
    h, w, y = problem(dtype)
    return Ask(h, w, bias, Objective(loss or CrossEntropy(), y, **objective), torch.ones(()))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Nothing is computed with it: only the choice among what could."""
    monkeypatch.setattr(engines, "installed", lambda engine: True)
    monkeypatch.setattr(engines, "on_gpu", lambda hidden: True)
    monkeypatch.setattr(engines, "_cce_parameters", lambda: {"softcap": None})


@ENGINES
def test_what_is_missing_is_said_in_one_line(engine, monkeypatch):
    monkeypatch.setattr(engines, "installed", lambda engine: False)
    with pytest.raises(LossplugError, match=f"needs the package '{PACKAGES[engine]}'"):
        fused_linear(*problem(), backend=engine)
    monkeypatch.setattr(engines, "installed", lambda engine: True)
    with pytest.raises(LossplugError, match=f"{engine!r} runs on CUDA only, the hidden states are on cpu") as caught:
        fused_linear(*problem(), backend=engine)
    assert "\n" not in str(caught.value)
    with pytest.raises(LossplugError, match="gradients of a scalar"):
        fused_linear(*problem(), backend=engine, reduction="none")


@ENGINES
def test_only_what_an_engine_computes_goes_to_it(engine, as_on_a_gpu):
    assert obstacle(engine, ask()) is None
    assert "cross-entropy only, not Focal" in obstacle(engine, ask(create("focal")))
    assert "float64" in obstacle(engine, ask(dtype=torch.float64))
    weights = {"class_weight": torch.ones(9)}
    assert obstacle(engine, ask(**weights)) is None
    assert "smoothing" in obstacle(engine, ask(CrossEntropy(0.1), **weights))


def test_limits_of_one_engine(as_on_a_gpu):
    assert "sample weights" in obstacle("liger", ask(row_weight=torch.ones(6)))
    assert obstacle("cce", ask(row_weight=torch.ones(6))) is None
    assert obstacle("liger", ask(dtype=torch.float32)) is None
    assert "half precision only" in obstacle("cce", ask(dtype=torch.float32))
    assert "no bias" in obstacle("cce", ask(bias=torch.zeros(9)))
    assert obstacle("liger", ask(bias=torch.zeros(9))) is None


def test_the_fastest_that_works_is_taken(caplog):
    def broken():
        raise RuntimeError("no kernel")

    import time

    runs = {"rows": lambda: time.sleep(0.004), "liger": broken, "tiles": lambda: None}
    with caplog.at_level(logging.INFO):
        assert fastest(runs) == "tiles"
    assert "liger" in caplog.text
    assert "no kernel" in caplog.text
    with pytest.raises(RuntimeError, match="no kernel"):
        fastest({"rows": broken, "tiles": lambda: None})


def test_without_a_gpu_or_with_determinism_the_own_path_is_taken(as_on_a_gpu, monkeypatch):
    tried = []
    monkeypatch.setattr(engines, "fastest", lambda runs: tried.append(list(runs)) or "liger")
    monkeypatch.setattr(engines, "_chosen", {})
    assert choose(ask()) == "liger"
    assert tried == [["rows", "liger"]]  # this cut-cross-entropy has no float32 accumulator
    choose(ask())
    assert len(tried) == 1  # once per size
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(ask()) == "rows"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(engines, "on_gpu", lambda hidden: False)
    assert choose(ask()) == "rows"


def test_the_own_paths_say_which_they_are():
    h, w, y = problem()
    assert head_loss(h, w, y).engine == "rows"
    assert head_loss(h, w, y, reduction="none").engine == "tiles"
    assert head_loss(h.detach(), w.detach(), y).engine == "tiles"
    assert "own" in describe("rows")


def test_gradient_filtering():
    h, w, y = problem()
    assert torch.equal(fused_linear(h, w, y, filter_eps=0.0), fused_linear(h, w, y))
    for bad in (-1.0, "high"):
        with pytest.raises(LossplugError, match="filter_eps"):
            create("linear_cross_entropy", filter_eps=bad)
    with pytest.raises(LossplugError, match="'rows' has no gradient filtering"):
        create("linear_cross_entropy", filter_eps="auto", backend="rows")
    with pytest.raises(LossplugError, match=r"filter_eps='auto' is for the backend 'cce'.*Leave it None"):
        create("linear_cross_entropy", filter_eps="auto")(h, w, y)


def test_installed_engines_equal_the_own_head():
    """By Triton's interpreter; which are compared depends on what is installed (the extra ``dev`` brings Liger)."""
    script = Path(__file__).with_name("engine_cases.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [name for name in PACKAGES if engines.installed(name)]


@ENGINES
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_engines_on_a_gpu(engine):
    if not engines.installed(engine):
        pytest.skip(f"{PACKAGES[engine]} is not installed")
    torch.manual_seed(0)
    h, w = torch.randn(64, 128, device="cuda"), torch.randn(1000, 128, device="cuda") / 10
    h, w = (t.bfloat16().requires_grad_() for t in (h, w))
    y = torch.randint(1000, (64,), device="cuda").index_fill(0, torch.tensor([3], device="cuda"), -100)
    found = [fused_linear(h, w, y, backend=b, softcap=20.0, denominator=50.0) for b in ("rows", engine)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    for own, theirs in zip(*(torch.autograd.grad(value, (h, w)) for value in found), strict=True):
        torch.testing.assert_close(own, theirs, rtol=3e-2, atol=1e-3)
    assert head_loss(h, w, y).engine in ("rows", engine, *PACKAGES)
