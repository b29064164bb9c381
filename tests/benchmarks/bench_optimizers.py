"""One step of STEPAdamW and ASTAdamW against torch's AdamW, on weights of SmolLM2-135M's shapes, side by side.

The feed-forward weights are masked. Steps take turns in one process; ratios against ``AdamW(foreach=True)`` are taken
within a round and their median is printed. ``--layers`` shortens the model.

Run: OMP_NUM_THREADS=2 python tests/benchmarks/bench_optimizers.py
"""

import argparse
import statistics
import time

import torch

from lightning_lossplug.sparsity import ASTAdamW, STEPAdamW, nm_mask

MLP = [(1536, 576), (1536, 576), (576, 1536)]
OTHERS = [(576, 576), (192, 576), (192, 576), (576, 576), (576,), (576,)]
EMBEDDING = [(49152, 576)]


def build(name, layers, device):
    """Weights with gradients, and their optimizer."""
    shapes = [*(shape for _ in range(layers) for shape in [*MLP, *OTHERS]), *EMBEDDING]
    params = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    make = {
        "AdamW(foreach=True)": lambda: torch.optim.AdamW(params, foreach=True),
        "AdamW(foreach=False)": lambda: torch.optim.AdamW(params, foreach=False),
        "STEPAdamW, phase 1": lambda: STEPAdamW(params, t_max=10**6),
        "STEPAdamW, phase 2": lambda: STEPAdamW(params, t_max=1),
        "ASTAdamW": lambda: ASTAdamW(params),
    }
    optimizer = make[name]()
    if hasattr(optimizer, "take_masks"):
        masked = [p for p, shape in zip(params, shapes, strict=True) if shape in MLP]
        optimizer.take_masks({p: nm_mask(p, 2, 4) for p in masked}, pull=1e-4)
    return optimizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    names = ["AdamW(foreach=True)", "AdamW(foreach=False)", "STEPAdamW, phase 1", "STEPAdamW, phase 2", "ASTAdamW"]
    optimizers = {name: build(name, arguments.layers, arguments.device) for name in names}
    seconds = {name: [] for name in names}
    for turn in range(arguments.rounds + 2):
        for name in names if turn % 2 else reversed(names):
            begin = time.perf_counter()
            optimizers[name].step()
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    base = seconds[names[0]][2:]
    for name in names:
        ratio = statistics.median(a / b for a, b in zip(seconds[name][2:], base, strict=True))
        print(f"{name:22} {1e3 * statistics.median(seconds[name][2:]):8.1f} ms  x{ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
