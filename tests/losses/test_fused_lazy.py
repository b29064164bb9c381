"""Stand-ins of logits behave like the logits, whatever happens to them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.fused import LazyLogits, lazy_logits

BIAS = torch.linspace(-1, 1, 7, dtype=torch.float64)[None]

# Name -> operation on [..., V] logits; all keep the classes last.
LIGHT = {
    "float": lambda z: z.float(),
    "to": lambda z: z.to(torch.float64),
    "to_device": lambda z: z.to("cpu"),
    "contiguous": lambda z: z.contiguous(),
    "scale": lambda z: z * 0.5,
    "scale_left": lambda z: 2.0 * z,
    "divide": lambda z: z / 1.5,
    "divide_function": lambda z: torch.div(z, 2),
    "times_tensor": lambda z: z * torch.tensor(1.25),
    "tanh": torch.tanh,
    "cap": lambda z: torch.tanh(z / 3) * 3,
    "flatten": lambda z: z.reshape(-1, z.shape[-1]),
    "view": lambda z: z.contiguous().view(-1, z.size(-1)),
    "rows": lambda z: z[..., :2, :] if z.ndim > 1 else z,
    "first": lambda z: z[0:1],
    "every_other": lambda z: z[::2],
    "gathered": lambda z: z[torch.tensor([0, 0])],
    "masked": lambda z: z[torch.arange(len(z)) % 2 == 0],
    "columns": lambda z: z[..., :6],
    "add": lambda z: z + BIAS[0, : z.shape[-1]],
}
HEAVY = {
    "clamp": lambda z: z.clamp(max=1.0),
    "softmax": lambda z: z.softmax(-1),
    "last_columns": lambda z: z[..., 1:],
    "negative_cap": lambda z: torch.tanh(z) * -2.0,
    "other_cap": lambda z: torch.tanh(torch.tanh(z)),
    "cat": lambda z: torch.cat([z, z], 0),
    "half": lambda z: z.bfloat16(),
}


def parts(bias=False):
    g = torch.Generator().manual_seed(0)
    shapes = ((4, 3, 5), (7, 5), (7,))
    h, w, b = (torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes)
    return h, w, b if bias else None


def check(operations, bias):
    h, w, b = parts(bias)
    plain, lazy = F.linear(h, w, b), lazy_logits(h, w, b)
    tolerance = 1e-11
    for operation in operations:
        plain, lazy = operation(plain), operation(lazy)
        tolerance = tolerance if plain.dtype == torch.float64 else 1e-5
        assert lazy.shape == plain.shape
        assert lazy.dtype == plain.dtype
    plain, lazy = plain.reshape(-1, plain.shape[-1]), lazy.reshape(-1, plain.shape[-1])
    y = torch.arange(len(plain)) % plain.shape[-1]
    ours, theirs = F.cross_entropy(lazy, y, label_smoothing=0.1), F.cross_entropy(plain, y, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    inputs = [t for t in (h, w, b) if t is not None]
    for one, two in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    return lazy


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_operation_stays_a_stand_in(name):
    assert type(check([LIGHT[name]], bias=False)) is LazyLogits


@pytest.mark.parametrize("name", HEAVY)
def test_any_other_operation_computes_the_logits(name):
    expected = (
        LazyLogits if name == "negative_cap" else torch.Tensor
    )  # noted down, but no softcap: computed at the loss
    assert type(check([HEAVY[name]], bias=True)) is expected


@settings(max_examples=60, deadline=None)
@given(names=st.lists(st.sampled_from([*LIGHT, *HEAVY]), max_size=6), bias=st.booleans())
def test_any_chain_of_operations(names, bias):
    check([{**LIGHT, **HEAVY}[name] for name in names], bias)


def test_only_what_is_read_is_computed():
    h, w, _ = parts()
    seen = []
    logits = lazy_logits(h, w, on_compute=seen.append)
    value = F.cross_entropy(logits.view(-1, 7), torch.zeros(12, dtype=torch.long))
    value.backward()
    assert seen == []
    assert logits.numel() == 84
    assert "LazyLogits" in repr(logits)
    assert logits.argmax(-1).shape == (4, 3)
    assert logits.sum().item() == pytest.approx((h @ w.T).sum().item())
    assert seen == ["argmax"]


class Square(torch.autograd.Function):
    """Function.apply is not announced to __torch_function__."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.square().sum()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


