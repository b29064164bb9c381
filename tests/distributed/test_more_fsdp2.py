"""QAT, and a teacher that learns, under FSDP2 on two gloo ranks: what DDP gives, and exact resume."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_qat_ddp import ENVIRONMENT

SCRIPT = Path(__file__).parent / "train_more_fsdp2.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """``{run: {how: state}}`` of both ranks."""
    folder = tmp_path_factory.mktemp("fsdp2")
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


RUNS = ["lsq", "many options", "attention", "ewgs", "dorefa, pact", "two bits", "self_compress", "gaqat"]
RUNS += ["gaqat, accumulated", "sam", "asam", "online", "together"]


@pytest.mark.timeout(700)
@pytest.mark.parametrize("root_only", [False, True])
@pytest.mark.parametrize("run", RUNS)
def test_it_is_what_ddp_gives(found, run, root_only):
    assert list(found[0]) == [*RUNS, "refused"]
    want = found[0][run]["ddp"]
    got = found[0][run][f"fsdp2, {root_only}"]
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], found[1][run][f"fsdp2, {root_only}"][key]), key
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert any(key.startswith("teacher.") for key in want) == (run in ("asam", "online", "together"))
    steps = [key for key in want if key.endswith("input_transforms.quantization.quantizer.seen")]
    assert all(want[key] >= 1 for key in steps)


@pytest.mark.timeout(700)
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("run", ["lsq", "gaqat", "sam"])
def test_resumed_runs_end_with_the_same_bits(found, run, shards):
    straight, resumed = (found[0][run][f"{how}, {shards}"] for how in ("straight", "resumed"))
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", ["SAM", "GradientAdaptiveQAT"])
def test_two_passes_refuse_tensor_parallelism(found, name):
    for rank in found:
        line = rank["refused"][name]
        assert "\n" not in line
        assert name in line
        assert "sharded by ModelParallelStrategy" in line
        assert "tensor_parallel_size=1" in line
