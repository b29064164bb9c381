"""Compiles the attention over codes to machine code of two generations of GPUs, which needs none; prints how many."""

import triton.language as tl
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_lossplug.kv_cache import kernels
from lightning_lossplug.kv_cache.codes import groups_of

TYPES = {"bf16": tl.bfloat16, "fp32": tl.float32}
# dtype, wide, bits, GPU; the shape of SmolLM2, or a wide one with channels that don't rotate, means, sinks and a mask
CASES = [("bf16", True, 4, 90), ("bf16", False, 16, 80), ("fp32", False, 2, 80)]
COUNTS = {"old", "table_tokens", "pages", "tiles", "tiles_each", "mask_batch", "mask_head", "mask_row"}
FLOATS = {"mask", "tops", "masses", "sums"}


def main() -> int:
    done = 0
    for dtype, wide, bits, capability in CASES:
        heads, width, half, rank = (8, 128, 32, 205) if wide else (3, 64, 32, 38)
        groups, size = groups_of(rank)
        options = {
            "HEADS": heads, "ROWS": 4, "WIDTH": width, "HALF": half, "K_RANK": rank, "V_RANK": rank,
            "K_BITS": bits, "V_BITS": bits, "K_GROUPS": groups, "V_GROUPS": groups, "K_SIZE": size, "V_SIZE": size,
            "PAGE": 1024, "TABLE_BATCH": 1, "SINKS": 4 * wide, "MEAN": wide, "MASK": wide,
            "TYPE": TYPES[dtype], "TABLE": TYPES[dtype], "ROWS_PAD": 16, "HALF_PAD": kernels.padded(half),
            "REST_PAD": kernels.padded(width - 2 * half), "V_PAD": kernels.padded(rank), "CHUNK": kernels.CHUNK,
            "BLOCK": kernels.block_of(rank),
        }  # fmt: skip
        types = {"addresses": "*i64", "sinks": "*i64", "scale": "fp32"}
        types |= dict.fromkeys(COUNTS, "i32") | dict.fromkeys(FLOATS, "*fp32")
        signature = {
            name: "constexpr" if name in options else types.get(name, f"*{dtype}") for name in kernels._attend.arg_names
        }
        source = ASTSource(kernels._attend, signature, constexprs=options)
        found = compile_kernel(source, target=GPUTarget("cuda", capability, 32))
        assert found.asm["cubin"]
        assert found.metadata.shared < 99 * 1024, (dtype, wide, bits, capability, found.metadata.shared)
        done += 1
    return done


if __name__ == "__main__":
    print(main(), "kernels")
