"""Masks as bits: the round trip for every shape, the layout byte by byte, and damaged files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.export import pack_mask, read_masks, unpack_mask, write_masks


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(0, 9), min_size=0, max_size=4), seed=st.integers(0, 99))
def test_round_trip(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_mask(mask)
    assert len(packed) == -(-mask.numel() // 8)
    assert torch.equal(unpack_mask(packed, tuple(shape)), mask)


def test_the_layout_is_lowest_bit_first_in_row_major_order():
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 0] = mask[1, 3] = mask[2, 1] = True
    assert pack_mask(mask).tolist() == [0b10000001, 0b00000010]
    assert pack_mask(mask.T.contiguous().T).tolist() == [0b10000001, 0b00000010]


def test_a_file_and_its_folder(tmp_path):
    masks = {"a.weight": torch.rand(5, 8) < 0.5, "b.weight": torch.rand(2, 4, 3, 3) < 0.5}
    write_masks(masks, tmp_path / "masks.safetensors")
    for place in (tmp_path, tmp_path / "masks.safetensors"):
        found = read_masks(place)
        assert found.keys() == masks.keys()
        assert all(torch.equal(found[name], mask) for name, mask in masks.items())


def test_mistakes(tmp_path):
    with pytest.raises(LossplugError, match="Export with --masks"):
        read_masks(tmp_path)
    (tmp_path / "masks.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(LossplugError, match="can't be read"):
        read_masks(tmp_path)
    with pytest.raises(LossplugError, match=r"has dtype torch\.float32"):
        pack_mask(torch.ones(3))
    with pytest.raises(LossplugError, match="no bits of a mask of shape"):
        unpack_mask(torch.zeros(3, dtype=torch.uint8), (4, 4))
