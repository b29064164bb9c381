"""C++ functions beside PyTorch's operators for the same numbers: attention in float32, steps of least squared error.

The two take turns within a round; medians, and ratios within a round.

Run: OMP_NUM_THREADS=2 python tests/benchmarks/bench_native.py
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from lightning_lossplug.quantization import least_error
from lightning_lossplug.quantization.attention_floats import FloatAttention

# batch, heads, tokens, width, causal: vit_tiny at batch 1 and 16, a prompt of SmolLM2's heads, a longer one
ATTENTION = [(1, 3, 197, 64, False), (16, 3, 197, 64, False), (1, 9, 128, 64, True), (1, 9, 1024, 64, True)]
WEIGHTS = [((1536, 576), [1]), ((200, 32, 7, 7), [1, 2, 3]), ((13824, 64), [1])]  # rows, filters, groups of 64


def compare(title, ours, theirs, rounds, per=1.0, unit="ms"):
    """Prints both medians and their ratio."""
    seconds = {ours: [], theirs: []}
    for _ in range(rounds + 1):
        for function, taken in seconds.items():
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    a, b = (taken[1:] for taken in seconds.values())
    ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
    print(
        f"{title:44} {statistics.median(a) * per:9.3f} {statistics.median(b) * per:9.3f} {unit}  x{ratio:.2f}",
        flush=True,
    )


def in_torch(x, dims):
    """The search without the C++ function."""
    kept, least_error._library = least_error._library, lambda: None
    try:
        return least_error.mse_step(x, dims, -8, 7)
    finally:
        least_error._library = kept


@torch.no_grad()
def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    attention = FloatAttention()
    for batch, heads, tokens, width, causal in ATTENTION:
        given = [torch.randn(batch, heads, tokens, width) for _ in range(3)]
        title = f"attention {batch} x {heads} x {tokens} x {width}{', causal' * causal}"
        compare(
            title,
            lambda given=given, causal=causal: attention(*given, is_causal=causal),
            lambda given=given, causal=causal: F.scaled_dot_product_attention(*given, is_causal=causal),
            rounds,
            1e3,
        )
    for shape, dims in WEIGHTS:
        x = torch.randn(shape)
        compare(
            f"least error, steps of {shape}",
            lambda x=x, dims=dims: least_error.mse_step(x, dims, -8, 7),
            lambda x=x, dims=dims: in_torch(x, dims),
            max(3, rounds // 5),
            1e9 / x.numel(),
            "s per billion",
        )


if __name__ == "__main__":
    main()
