"""The identities of the nm_mask card, against brute force and a stable sort."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug import LossplugError
from lightning_lossplug.sparsity import nm_mask

PATTERNS = [(1, 2), (1, 4), (2, 4), (3, 4), (1, 8), (2, 8), (4, 8), (5, 8), (7, 8), (2, 6), (3, 12), (1, 16), (2, 16)]
PATTERNS += [(4, 16), (8, 16), (15, 16), (1, 32), (2, 32), (31, 32), (8, 64), (63, 64), (16, 128), (64, 128), (5, 100)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def by_sorting(scores, n, m):
    """The definition: of every group along the last axis, the N first in the order (score down, index up)."""
    groups = scores.reshape(-1, m)
    keep = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, keep, True).reshape(scores.shape)


def weights(shape, dtype, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (values.mul(1.5).round() if ties else values).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ties", [False, True], ids=["continuous", "ties"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}:{p[1]}")
def test_equals_the_definition(pattern, ties, dtype):
    n, m = pattern
    for rows, groups in ((1, 1), (3, 5), (130, 7)):
        weight = weights((rows, groups * m), dtype, ties, seed=rows)
        mask = nm_mask(weight, n, m)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, by_sorting(weight.abs(), n, m))


@pytest.mark.parametrize("pattern", [(2, 4), (1, 16), (3, 8), (8, 32)])
def test_large_weights_cross_every_internal_boundary(pattern):
    weight = weights((513, 1024), torch.float32, True, seed=0)
    assert torch.equal(nm_mask(weight, *pattern), by_sorting(weight.abs(), *pattern))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 8), m=st.integers(1, 8), seed=st.integers(0, 10_000), ties=st.booleans())
def test_kept_mass_is_the_largest_of_all_patterns(n, m, seed, ties):
    n = min(n, m)
    weight = weights((2, 3 * m), torch.float64, ties, seed)
    kept = (weight.abs() * nm_mask(weight, n, m)).reshape(-1, m).sum(1)
    groups = weight.abs().reshape(-1, m)
    best = torch.stack([groups[:, list(choice)].sum(1) for choice in itertools.combinations(range(m), n)]).amax(0)
    assert torch.allclose(kept, best, rtol=1e-12)
    assert torch.equal(nm_mask(weight, n, m).reshape(-1, m).sum(1), torch.full((6,), n))


@settings(max_examples=40, deadline=None)
@given(pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_invariances(pattern, seed, scale):
    n, m = pattern
    weight = weights((4, 2 * m), torch.float64, False, seed)
    mask = nm_mask(weight, n, m)
    assert torch.equal(nm_mask(weight * scale, n, m), mask)
    signs = torch.randint(0, 2, weight.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    assert torch.equal(nm_mask(weight * signs, n, m), mask)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    shuffled = weight.reshape(-1, m)[:, order].reshape(weight.shape)
    assert torch.equal(nm_mask(shuffled, n, m), mask.reshape(-1, m)[:, order].reshape(weight.shape))
    assert torch.equal(nm_mask(weight * mask, n, m), mask)  # idempotent
    if n < m:
        assert not bool((mask & ~nm_mask(weight, n + 1, m)).any())  # nested
    assert bool(nm_mask(weight, m, m).all())


def test_ties_keep_the_lower_index():
    assert nm_mask(torch.ones(1, 8), 2, 4).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]
    assert nm_mask(torch.tensor([[0.0, -0.0, 0.0, 0.0]]), 1, 4).int().tolist() == [[1, 0, 0, 0]]
    assert nm_mask(torch.tensor([[-1.0, 2.0, 1.0, -2.0, 1.0, 0.0, 0.0, -1.0]]), 3, 8).int().tolist() == [
        [1, 1, 0, 1, 0, 0, 0, 0]
    ]


@pytest.mark.parametrize("pattern", [(2, 4), (1, 8), (4, 16)])
def test_axes_and_strides(pattern):
    n, m = pattern
    linear = weights((6, 2 * m), torch.float32, True, seed=1)
    expected = nm_mask(linear, n, m)
    assert torch.equal(nm_mask(linear[:, :, None, None], n, m)[:, :, 0, 0], expected)  # a 1x1 convolution
    assert torch.equal(nm_mask(linear.t(), n, m, dim=0), expected.t())  # transformers' Conv1D
    assert torch.equal(nm_mask(linear.t().contiguous(), n, m, dim=0), expected.t())
    assert torch.equal(nm_mask(linear, n, m, dim=-1), expected)
    conv = weights((5, 2 * m, 3, 3), torch.float32, True, seed=2)
    want = by_sorting(conv.permute(0, 2, 3, 1).abs(), n, m).permute(0, 3, 1, 2)
    assert torch.equal(nm_mask(conv, n, m), want)
    assert torch.equal(nm_mask(conv.to(memory_format=torch.channels_last), n, m), want)
    experts = weights((3, 2 * m, 7), torch.float32, False, seed=3)
    assert torch.equal(nm_mask(experts, n, m, dim=1), by_sorting(experts.movedim(1, 2).abs(), n, m).movedim(2, 1))
    vector = weights((3 * m,), torch.float32, False, seed=4)
    assert torch.equal(nm_mask(vector, n, m), by_sorting(vector.abs(), n, m))


def test_scores_take_the_place_of_the_magnitude():
    weight = weights((4, 16), torch.float32, False, seed=5)
    norm = torch.rand(16) + 0.1
    wanda = weight.abs() * norm
    assert torch.equal(nm_mask(weight, 2, 4, scores=wanda), by_sorting(wanda, 2, 4))
    assert torch.equal(nm_mask(weight, 2, 4, scores=weight.abs()), nm_mask(weight, 2, 4))


@pytest.mark.parametrize("pattern", [(2, 4), (1, 16), (4, 16), (3, 12)])
def test_compiles_in_one_graph(pattern):
    weight = weights((8, 48), torch.float32, True, seed=6)
    compiled = torch.compile(lambda w: nm_mask(w, *pattern), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), nm_mask(weight, *pattern))


def test_no_gradient_and_no_side_effect():
    weight = torch.randn(4, 8, requires_grad=True)
    before = weight.detach().clone()
    assert not nm_mask(weight, 2, 4).requires_grad
    assert torch.equal(weight, before)


def test_empty():
    assert nm_mask(torch.empty(0, 8), 2, 4).shape == (0, 8)
    assert nm_mask(torch.empty(4, 0), 2, 4).shape == (4, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nm_mask(torch.randn(4, 8), 5, 4), "n=5, m=4 is no N:M pattern"),
        (lambda: nm_mask(torch.randn(4, 8), 0, 4), "n=0, m=4 is no N:M pattern"),
        (lambda: nm_mask(torch.randn(4, 10), 2, 4), "groups of m=4 don't divide axis 1"),
        (lambda: nm_mask(torch.randn(4, 8), 2, 4, scores=torch.rand(4, 4)), r"scores of shape \(4, 4\)"),
        (lambda: nm_mask(torch.randn(4, 8), 2, 4, scores=-torch.rand(4, 8)), "scores are negative"),
        (lambda: nm_mask(torch.ones(4, 8, dtype=torch.int32), 2, 4), "dtype torch.int32"),
        (lambda: nm_mask(torch.randn(4, 8), 2, 4, dim=2), "dim=2 is no axis"),
        (lambda: nm_mask(torch.tensor(1.0), 1, 1), "is no axis"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(LossplugError, match=message):
        call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_counted(bad):
    weight = torch.randn(4, 8)
    weight[1, 2] = weight[3, 7] = bad
    with pytest.raises(LossplugError, match="2 of the 32 entries of the weight are NaN or infinite"):
        nm_mask(weight, 2, 4)
