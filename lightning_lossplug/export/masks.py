"""Masks as one small file: a bit per weight, so that training can go on with the same zeros.

The zeros of a dense file almost say it: they can't tell a kept weight that happens to be 0 from a pruned one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.untrusted import digest_tensors, parse_json, read_safetensors, reading, seal, shape_of, unseal

MASKS = "masks.safetensors"
_BITS = tuple(1 << place for place in range(8))


def pack_mask(mask: Tensor) -> Tensor:
    """Returns a bool tensor as bits, uint8 ``[ceil(numel / 8)]``.

    Entry ``i`` in row-major order is bit ``i % 8`` (the lowest is 0) of byte ``i // 8``; spare bits are 0.

    Raises:
        LossplugError: The mask isn't boolean.
    """
    if mask.dtype != torch.bool:
        raise LossplugError(f"the mask has dtype {mask.dtype}", remedy="Give a bool mask")
    flat = mask.detach().to("cpu").flatten()
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8))
    return (padded.view(-1, 8) * torch.tensor(_BITS, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns the bool mask of a shape from its bits.

    Raises:
        LossplugError: The number of bytes isn't that of the shape.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-count // 8),):
        raise LossplugError(
            f"{tuple(packed.shape)} of {packed.dtype} are no bits of a mask of shape {tuple(shape)}",
            remedy="Write the file again",
        )
    bits = packed[:, None].bitwise_and(torch.tensor(_BITS, dtype=torch.uint8)).bool()
    return bits.flatten()[:count].reshape(shape)


def write_masks(masks: dict[str, Tensor], path: Path) -> None:
    """Writes masks by the names of their weights; shapes (as JSON) and checksums are in the header."""
    safetensors = require("safetensors.torch", "lightning", "a mask file")
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    packed = {name: pack_mask(mask) for name, mask in masks.items()}
    header = seal({"shapes": json.dumps(shapes), "tensors": digest_tensors(packed)})
    safetensors.save_file(packed, path, metadata={"format": "packed_bits", **header})


def read_masks(path: str | Path) -> dict[str, Tensor]:
    """Reads a mask file, or the one in an artifact's folder: bool tensors by the names of their weights.

    Raises:
        LossplugError: There is none, or it can't be read.
    """
    path = Path(path)
    path = path / MASKS if path.is_dir() else path
    if not path.is_file():
        raise LossplugError("there is no mask file", where=str(path), remedy="Export with --masks")
    packed, header = read_safetensors(path, "a mask file")
    unseal({key: value for key, value in header.items() if key != "format"}, path)
    with reading(path, "the mask file"):
        if header["tensors"] != digest_tensors(packed):
            raise LossplugError("is damaged: its masks have another checksum than written", where=str(path))
        shapes = parse_json(header["shapes"], path)
        if set(shapes) != set(packed):
            raise LossplugError("the shapes in its header are those of other tensors", where=str(path))
        return {name: unpack_mask(packed[name], shape_of(shape, path)) for name, shape in shapes.items()}
