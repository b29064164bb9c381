"""Masks as bits: they say what the bool mask says, a byte per eight weights, in shards, compiled, in the technique."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_lossplug.export.masks import pack_mask
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import NMSettings, NMTechnique, decayed_ste, masked_ste, nm_mask
from lightning_lossplug.sparsity.bits import (
    changed,
    factors,
    flat_bits,
    mask_,
    masked,
    pack_rows,
    shard_bits,
    unpack_rows,
)
from lightning_lossplug.sparsity.ste import packed_ste
from lightning_lossplug.surgery import latent
from lightning_lossplug.surgery.shards import in_tensor_parallel

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
shapes = st.sampled_from([(1, 1), (3, 8), (5, 12), (4, 3, 3, 3), (2, 4, 6), (7,), (0, 8), (6, 16)])


def case(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return values, torch.rand(shape, generator=generator) > 0.5


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 999))
def test_bits_come_back_row_by_row(shape, seed):
    _, mask = case(shape, seed)
    bits = pack_rows(mask)
    rows, length = shape[0], math.prod(shape[1:])
    assert bits.dtype == torch.uint8
    assert bits.shape == (rows, -(-length // 8))
    assert torch.equal(unpack_rows(bits, shape), mask)
    for row in range(rows):  # a shard of the rows is a shard of the bits, in the order of the exported file
        assert torch.equal(bits[row], pack_mask(mask[row]))
    assert torch.equal(flat_bits(bits, shape)[0], pack_mask(mask))
    other = case(shape, seed + 1)[1]
    assert changed(bits, pack_rows(other)) == int((mask != other).sum())


def test_parts_and_other_strides_of_a_mask_are_packed():
    mask = case((9, 24), 0)[1]
    for part in (mask[1:, :], mask[:, 3:11], mask.t(), mask.view(-1)[5:69].view(8, 8)):
        assert torch.equal(unpack_rows(pack_rows(part), part.shape), part)
    last = case((4, 8, 3, 3), 1)[1].to(memory_format=torch.channels_last)
    assert torch.equal(unpack_rows(pack_rows(last), last.shape), last)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES), decay=st.sampled_from([0.0, 0.3, 1.0]))
def test_what_is_done_by_bits_is_what_the_mask_says(shape, seed, dtype, decay):
    values, mask = case(shape, seed, dtype)
    bits = pack_rows(mask)
    assert torch.equal(masked(values, bits), torch.where(mask, values, 0))
    assert torch.equal(mask_(values.clone(), bits), torch.where(mask, values, 0))
    assert torch.equal(factors(bits, values, 1.0, 0.5), torch.where(mask, 1.0, 0.5).to(dtype))
    used = packed_ste(values, bits, torch.tensor(decay))
    factor = torch.tensor(decay).to(dtype if dtype.itemsize == 8 else torch.float32)
    assert torch.equal(used, torch.where(mask, values, values * factor))
    assert torch.equal(used, decayed_ste(values, mask, factor))


def test_pruned_entries_are_plus_zero_whatever_they_hold():
    values = torch.tensor([[-1.0, float("nan"), float("inf"), -0.0, 5.0, -6.0, 7.0, -8.0]])
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0]]).bool()
    for used in (masked_ste(values, mask), packed_ste(values, pack_rows(mask), torch.tensor(0.0))):
        assert used.tolist() == [[0, 0, 0, 0, 5, -6, 0, 0]]
        assert not used[~mask].signbit().any()


@pytest.mark.parametrize("grad_mode", ["ste", "masked"])
def test_compiled_is_the_same_without_a_break(grad_mode):
    values, mask = case((6, 24), 3, torch.float32)
    bits, decay = pack_rows(mask), torch.tensor(0.25)

    def use(values, bits, decay):
        return packed_ste(values, bits, decay, grad_mode) + packed_ste(values, bits, None, grad_mode)

    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")
    results = []
    for call in (use, compiled):
        leaf = values.clone().requires_grad_()
        found = call(leaf, bits, decay)
        found.square().sum().backward()
        results.append((found.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_the_technique_keeps_one_bit_per_weight_and_saves_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 24), nn.Linear(24, 4))
    plain = {id(b) for b in model.buffers()}
    technique = NMTechnique(NMSettings(2, 4, "nm_srste", include=["1", "3"]))
    technique.attach(model)
    technique.advance(Progress(0, 10))
    weights = [layer.weight for layer in technique.layers.values()]
    extra = sum(b.numel() * b.element_size() for b in model.buffers() if id(b) not in plain)
    assert extra == sum(w.numel() for w in weights) // 8 + 4 * len(weights)  # and the decay, a float per layer
    for name, layer in technique.layers.items():
        assert torch.equal(layer.transform.mask, nm_mask(layer.weight, 2, 4)), name
    before = {name: layer.transform.mask for name, layer in technique.layers.items()}
    with torch.no_grad():
        for weight in weights:
            weight.add_(torch.randn_like(weight), alpha=0.1)
    technique.advance(Progress(1, 10))
    for name, layer in technique.layers.items():
        flips = (before[name] != layer.transform.mask).float().mean()
        assert layer.flip_rate == pytest.approx(float(flips))
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "bits"):
            module.reset()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[3].weight, model[3].weight)
    assert torch.equal(model[3].weight, latent(model[3]) * nm_mask(latent(model[3]), 2, 4))


def test_shards_of_rows_are_shards_of_bits_and_tensor_parallelism_is_told_apart():
    # a process group of one: what the placements say is what counts here
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        _, mask = case((6, 24), 5)
        for name, tensor_parallel in (("data_parallel", False), ("tensor_parallel", True)):
            mesh = init_device_mesh("cpu", (1,), mesh_dim_names=(name,))
            for place in (Shard(0), Shard(1), Replicate()):
                weight = distribute_tensor(torch.randn(6, 24), mesh, [place])
                assert torch.equal(unpack_rows(shard_bits(pack_rows(mask), weight), (6, 24)), mask)
                assert in_tensor_parallel(weight) is tensor_parallel
        assert not in_tensor_parallel(torch.zeros(2))
    finally:
        dist.destroy_process_group()
