"""Runs the N:M kernel on a CPU, by Triton's interpreter, against the passes in torch; prints how many it compared.

In a process of its own, with TRITON_INTERPRET=1 set before Triton is imported: see test_nm_kernel.py.
"""

import itertools

import torch

from lightning_lossplug.sparsity import decayed_ste, kernels, nm_mask, pack_rows
from lightning_lossplug.sparsity.nm_mask import grouped
from lightning_lossplug.sparsity.srste import srste_penalty_


def main() -> int:
    compared = 0
    kernels._COMPARISONS = 64  # several programs, the last one not full
    shapes = [((3, 64), 1), ((64, 3), 0), ((2, 64, 3), 1)]
    patterns = ((1, 2), (2, 4), (1, 8), (7, 8), (4, 16), (1, 32), (8, 64))
    for (shape, axis), (n, m), dtype in itertools.product(
        shapes, patterns, (torch.float32, torch.bfloat16, torch.float64)
    ):
        torch.manual_seed(compared)
        weight = torch.randint(-3, 4, shape).to(dtype) / 4  # ties, zeros
        weight[0] = -0.0
        expected = nm_mask(weight, n, m, axis)
        grouping = grouped(weight.shape, axis, m)
        mask, used = torch.empty(shape, dtype=torch.bool), torch.empty_like(weight)
        kernels.fill(weight.view(grouping), n, mask.view(grouping))
        assert torch.equal(mask, expected)
        grad, decay = torch.randn(shape).to(dtype), 0.25 * (compared % 2)
        theirs = srste_penalty_(grad.clone(), weight, expected, 0.5)
        kernels.fill(
            weight.view(grouping),
            n,
            mask.view(grouping),
            used=used.view(grouping),
            decay=decay,
            grad=grad.view(grouping),
            pull=0.5,
        )
        assert torch.equal(mask, expected)
        assert torch.equal(used, decayed_ste(weight, expected, decay))
        torch.testing.assert_close(grad, theirs)
        if axis == len(shape) - 1:
            bits = torch.empty(len(weight), weight[0].numel() // 8, dtype=torch.uint8)
            kernels.fill(weight.view(grouping), n, bits)
            assert torch.equal(bits, pack_rows(expected))
        compared += 1
    return compared


if __name__ == "__main__":
    print(main(), "weights")
