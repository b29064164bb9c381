"""Time and temporary memory of ``nm_mask`` against the textbook way (argsort, then scatter), interleaved.

Run it with ``python tests/benchmarks/bench_nm_mask.py``; a table is printed, ``--json FILE`` writes it as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_lossplug.sparsity import nm_mask

PATTERNS = [
    "1:4",
    "2:4",
    "1:8",
    "2:8",
    "4:8",
    "7:8",
    "1:16",
    "2:16",
    "4:16",
    "8:16",
    "15:16",
    "1:32",
    "2:32",
    "31:32",
    "8:64",
    "16:128",
]


def by_argsort(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    moved = weight.movedim(axis, -1)
    groups = moved.abs().reshape(-1, m)
    smallest = groups.argsort(dim=1)[:, : m - n]
    mask = torch.ones_like(groups, dtype=torch.bool).scatter_(1, smallest, False)
    return mask.view(moved.shape).movedim(-1, axis)


def temporaries(call: Callable[[], Tensor]) -> int:
    """Bytes allocated at the worst moment, without the result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = profile.profiler.kineto_results.events()
    now = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += size
        peak = max(peak, now)
    return peak - result.numel() * result.element_size()


def measure(weight: Tensor, n: int, m: int, axis: int, rounds: int) -> dict[str, float]:
    ways = {
        "nm_mask": lambda: nm_mask(weight, n, m, axis),
        "argsort": lambda: by_argsort(weight, n, m, axis),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()
    for turn in range(rounds):
        for name in sorted(ways, reverse=bool(turn % 2)):
            begin = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - begin)
    row = {f"{name}_ms": 1e3 * statistics.median(times) for name, times in seconds.items()}
    row |= {f"{name}_best_ms": 1e3 * min(times) for name, times in seconds.items()}
    row["ratio"] = row["argsort_ms"] / row["nm_mask_ms"]
    row["ratio_best"] = row["argsort_best_ms"] / row["nm_mask_best_ms"]
    row |= {f"{name}_temporary_mib": temporaries(call) / 2**20 for name, call in ways.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs="+", default=[4096, 4096])
    parser.add_argument("--axis", type=int, default=1, help="the group axis")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, metavar="N:M")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    weight = torch.randn(options.shape).to(getattr(torch, options.dtype))
    what = f"{tuple(weight.shape)} {options.dtype}, axis {options.axis}, {options.threads} threads, ms, MiB"
    print(what, file=sys.stderr)
    print(f"{'N:M':>7}{'nm_mask':>9}{'argsort':>9}{'ratio':>7}{'best':>7}{'temp.':>8}{'temp.':>8}{'load':>6}")
    rows = []
    for pattern in options.patterns:
        n, m = (int(number) for number in pattern.split(":"))
        row = {"pattern": pattern, **measure(weight, n, m, options.axis, options.rounds), "load": os.getloadavg()[0]}
        rows.append(row)
        print(
            f"{pattern:>7}{row['nm_mask_ms']:9.1f}{row['argsort_ms']:9.1f}{row['ratio']:6.1f}x{row['ratio_best']:6.1f}x"
            f"{row['nm_mask_temporary_mib']:8.1f}{row['argsort_temporary_mib']:8.1f}{row['load']:6.1f}",
            flush=True,
        )
    if options.json:
        setup = {key: str(value) for key, value in vars(options).items()} | {"torch": torch.__version__}
        options.json.write_text(json.dumps({"setup": setup, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
