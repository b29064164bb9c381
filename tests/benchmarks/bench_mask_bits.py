"""Masks as bits against bool masks, on one weight: packing, unpacking, and the masked weight that a product reads.

Ways take turns in one process; medians are printed, with the temporary memory in weights.

Run: OMP_NUM_THREADS=2 python tests/benchmarks/bench_mask_bits.py
"""

import argparse
import statistics
import time

import torch
from bench_nm_mask import temporaries

from lightning_lossplug.sparsity import nm_mask
from lightning_lossplug.sparsity.bits import changed, masked, pack_rows, unpack_rows


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1536x576", "4096x4096"])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    n, m = map(int, arguments.pattern.split(":"))
    for shape in arguments.shapes:
        torch.manual_seed(0)
        weight = torch.randn(*map(int, shape.split("x")))
        mask, other = nm_mask(weight, n, m), nm_mask(weight + 0.1 * torch.randn_like(weight), n, m)
        bits, more = pack_rows(mask), pack_rows(other)
        ways = {
            "weight * bool": lambda weight=weight, mask=mask: weight * mask,
            "torch.where(bool)": lambda weight=weight, mask=mask: torch.where(mask, weight, 0.0),
            "masked(bits)": lambda weight=weight, bits=bits: masked(weight, bits),
            "pack_rows": lambda mask=mask: pack_rows(mask),
            "unpack_rows": lambda mask=mask, bits=bits: unpack_rows(bits, mask.shape),
            "flips of bools": lambda mask=mask, other=other: (mask != other).sum(),
            "flips of bits": lambda bits=bits, more=more: torch.tensor(changed(bits, more)),
            "nm_mask": lambda weight=weight: nm_mask(weight, n, m),
        }
        seconds = {name: [] for name in ways}
        for turn in range(arguments.rounds + 1):
            for name in sorted(ways, reverse=bool(turn % 2)):
                begin = time.perf_counter()
                ways[name]()
                seconds[name].append(time.perf_counter() - begin)
        for name, values in seconds.items():
            took = 1e3 * statistics.median(values[1:])
            extra = temporaries(ways[name]) / (4 * weight.numel())
            print(
                f"{shape:>10} {arguments.pattern} {name:18} {took:9.3f} ms  temporaries {extra:.2f} weights", flush=True
            )


if __name__ == "__main__":
    main()
