"""Runs installed engines of the fused head on a CPU, by Triton's interpreter, against the own head; prints the names.

In a process of its own, with TRITON_INTERPRET=1 set before Triton is imported: see test_fused_engines.py.
"""

import torch

from lightning_lossplug.losses import CrossEntropy, create, fused_linear
from lightning_lossplug.losses.fused import engines
from lightning_lossplug.losses.fused.linear import head_loss
from lightning_lossplug.registry import registry

engines.on_gpu = lambda hidden: True
torch.manual_seed(0)
Y = torch.randint(140, (20,)).index_fill(0, torch.tensor([3, 11]), -100)


def both(engine, dtype, bias=False, smoothing=0.0, **options):
    tensors = [torch.randn(20, 32), torch.randn(140, 32), torch.randn(140)][: 3 if bias else 2]
    found = []
    for backend in ("rows", engine):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        more = {"bias": leaves[2]} if bias else {}
        value = fused_linear(*leaves[:2], Y, CrossEntropy(smoothing), backend=backend, **more, **options)
        found.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for own, theirs in zip(*found, strict=True):
        tolerance = 2e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(own.float(), theirs.float(), rtol=tolerance, atol=tolerance * 0.1)


def liger():
    for options in ({}, {"reduction": "sum"}, {"denominator": 7.0}, {"smoothing": 0.1}, {"bias": True}):
        both("liger", torch.float32, **options)
    both("liger", torch.bfloat16)
    assert registry.get("loss", "liger").family == "adapter"
    h, w = torch.randn(20, 32, requires_grad=True), torch.randn(140, 32)
    torch.testing.assert_close(create("liger")(h, w, Y), create("linear_cross_entropy")(h, w, Y))
    assert head_loss(h, w, Y).engine in ("rows", "liger")  # the faster one in a trial
    return "liger"


def cce():
    import cut_cross_entropy.tl_utils as functions
    import triton.language as tl

    class Libdevice:  # the interpreter has none
        log1p = staticmethod(lambda x: tl.log(1.0 + x))
        tanh = staticmethod(lambda x: 2.0 * tl.sigmoid(2.0 * x) - 1.0)

    functions.tl_libdevice = Libdevice
    engines.LOW = (*engines.LOW, torch.float32)  # the values alone; its backward wants half precision, and a GPU
    h, w = torch.randn(20, 32), torch.randn(140, 32)
    for options in ({}, {"reduction": "sum"}, {"class_weight": torch.rand(140)}, {"sample_weight": torch.rand(20)}):
        torch.testing.assert_close(fused_linear(h, w, Y, backend="cce", **options), fused_linear(h, w, Y, **options))
    return "cce"


if __name__ == "__main__":
    print(*(globals()[name]() for name in ("liger", "cce") if engines.installed(name)))
