"""Time, memory and accuracy of a linear head's loss: materialised, by ``fused_linear``, and by other libraries.

    python tests/benchmarks/bench_fused_linear.py --shapes 4096x576x49152 --dtypes float32 bfloat16 --json out.json
    python tests/benchmarks/bench_fused_linear.py --device cuda --shapes 8192x4096x128256 --dtypes bfloat16

Methods run interleaved, forward and backward. On a CPU ``cpu`` is process time over the number of threads, the number
to compare on a shared machine (set ``OMP_WAIT_POLICY=passive`` there, or waiting threads are counted as working); on a
GPU ``wall`` is measured with events. ``peak`` is the memory above the inputs in MiB, gradients included. ``--check``
compares loss and gradients with float64 on a part of the rows and the vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from lightning_lossplug.losses import create
from lightning_lossplug.losses.fused import blocks, fused_linear

Method = Callable[..., torch.Tensor]


def plain(h, w, y, loss):
    logits = (h @ w.T).float() if h.dtype != torch.float64 else h @ w.T
    if loss == "cross_entropy":
        return F.cross_entropy(logits, y)
    return create(loss)(logits, y)


def without_kernels(method: Method) -> Method:
    def run(*args):
        uses_kernels, blocks.uses_kernels = blocks.uses_kernels, lambda z: False
        try:
            return method(*args)
        finally:
            blocks.uses_kernels = uses_kernels

    return run  # forward only: the tiles' backward uses the kernels again


def methods(device: str) -> dict[str, Method]:
    found: dict[str, Method] = {"plain": plain}
    for backend in ("rows", "tiles"):
        found[backend] = lambda h, w, y, loss, backend=backend: fused_linear(h, w, y, loss, backend=backend)
        if device == "cuda":
            found[f"{backend}_no_triton"] = without_kernels(found[backend])
    compiled = torch.compile(lambda h, w, y: F.cross_entropy((h @ w.T).float(), y))
    found["torch.compile"] = lambda h, w, y, loss: compiled(h, w, y)
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
        found["builtin"] = lambda h, w, y, loss: F.linear_cross_entropy(h, w, y, options=options)
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda h, w, y, loss: liger(w, h, y)
    if device == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cce"] = lambda h, w, y, loss: linear_cross_entropy(h, w, y)
        found["cce_exact"] = lambda h, w, y, loss: linear_cross_entropy(h, w, y, impl="cce_exact")
    return found


ALL = ("plain", "rows", "tiles", "rows_no_triton", "tiles_no_triton", "builtin", "liger", "cce", "cce_exact")
ONLY_CROSS_ENTROPY = {"torch.compile", "builtin", "liger", "cce", "cce_exact"}


def problem(shape: tuple[int, int, int], dtype: torch.dtype, device: str, ignored: float = 0.02):
    n, d, v = shape
    torch.manual_seed(0)
    h = torch.randn(n, d, device=device)
    w = torch.randn(v, d, device=device) * d**-0.5
    y = torch.randint(v, (n,), device=device)
    # A trained head puts some of its mass on the label: half of the rows lean towards theirs.
    h[::2] += 2 * w[y[::2]]
    y[torch.rand(n, device=device) < ignored] = -100
    return h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), y


def memory_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise RuntimeError(key)


def run_once(method: Method, h, w, y, loss: str, device: str) -> dict[str, float]:
    h.grad = w.grad = None
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        method(h, w, y, loss).backward()
        end.record()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - base) / 2**20
        return {"wall": begin.elapsed_time(end) / 1e3, "peak": peak}
    Path("/proc/self/clear_refs").write_text("5")
    base = memory_kib("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    method(h, w, y, loss).backward()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall, "cpu": cpu / torch.get_num_threads(), "peak": (memory_kib("VmHWM") - base) / 1024}


def measure(shape, dtype, loss, device, repeats, warmup, names) -> dict[str, dict[str, float]]:
    h, w, y = problem(shape, dtype, device)
    chosen = {
        n: m
        for n, m in methods(device).items()
        if n in names and (loss == "cross_entropy" or n not in ONLY_CROSS_ENTROPY)
    }
    runs: dict[str, list[dict[str, float]]] = {}
    for turn in range(repeats + warmup):
        for name, method in list(chosen.items()):
            try:
                result = run_once(method, h, w, y, loss, device)
            except Exception as error:  # a library that cannot do this case is part of the result
                print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
                del chosen[name]
                continue
            if turn >= warmup:
                runs.setdefault(name, []).append(result)
    summary = {}
    for name, results in runs.items():
        summary[name] = {"peak": statistics.median(r["peak"] for r in results)}
        for key in ("wall", "cpu"):
            if key in results[0]:
                values = [r[key] for r in results]
                summary[name][f"{key}_min"] = min(values)
                summary[name][f"{key}_median"] = statistics.median(values)
    return summary


def accuracy(shape, dtype, loss, device, names) -> dict[str, dict[str, float]]:
    small = (min(shape[0], 4096), min(shape[1], 256), min(shape[2], 8192))
    h, w, y = problem(small, dtype, device)
    h64, w64 = (t.detach().double().requires_grad_() for t in (h, w))
    reference = plain(h64, w64, y, loss)
    reference.backward()
    found = {}
    for name, method in methods(device).items():
        if name not in names or (loss != "cross_entropy" and name in ONLY_CROSS_ENTROPY):
            continue
        h.grad = w.grad = None
        try:
            value = method(h, w, y, loss)
            value.backward()
        except Exception as error:
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
            continue
        found[name] = {
            "loss": abs(value.item() - reference.item()) / abs(reference.item()),
            "d_hidden": ((h.grad.double() - h64.grad).norm() / h64.grad.norm()).item(),
            "d_weight": ((w.grad.double() - w64.grad).norm() / w64.grad.norm()).item(),
        }
    return found


def table(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}")
    keys = list(next(iter(rows.values())))
    print("  " + f"{'':14s}" + "".join(f"{key:>14s}" for key in keys))
    first = next(iter(rows.values()))
    for name, values in rows.items():
        cells = "".join(f"{values[key]:14.4g}" for key in keys)
        ratio = next((values[k] / first[k] for k in ("cpu_min", "wall_min") if k in values), None)
        print("  " + f"{name:14s}" + cells + (f"   {ratio:.2f}x" if ratio is not None else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", nargs="+", default=["4096x576x49152"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--losses", nargs="+", default=["cross_entropy"])
    parser.add_argument("--methods", nargs="+", default=[*ALL])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    report = []
    for text in args.shapes:
        shape = tuple(int(part) for part in text.split("x"))
        for dtype_name in args.dtypes:
            dtype = getattr(torch, dtype_name)
            for loss in args.losses:
                record = {"shape": text, "dtype": dtype_name, "loss": loss, "device": args.device}
                if args.repeats:
                    record["speed"] = measure(shape, dtype, loss, args.device, args.repeats, args.warmup, args.methods)
                    table(f"{text} {dtype_name} {loss}: seconds, peak MiB", record["speed"])
                if args.check:
                    record["error"] = accuracy(shape, dtype, loss, args.device, args.methods)
                    table(f"{text} {dtype_name} {loss}: relative errors against float64", record["error"])
                report.append(record)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
