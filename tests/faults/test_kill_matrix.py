"""The kill/resume matrix: every callback on one process, under DDP and under FSDP2, bit for bit or refused in a line.

``LOSSPLUG_KILL_TRIALS=100 pytest -m slow tests/faults`` runs the full form and prints trials and failures.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_lossplug.registry import registry

SCRIPT = Path(__file__).parent / "kill_matrix.py"
TESTS = SCRIPT.parent.parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS))),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
EVERY = int(os.environ.get("LOSSPLUG_KILL_TRIALS", "10"))
QUICK = {  # what the default run takes; every callback with every strategy is in the slow form
    "single": [],
    "ddp": [
        *("NMSparsity", "QAT", "GradientAdaptiveQAT", "OnlineDistillation", "SelfDistillation"),
        *("CompressedGradients", "LocalUpdates", "MoEBalancing", "together"),
    ],
    "fsdp2": [
        *("NMSparsity", "Distillation", "QAT", "GradientAdaptiveQAT", "OnlineDistillation", "SelfDistillation"),
        *("SAM", "CompressedGradients", "LocalUpdates", "KVChannelShrink", "together"),
    ],
}
REFUSED = {
    **dict.fromkeys(
        [("SelfDistillation", "fsdp2")],
        "is not supported with Model",
    ),
    **dict.fromkeys([("CompressedGradients", "fsdp2"), ("LocalUpdates", "fsdp2")], "no communication hook for them"),
    ("KVChannelShrink", "fsdp2"): "parameters are sharded by ModelParallel",
}


def matrix(folder, *options, timeout=580):
    command = [sys.executable, str(SCRIPT), str(folder), *map(str, options)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(rows):
    for row in rows:
        case = row["case"], row["strategy"]
        assert not row["failures"], row
        if case in REFUSED:
            assert REFUSED[case] in row["refused"], row
            assert len(row["refused"].splitlines()) == 1
        else:
            assert "refused" not in row, row
            assert row["trials"] > 0


def test_the_table_is_complete():
    from kill_matrix import CASES

    assert {entry.name for entry in registry if entry.kind == "callback"} == set(CASES) - {"together"}


@pytest.mark.parametrize("strategy", QUICK)
def test_killed_once(strategy, tmp_path):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chosen = ["--callbacks", *QUICK[strategy]] if QUICK[strategy] else []
    check(matrix(tmp_path, "--strategies", strategy, "--seed", seed, *chosen))


def test_ten_kills_of_everything_together(tmp_path):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    (row,) = matrix(
        tmp_path, "--strategies", "single", "--callbacks", "together", "--trials", 5, "--kills", 2, "--seed", seed
    )
    check([row])
    assert row["kills"] > 0


def test_a_rank_that_is_lost_ends_the_others_and_the_run_goes_on(tmp_path):
    check(matrix(tmp_path, "--lose-a-rank", "--strategies", "ddp", "--callbacks", "NMSparsity", "CompressedGradients"))


PER_RANK = ("CompressedGradients", "LocalUpdates")  # what has state that differs between processes


EXCHANGED_TWICE = ("SAM", "GradientAdaptiveQAT", "LocalUpdates")


def pairs(rows):
    for row in rows:
        assert not row["failures"], row
        one, two = row["case"].split("+")
        if two in EXCHANGED_TWICE:
            assert f"{one}: " in row["refused"] or f"{two}: " in row["refused"], row
            assert len(row["refused"].splitlines()) == 1
        else:
            assert "refused" not in row, row


def test_compressed_gradients_beside_every_other(tmp_path):
    pairs(matrix(tmp_path, "--pairs", "--callbacks", "CompressedGradients"))


@pytest.mark.slow
def test_local_updates_beside_every_other(tmp_path):
    pairs(matrix(tmp_path, "--pairs", "--callbacks", "LocalUpdates"))


def test_another_number_of_processes_goes_on(tmp_path):
    elastic(matrix(tmp_path, "--elastic", "--callbacks", *PER_RANK, "NMSparsity", "OnlineDistillation"))


def elastic(rows):
    for row in rows:
        assert not row["failures"], row
        assert "refused" not in row, row
        assert row["step"] == 16, row  # 8 on the first number of processes, 8 on the second


@pytest.mark.slow
def test_every_callback_with_another_number_of_processes(tmp_path):
    elastic(matrix(tmp_path, "--elastic"))


@pytest.mark.slow
@pytest.mark.timeout(36_000)
def test_every_callback_many_times(tmp_path, capsys):
    seed = random.randrange(10**6)
    rows = matrix(tmp_path, "--trials", EVERY, "--kills", 2, "--seed", seed, timeout=35_000)
    with capsys.disabled():
        for row in rows:
            print(row)
        total = sum(row["trials"] for row in rows)
        print(f"seed {seed}: {total} trials, {sum(row['kills'] for row in rows)} kills, ", end="")
        print(f"{sum(bool(row['failures']) for row in rows)} cases with failures")
    check(rows)
