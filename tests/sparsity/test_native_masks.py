"""The C++ functions give what PyTorch gives, to the bit; and where they can't be used, PyTorch does the work."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_lossplug import LossplugError
from lightning_lossplug import native as compiled
from lightning_lossplug.sparsity import NMSettings, NMTechnique, native, nm_mask, pack_rows, unpack_rows
from lightning_lossplug.sparsity._select import fill_mask
from lightning_lossplug.sparsity.bits import attenuated, mask_, masked
from lightning_lossplug.sparsity.srste import srste_decay_, srste_penalty_

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PATTERNS = [(1, 2), (2, 4), (3, 4), (1, 8), (3, 8), (7, 8), (1, 16), (5, 16), (15, 16), (2, 12), (1, 32), (31, 32)]
PATTERNS += [(9, 32), (1, 48), (20, 48), (33, 64), (63, 64)]


@pytest.fixture
def no_compiler(monkeypatch):
    """A machine without one, for a test."""
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-DOTHER"))
    caches = (compiled.load, native._library)
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def test_it_is_used_here():
    assert native.native(torch.zeros(4, 4)) is not None, "no C++ compiler: the tests of this file compare nothing"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_masks_equal_those_of_pytorch(data):
    n, m = data.draw(st.sampled_from(PATTERNS))
    rows, groups, inner = (data.draw(st.integers(1, most)) for most in (5, 7, 10))
    weight = torch.randn(
        rows, groups * m, inner, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    if data.draw(st.booleans()):
        weight = (weight * 2).round() / 2  # ties, and zeros of both signs
    weight = weight.to(data.draw(st.sampled_from(DTYPES)))
    axis = data.draw(st.sampled_from([0, 1]))
    weight = weight if axis else weight.movedim(0, 1).contiguous()
    expected = torch.empty(weight.shape, dtype=torch.bool)
    before = weight.shape[0] if axis else 1
    shape = (before * groups, m, -1)
    fill_mask(weight.view(shape), n, expected.view(shape))
    assert torch.equal(nm_mask(weight, n, m, axis), expected)
    bits = nm_mask(weight, n, m, axis, packed=True)
    assert torch.equal(bits, pack_rows(expected))
    assert torch.equal(unpack_rows(bits, weight.shape), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", [(16, 32), (9, 32), (33, 64), (70, 128), (5, 256), (255, 256)])
def test_large_groups_along_rows(pattern, dtype):
    n, m = pattern
    torch.manual_seed(0)
    for weight in (torch.randn(7, 3 * m), torch.randn(7, 3 * m).round(), torch.ones(2, m), torch.zeros(2, m)):
        weight = weight.to(dtype)
        expected = torch.empty(weight.shape, dtype=torch.bool)
        fill_mask(weight.view(-1, m, 1), n, expected.view(-1, m, 1))
        assert torch.equal(nm_mask(weight, n, m), expected)
        assert torch.equal(unpack_rows(nm_mask(weight, n, m, packed=True), weight.shape), expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_becomes_of_a_weight_equals_pytorch(data):
    shape = [data.draw(st.integers(1, 9)) for _ in range(data.draw(st.integers(1, 3)))]
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(shape, generator=generator) < 0.5
    weight[~mask & (weight > 1)] = float("nan")
    bits = pack_rows(mask)
    assert torch.equal(masked(weight, bits), torch.where(mask, weight, 0.0))
    weight = weight.nan_to_num()
    assert torch.equal(mask_(weight.clone(), bits), torch.where(mask, weight, 0.0))
    if dtype.itemsize > 2:
        assert torch.equal(attenuated(weight, bits, 0.3), torch.where(mask, weight, weight * 0.3))
    pulled = srste_penalty_(grad.clone(), weight, mask, 0.25)
    torch.testing.assert_close(pulled, torch.where(mask, grad, grad + 0.25 * weight))
    assert torch.equal(pulled[mask], grad[mask])
    assert torch.equal(srste_decay_(weight.clone(), bits, 0.5, 0.5), torch.where(mask, weight, weight * 0.75))


def test_many_threads_make_the_same_mask():
    weight, threads = torch.randn(512, 1024), torch.get_num_threads()
    single = nm_mask(weight, 2, 4, packed=True)
    torch.set_num_threads(4)
    try:
        assert torch.equal(nm_mask(weight, 2, 4, packed=True), single)
        assert torch.equal(masked(weight, single), weight * unpack_rows(single, weight.shape))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 16), (5, 32), (30, 64)])
def test_what_cannot_be_ordered_is_refused(bad, pattern):
    for dtype in DTYPES:
        weight = torch.randn(3, 192).to(dtype)
        weight[1, 77] = bad
        with pytest.raises(LossplugError, match="1 of the 576 entries of the weight are NaN or infinite"):
            nm_mask(weight, *pattern, packed=True)
        assert nm_mask(weight, *pattern, check_finite=False)[1, 77]


def test_in_place_work_is_known_to_autograd():
    weight = torch.randn(4, 8, requires_grad=True)
    square = weight**2
    with torch.no_grad():
        mask_(weight, nm_mask(weight, 2, 4, packed=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


def test_what_watches_operators_sees_pytorch():
    weight, example = torch.randn(2, 4, 8)
    mask = nm_mask(weight, 2, 4)
    bits = pack_rows(mask)
    traced = make_fx(lambda w: masked(w, bits))(example)
    assert torch.equal(traced(weight), weight * mask)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(masked(weight, bits), torch._subclasses.FakeTensor)
    assert native.native(weight.T) is None
    assert native.native(torch.empty(4, 4, device="meta")) is None


def test_without_a_compiler_a_step_is_the_same(no_compiler):
    def step():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 2))
        technique = NMTechnique(NMSettings(2, 4, "nm_srste", include=["1"], lambda_w=0.1))
        technique.attach(model)
        technique.advance(technique._progress)
        model(torch.randn(4, 8)).sum().backward()
        technique.before_step(torch.optim.SGD(model.parameters(), lr=0.1))
        return [p.grad for p in model.parameters()]

    with pytest.warns(UserWarning, match=r"made in PyTorch \(slower\), since their C\+\+ functions .*nowhere"):
        plain = step()
    for function in (compiled.load, native._library):
        function.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CXX")
        assert all(torch.equal(a, b) for a, b in zip(plain, step(), strict=True))


def test_one_buffer_serves_all_layers_unless_somebody_keeps_it():
    torch.manual_seed(0)
    native._scratch.storage = None  # of other tests
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(16, 2))
    technique = NMTechnique(NMSettings(2, 4, "nm_ste", include=["0", "1", "2"]))
    technique.attach(model)
    technique.advance(technique._progress)
    seen = []
    handles = [layer.register_forward_pre_hook(lambda layer, _: seen.append(layer.weight)) for layer in model[:3]]
    kept = [w.clone() for w in (layer.weight for layer in model[:3])]
    model(torch.randn(4, 16)).sum().backward()  # hooks read each weight once more, and hold it
    for held, expected in zip(seen, kept, strict=True):
        assert torch.equal(held, expected)
    for handle in handles:
        handle.remove()
    seen.clear()
    model(torch.randn(4, 16)).sum().backward()
    buffer = native._scratch.storage
    assert buffer.nbytes() == 32 * 32 * 4
    outside = model[0].weight  # in no product: memory of its own, which may be saved
    assert outside.untyped_storage().nbytes() == outside.nbytes
    assert torch._C._storage_Use_Count(buffer._cdata) == 1
