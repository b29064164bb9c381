"""Compiles the Triton kernels down to machine code of two generations of GPUs, which needs none; prints how many.

In a process of its own, without TRITON_INTERPRET: see test_fused_kernels.py.
"""

import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_lossplug.losses.fused import kernels

POINTERS = {"u", "lse", "total", "sumsq", "by_lse", "by_sum", "by_sumsq", "at_label"}


def compile_one(kernel, dtype, options, capability):
    signature = {}
    for name in kernel.arg_names:
        if name == "z":
            signature[name] = f"*{dtype}"
        elif name == "column":
            signature[name] = "*i64"
        elif name in POINTERS:
            signature[name] = "*fp32"
        elif name == "softcap":
            signature[name] = "fp32"
        else:
            signature[name] = "constexpr" if name in options else "i32"
    source = ASTSource(kernel, signature, constexprs=options)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert found.asm["cubin"]


def main() -> int:
    done = 0
    for dtype, capability in itertools.product(("bf16", "fp32"), (80, 90)):
        for cap, weighted, squares in ((False, False, False), (True, True, True), (False, True, False)):
            flags = {"CAP": cap, "SUM": cap or weighted, "WEIGHTED": weighted, "SQUARES": squares}
            compile_one(kernels._write, dtype, {**flags, "LSE": not squares or cap, "BLOCK": 2048}, capability)
            done += 1
            if not (weighted and not cap):
                compile_one(kernels._reduce, dtype, {**flags, "BLOCK": 4096}, capability)
                done += 1
    return done


if __name__ == "__main__":
    print(main(), "kernels")
