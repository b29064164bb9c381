"""The fused linear head gives the numbers of the materialised one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import CrossEntropy, FusableLoss, LabelError, create, fused_linear
from lightning_lossplug.losses.fused import linear_stats
from lightning_lossplug.losses.fused.rows import chunk_rows
from lightning_lossplug.losses.fused.tiles import tile_width
from lightning_lossplug.registry import registry

registry.load()
FUSABLE = sorted(e.name for e in registry if e.kind == "loss" and e.facts.get("fusable"))
BACKENDS = ("rows", "tiles")


def head(rows=11, width=5, classes=13, dtype=torch.float64, bias=True, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()  # noqa: E731
    y = torch.randint(classes, (rows,), generator=g)
    return make(rows, width), make(classes, width), make(classes) if bias else None, y


def logits(h, w, b=None, softcap=None):
    z = h @ w.T if b is None else h @ w.T + b
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def assert_same(value, reference, inputs, tolerance=1e-12, upstream=None):
    """Compares values and all gradients."""
    inputs = [i for i in inputs if i is not None and i.requires_grad]
    torch.testing.assert_close(value, reference, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(value, inputs, upstream)
    theirs = torch.autograd.grad(reference, inputs, upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", [1, 2, 3, 5, 12, 13, 40, None])
def test_any_tile_size(backend, tile):
    h, w, b, y = head()
    y[2:5] = -100
    y[6] = y[7]
    ours = fused_linear(h, w, y, bias=b, backend=backend, tile=tile)
    assert_same(ours, F.cross_entropy(logits(h, w, b), y), (h, w, b))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUSABLE)
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_every_fusable_loss_of_the_registry(backend, name, softcap):
    h, w, b, y = head(seed=1)
    y[3] = -100
    weight = torch.linspace(0.2, 1.5, 13, dtype=torch.float64)
    for bias in (b, None):
        for loss in (create(name), create(name, weight=weight)):
            ours = fused_linear(h, w, y, loss, bias=bias, softcap=softcap, backend=backend, tile=4)
            assert_same(ours, loss(logits(h, w, bias, softcap), y), (h, w, bias), 1e-11)


def test_the_registry_has_fusable_losses():
    assert {"cross_entropy", "focal"} <= set(FUSABLE)
    assert all(issubclass(registry.get("loss", name).load(), FusableLoss) for name in FUSABLE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_cross_entropy_options(backend, smoothing, weighted, softcap, bias):
    h, w, b, y = head(bias=bias)
    y[0] = 7
    weight = torch.rand(13, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) if weighted else None
    reference = F.cross_entropy(logits(h, w, b, softcap), y, weight, ignore_index=7, label_smoothing=smoothing)
    loss = CrossEntropy(smoothing, weight)
    ours = fused_linear(h, w, y, loss, bias=b, softcap=softcap, ignore_index=7, backend=backend, tile=4)
    assert_same(ours, reference, (h, w, b))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 6),
    classes=st.integers(1, 17),
    tile=st.integers(1, 20),
    backend=st.sampled_from(BACKENDS),
    loss=st.sampled_from(FUSABLE),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows, width, classes, tile, backend, loss, reduction, seed):
    if loss == "z_loss" and classes < 3:
        return  # standardised scores of two classes are +-1 whatever the logits: the gradient is 0 / 0 there
    h, w, b, y = head(rows, width, classes, seed=seed)
    y[torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.3] = -100
    built = create(loss, reduction=reduction)
    ours = fused_linear(h, w, y, built, bias=b, backend=backend, tile=tile)
    assert_same(ours, built(logits(h, w, b), y), (h, w, b), 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_class(backend):
    h, w, b, y = head(classes=1)
    ours = fused_linear(h, w, y, bias=b, backend=backend)
    assert_same(ours, F.cross_entropy(logits(h, w, b), y), (h, w, b))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "learned", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_frozen_parts_get_no_gradient(backend, learned):
    h, w, b, y = head()
    for tensor, flag in zip((h, w, b), learned, strict=True):
        tensor.requires_grad_(flag)
    ours = fused_linear(h, w, y, bias=b, backend=backend)
    assert_same(ours, F.cross_entropy(logits(h, w, b), y), (h, w, b))
    fused_linear(h, w, y, bias=b, backend=backend).backward()
    assert [t.grad is not None for t in (h, w, b)] == list(learned)


def test_without_gradients_nothing_is_differentiated():
    h, w, b, y = head()
    with torch.no_grad():
        value = fused_linear(h, w, y, bias=b)
    assert not value.requires_grad
    torch.testing.assert_close(value, F.cross_entropy(logits(h, w, b), y))
    frozen = fused_linear(h.detach(), w.detach(), y)
    assert not frozen.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_embedding_gets_both_gradients(backend):
    _, w, _, y = head(rows=13, classes=13)
    tokens = torch.arange(13).roll(3)
    ours = fused_linear(torch.tanh(w[tokens]), w, y, backend=backend, tile=3)
    assert_same(ours, F.cross_entropy(logits(torch.tanh(w[tokens]), w), y), (w,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_backward_calls_and_retain_graph(backend):
    h, w, b, y = head()
    y[1] = -100
    value = fused_linear(h, w, y, "focal", bias=b, backend=backend, softcap=4.0)
    first = torch.autograd.grad(3 * value, (h, w, b), retain_graph=True)
    second = torch.autograd.grad(3 * value, (h, w, b))
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    value = fused_linear(h, w, y, backend=backend)
    value.backward(retain_graph=True)
    once = w.grad.clone()
    value.backward()
    torch.testing.assert_close(w.grad, 2 * once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_factor_and_a_sum_of_losses(backend):
    h, w, _, y = head()
    ours = 0.25 * fused_linear(h, w, y, backend=backend) + (h**2).sum()
    assert_same(ours, 0.25 * F.cross_entropy(logits(h, w), y) + (h**2).sum(), (h, w))


def test_reduction_none_takes_any_upstream_gradient():
    h, w, b, y = head(rows=12)
    y[::5] = -100
    y = y.reshape(3, 4)
    ours = fused_linear(h.reshape(3, 4, 5), w, y, bias=b, reduction="none", tile=4)
    reference = F.cross_entropy(logits(h, w, b), y.reshape(-1), reduction="none").reshape(3, 4)
    assert_same(ours, reference, (h, w, b), upstream=torch.randn(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_weights_and_denominator(backend):
    h, w, b, y = head()
    y[4] = -100
    s = torch.rand(11, dtype=torch.float64)
    weight = torch.rand(13, dtype=torch.float64)
    loss = CrossEntropy(0.1, weight)
    for options in ({}, {"denominator": 3.0}, {"denominator": torch.tensor(5)}, {"reduction": "sum"}):
        ours = fused_linear(h, w, y, loss, bias=b, sample_weight=s, backend=backend, **options)
        assert_same(ours, loss(logits(h, w, b), y, sample_weight=s, **options), (h, w, b))


def test_learned_sample_weights_get_gradients():
    h, w, _, y = head()
    s = torch.rand(11, dtype=torch.float64, requires_grad=True)
    loss = CrossEntropy()
    ours = fused_linear(h, w, y, loss, sample_weight=s)
    assert_same(ours, loss(logits(h, w), y, sample_weight=s), (h, w, s))
    with pytest.raises(LossplugError, match="'rows'"):
        fused_linear(h, w, y, loss, sample_weight=s, backend="rows")


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_a_kept_row_zero_with_zero_gradients(backend, rows, reduction):
    h, w, b, y = head(rows=rows)
    value = fused_linear(h, w, torch.full_like(y, -100), bias=b, backend=backend, reduction=reduction)
    value.backward()
    assert value.item() == 0
    for tensor in (h, w, b):
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


def test_without_a_kept_row_reduction_none():
    h, w, b, y = head(rows=4)
    value = fused_linear(h, w, torch.full_like(y, -100), bias=b, reduction="none")
    assert value.shape == (4,)
    value.sum().backward()
    assert not w.grad.any()


def test_zero_class_weights_give_zero():
    h, w, _, y = head()
    value = fused_linear(h, w, y, CrossEntropy(weight=torch.zeros(13)))
    value.backward()
    assert value.item() == 0
    assert not w.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_columns(backend):
    h, w, b, y = head(classes=16)
    b = b.detach().clone()
    b[:8] = -torch.inf
    y = y % 8 + 8
    ours = fused_linear(h, w, y, bias=b, backend=backend, tile=4)
    assert_same(ours, F.cross_entropy(logits(h, w, b), y), (h, w))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_stay_finite(backend):
    h, w, b, y = head(dtype=torch.float32, scale=60)
    ours = fused_linear(h, w, y, bias=b, backend=backend, tile=4)
    assert_same(ours, F.cross_entropy(logits(h, w, b), y), (h, w, b), 1e-4)


def test_return_lse_is_differentiable():
    h, w, b, y = head()
    y[2] = -100
    value, lse = fused_linear(h, w, y, bias=b, return_lse=True, tile=3)
    z = logits(h, w, b)
    expected = torch.where(y == -100, 0, z.logsumexp(1))
    torch.testing.assert_close(lse, expected)
    assert_same(value + lse.square().sum(), F.cross_entropy(z, y) + expected.square().sum(), (h, w, b))


def test_statistics_by_gradcheck():
    h, w, b, y = head(rows=4, width=3, classes=7)
    u = torch.rand(7, dtype=torch.float64)

    def stats(h, w, b):
        found = linear_stats(h, w, y, bias=b, softcap=2.0, needs=("sum", "sumsq"), u=u, tile=3)
        return found.lse, found.target, found.sum, found.sumsq

    assert torch.autograd.gradcheck(stats, (h, w, b))
    z = logits(h, w, b, 2.0)
    expected = (z.logsumexp(1), z[range(4), y], z @ u, z.square().sum(1))
    for ours, theirs in zip(stats(h, w, b), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_weight(backend):
    h, w, _, y = head()
    kernel = w.detach().T.contiguous().requires_grad_()  # [D, V], as transformers' Conv1D keeps it
    assert_same(fused_linear(h, kernel.T, y, backend=backend), F.cross_entropy(h @ kernel, y), (h, kernel))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 6)}, "don't fit the weight"),
        ({"target": torch.zeros(5, dtype=torch.long)}, "don't fit hidden states"),
        ({"target": torch.zeros(4)}, "don't fit hidden states"),
        ({"bias": torch.zeros(2)}, "bias has shape"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"tile": 0}, "tile is 0"),
        ({"reduction": "median"}, "median"),
        ({"backend": "rowz"}, "rowz"),
        ({"backend": "rows", "reduction": "none"}, "'rows'"),
        ({"sample_weight": torch.ones(3)}, "sample_weight has shape"),
        ({"class_weight": torch.ones(2)}, "class_weight has shape"),
        ({"loss": "no_such_loss"}, "no_such_loss"),
        ({"hidden": torch.zeros(4, 3, dtype=torch.float16)}, "float16"),
    ],
)
def test_bad_input_is_named(change, message):
    call = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(7, 3), "target": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(LossplugError, match=message):
        fused_linear(**{**call, **change})


def test_a_loss_that_needs_logits_is_refused():
    others = [
        e.name for e in registry if e.kind == "loss" and e.signature == "logits_index" and not e.facts.get("fusable")
    ]
    for name in others[:1]:
        with pytest.raises(LossplugError, match="needs materialised logits"):
            fused_linear(torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(4, dtype=torch.long), name)
    with pytest.raises(LossplugError, match="needs materialised logits"):
        fused_linear(
            torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(4, dtype=torch.long), torch.nn.CrossEntropyLoss()
        )


@pytest.mark.parametrize("label", [-1, 13])
def test_label_out_of_range(label):
    h, w, _, y = head()
    y[2] = label
    with pytest.raises(LabelError, match=str(label)):
        fused_linear(h, w, y)
    assert fused_linear(h, w, y, ignore_index=label).isfinite()


def test_sizes_of_chunks_and_tiles():
    assert chunk_rows(4096, 49152, 4) * 49152 * 4 < 0.05 * 3 * 4 * 4096 * 49152
    assert chunk_rows(1, 10, 4) == 1
    assert chunk_rows(10**6, 128_000, 2) <= 1024
    assert tile_width(4096, 49152) == 4096
    assert tile_width(10**6, 49152) == 128
    assert tile_width(8, 20) == 20


def test_inside_a_compiled_function():
    h, w, _, y = head(dtype=torch.float32)

    @torch.compile(backend="eager")
    def step(h, w, y):
        return fused_linear(torch.tanh(h), w, y) * 2

    assert_same(step(h, w, y), 2 * F.cross_entropy(torch.tanh(h) @ w.T, y), (h, w), 1e-5)