@pytest.mark.parametrize("operation", [lambda z: z, lambda z: z[..., :-1, :] / 2])
def test_a_custom_autograd_function_gets_values_and_gives_gradients(operation):
    h, w, b = parts(bias=True)
    ours = Square.apply(operation(lazy_logits(h, w, b)))
    theirs = operation(F.linear(h, w, b)).square().sum()
    torch.testing.assert_close(ours, theirs)
    for one, two in zip(torch.autograd.grad(ours, (h, w, b)), torch.autograd.grad(theirs, (h, w, b)), strict=True):
        torch.testing.assert_close(one, two)


def test_detached_and_copied_logits_are_plain_tensors():
    h, w, _ = parts()
    logits = lazy_logits(h, w)
    assert type(logits.detach()) is torch.Tensor
    assert type(copy.deepcopy(logits.detach())) is torch.Tensor
    assert type(logits.cpu().clone()) is torch.Tensor
    assert not logits.detach().requires_grad
    assert logits.requires_grad
    with torch.no_grad():
        assert torch.equal(logits, h @ w.T)
    assert torch.equal(torch.autograd.grad(logits.sum(), h)[0], torch.autograd.grad((h @ w.T).sum(), h)[0])


@pytest.mark.parametrize("kind", ["probabilities", "classes second"])
def test_cross_entropies_that_cannot_be_fused(kind):
    h, w, _ = parts()
    if kind == "probabilities":
        target = torch.full((12, 7), 1 / 7, dtype=torch.float64)
        ours, theirs = (F.cross_entropy(z.reshape(-1, 7), target) for z in (lazy_logits(h, w), h @ w.T))
    else:
        target = torch.zeros(4, 7, dtype=torch.long)
        ours, theirs = (F.cross_entropy(z, target) for z in (lazy_logits(h, w), h @ w.T))
    torch.testing.assert_close(ours, theirs)
    for one, two in zip(torch.autograd.grad(ours, (h, w)), torch.autograd.grad(theirs, (h, w)), strict=True):
        torch.testing.assert_close(one, two)


def test_options_of_the_call():
    h, w, _ = parts()
    y = torch.arange(12) % 7
    weight = torch.rand(7, dtype=torch.float64)
    for options in (
        {"weight": weight, "label_smoothing": 0.2},
        {"reduction": "sum", "ignore_index": 3},
        {"reduction": "none"},
        {"weight": weight},
    ):
        ours, theirs = (F.cross_entropy(z.reshape(-1, 7), y, **options) for z in (lazy_logits(h, w), h @ w.T))
        torch.testing.assert_close(ours, theirs)
        ours, theirs = (torch.nn.CrossEntropyLoss(**options)(z.view(-1, 7), y) for z in (lazy_logits(h, w), h @ w.T))
        torch.testing.assert_close(ours, theirs)


def test_writing_is_refused():
    h, w, _ = parts()
    logits = lazy_logits(h, w)

    def add():
        z = logits
        z += 1

    for write in (
        lambda: logits.mul_(2),
        add,
        lambda: logits.__setitem__(0, 1.0),
        lambda: torch.exp(w @ w.T, out=logits),
    ):
        with pytest.raises(LossplugError, match="writes into the logits"):
            write()


def test_stale_weights_are_an_error():
    h, w, _ = parts()
    logits = lazy_logits(h, w)
    with torch.no_grad():
        w.add_(1)
    for read in (lambda: logits.tolist(), lambda: F.cross_entropy(logits[0], torch.zeros(3, dtype=torch.long))):
        with pytest.raises(LossplugError, match="after the weights"):
            read()


def test_no_gradients_wanted():
    h, w, _ = parts()
    with torch.no_grad():
        value = F.cross_entropy(lazy_logits(h, w)[0], torch.zeros(3, dtype=torch.long))
    assert not value.requires_grad
    torch.testing.assert_close(value, F.cross_entropy((h @ w.T)[0], torch.zeros(3, dtype=torch.long)).detach())
