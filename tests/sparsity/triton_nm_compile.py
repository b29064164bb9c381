"""Compiles the N:M kernel to machine code of two generations of GPUs, which needs none; prints how many variants."""

import itertools

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_lossplug.sparsity import kernels

SIZES = {"bf16": 2, "fp32": 4, "fp64": 8}


def main() -> int:
    done = 0
    for (dtype, size), m, full, capability in itertools.product(SIZES.items(), (4, 32), (False, True), (80, 90)):
        options = {
            "N": 1,
            "M": m,
            "MAGNITUDE": (1 << (8 * size - 1)) - 1,
            "INTEGER": kernels._INTEGERS[size],
            "COMPUTE": tl.float64 if size == 8 else tl.float32,
            "USED": full,
            "PULL": full,
            "BITS": full,
            "BLOCK": kernels._COMPARISONS // (m * m),
        }
        types = {"mask": "*u8" if full else "*i8", "groups": "i32", "inner": "i32", "decay": "fp32", "pull": "fp32"}
        floats = {"source", "weight", "grad", "used"}
        signature = {
            name: "constexpr" if name in options else f"*{dtype}" if name in floats else types[name]
            for name in kernels._nm.arg_names
        }
        found = triton.compile(
            ASTSource(kernels._nm, signature, constexprs=options), target=GPUTarget("cuda", capability, 32)
        )
        assert found.asm["cubin"]
        done += 1
    return done


if __name__ == "__main__":
    print(main(), "kernels")
