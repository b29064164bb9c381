"""Half precision and autocast: the fused head is at least as accurate as the materialised one with float32 logits."""

import pytest
import torch
import torch.nn.functional as F

from lightning_lossplug.losses import create, fused_linear

BACKENDS = ("rows", "tiles")


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def problem(kind, dtype, rows=384, width=48, classes=1000):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(rows, width, generator=g)
    w = torch.randn(classes, width, generator=g) * width**-0.5
    y = torch.randint(classes, (rows,), generator=g)
    if kind == "confident":  # nearly all probability on the label
        h = 9 * w[y] + 0.1 * h
    elif kind == "wrong":  # nearly all on another class
        h = 9 * w[(y + 1) % classes] + 0.1 * h
    elif kind == "half":
        h = h + 4 * w[y]
    return h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), y


def errors(function, h, w, reference):
    value = function(h, w)
    gradients = torch.autograd.grad(value, (h, w))
    h64, w64 = (t.detach().double().requires_grad_() for t in (h, w))
    exact = reference(h64, w64)
    expected = torch.autograd.grad(exact, (h64, w64))
    assert value.dtype == torch.float32
    assert [g.dtype for g in gradients] == [h.dtype, w.dtype]
    return relative(value, exact), *(relative(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
@pytest.mark.parametrize("kind", ["random", "half", "confident", "wrong"])
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_bfloat16_errors_stay_below_the_materialised_ones(backend, loss, kind, softcap):
    h, w, y = problem(kind, torch.bfloat16)
    built = create(loss)

    def materialised(h, w):
        z = h @ w.T
        z = z if z.dtype == torch.float64 else z.float()
        return built(z if softcap is None else softcap * torch.tanh(z / softcap), y)

    def fused(h, w):
        return fused_linear(h, w, y, built, softcap=softcap, backend=backend, tile=100)

    ours, theirs = errors(fused, h, w, materialised), errors(materialised, h, w, materialised)
    assert ours[0] <= 1.5 * theirs[0] + 1e-5
    assert ours[1] <= 1.02 * theirs[1]
    assert ours[2] <= 1.02 * theirs[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_is_multiplied_in_float32_on_a_cpu(backend):
    h, w, y = problem("half", torch.float16)
    found = errors(
        lambda h, w: fused_linear(h, w, y, backend=backend, tile=100),
        h,
        w,
        lambda h, w: F.cross_entropy((h @ w.T), y),
    )
    assert found[0] < 1e-6
    assert max(found[1:]) < 5e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_chunks_lose_nothing(backend):
    h, w, y = problem("half", torch.bfloat16)
    found = [
        errors(
            lambda h, w, tile=tile: fused_linear(h, w, y, backend=backend, tile=tile),
            h,
            w,
            lambda h, w: F.cross_entropy(h @ w.T, y),
        )
        for tile in (4, 1000)
    ]
    assert found[0][2] < 1.1 * found[1][2]
    assert found[0][1] < 1.1 * found[1][1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    h, w, y = problem("half", torch.float32)
    b = torch.zeros(1000, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = fused_linear(h, w, y, bias=b, backend=backend, tile=64)
        theirs = F.cross_entropy(F.linear(h, w, b).float(), y)
    assert ours.dtype == torch.float32
    exact = F.cross_entropy(F.linear(h.double(), w.double(), b.double()), y)
    expected = torch.autograd.grad(exact, (h, w, b))
    for a, b_, e in zip(
        torch.autograd.grad(ours, (h, w, b)), torch.autograd.grad(theirs, (h, w, b)), expected, strict=True
    ):
        assert a.dtype == torch.float32
        assert relative(a, e) <= 1.02 * relative(b_, e)
    assert relative(ours, exact) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_float64_and_the_second_backward_alone(backend):
    h, w, y = problem("half", torch.float64, rows=20, classes=50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = fused_linear(h, w, y, backend=backend)
        first = torch.autograd.grad(value, (h, w), retain_graph=True)
    second = torch.autograd.grad(value, (h, w))
    expected = torch.autograd.grad(F.cross_entropy(h @ w.T, y), (h, w))
    for one, two, three in zip(first, second, expected, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(two, three, rtol=1e-12, atol=1e-12)


def test_mixed_dtypes_under_autocast():
    h, w, y = problem("half", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = fused_linear(h.bfloat16(), w, y)
    torch.testing.assert_close(value, F.cross_entropy(h @ w.T, y), rtol=2e-3, atol=2e-3)


def test_a_long_sum_of_bfloat16_losses_is_not_summed_in_bfloat16():
    h, w, y = problem("random", torch.bfloat16, rows=2048, width=8)
    value = fused_linear(h, w, y, backend="rows", tile=8)
    exact = F.cross_entropy(h.double() @ w.double().T, y)
    assert relative(value, exact) < 1e-4
