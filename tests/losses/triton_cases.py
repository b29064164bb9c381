"""Runs the Triton kernels on a CPU, by Triton's interpreter, against the passes in torch; prints what it compared.

In a process of its own, with TRITON_INTERPRET=1 set before Triton is imported: see test_fused_kernels.py.
"""

import itertools

import torch
import torch.nn.functional as F

from lightning_lossplug.losses import CrossEntropy, create
from lightning_lossplug.losses.fused import blocks, fused_linear, kernels
from lightning_lossplug.losses.fused.blocks import Coefficients, Scratch, Tile


def close(a, b, dtype):
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 0.1, equal_nan=False)


def tiles() -> int:
    g = torch.Generator().manual_seed(0)
    compared = 0
    shapes = ((3, 37), (2, 130))
    for (rows, columns), dtype, softcap, weighted, partial, which in itertools.product(
        shapes, (torch.float32, torch.bfloat16), (None, 3.0), (False, True), (False, True), range(4)
    ):
        if dtype == torch.bfloat16 and (which != 3 or partial):
            continue
        kernels.REDUCE_BLOCK, kernels.WRITE_BLOCK = 64, 32  # several blocks per row
        base = (torch.randn(rows, columns + 3, generator=g) * 2).to(dtype)
        z = base[:, :columns]
        if columns > 100:
            z[0, :64] = -torch.inf  # a whole block, as a masked part of a vocabulary
        column = torch.randint(columns, (rows, 1), generator=g)
        if columns > 100:
            column.clamp_(min=64)
        inside = torch.arange(rows) % 2 == 0 if partial else None
        u = torch.rand(columns, generator=g) if weighted else None
        masked = columns > 100
        need_sum, need_sumsq = which in (1, 3) and not masked, which in (2, 3) and not masked
        tile = Tile(column, inside, u, softcap)
        scratch = Scratch(rows, columns, z)
        expected = blocks.reduce_tile(z, tile, need_sum, need_sumsq, scratch)
        found = kernels.reduce_rows(z, u, softcap, need_sum, need_sumsq)
        for one, two in zip(found, (expected[0], expected[2], expected[3]), strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                close(one, two, torch.float32)
        lse = expected[0]
        grads = Coefficients(
            torch.randn(rows, generator=g) if which != 2 or masked else None,
            None,
            torch.randn(rows, generator=g) if need_sum else None,
            torch.randn(rows, generator=g) if need_sumsq else None,
        )
        plain, kernel = base.clone()[:, :columns], base.clone()[:, :columns]
        one = blocks.write_gradient(plain, tile, lse, lse, grads, scratch, None)
        two = kernels.write_rows(kernel, column, inside, u, softcap, lse, grads.lse, grads.sum, grads.sumsq)
        close(two, one, torch.float32)
        close(kernel, plain, dtype)
        compared += 1
    return compared


def heads() -> int:
    """The whole head with the kernels in the place of the passes, on a CPU."""
    kernels.REDUCE_BLOCK, kernels.WRITE_BLOCK = 4096, 2048
    blocks.uses_kernels = lambda z: z.dtype != torch.float64
    g = torch.Generator().manual_seed(0)
    compared = 0
    weight = torch.linspace(0.5, 2, 45)
    losses = (CrossEntropy(), CrossEntropy(0.1), CrossEntropy(0.1, weight), create("focal"), create("z_loss"))
    for loss, softcap, backend in itertools.product(losses, (None, 4.0), ("rows", "tiles")):
        h, w, b = (torch.randn(s, generator=g).requires_grad_() for s in ((9, 6), (45, 6), (45,)))
        y = torch.randint(45, (9,), generator=g)
        y[2] = -100
        b = b if compared % 3 else None
        ours = fused_linear(h, w, y, loss, bias=b, softcap=softcap, backend=backend, tile=20)
        z = F.linear(h, w, b)
        theirs = loss(z if softcap is None else softcap * torch.tanh(z / softcap), y)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        inputs = [t for t in (h, w, b) if t is not None]
        for one, two in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        compared += 1
    return compared


if __name__ == "__main__":
    print(f"{tiles()} tiles, {heads()} heads")
