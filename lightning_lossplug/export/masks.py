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
    """Writes masks by the names of their weights; their shapes are in the header, as JSON under ``shapes``."""
    safetensors = require("safetensors.torch", "lightning", "a mask file")
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    packed = {name: pack_mask(mask) for name, mask in masks.items()}
    safetensors.save_file(packed, path, metadata={"format": "packed_bits", "shapes": json.dumps(shapes)})


def read_masks(path: str | Path) -> dict[str, Tensor]:
    """Reads a mask file, or the one in an artifact's folder: bool tensors by the names of their weights.

    Raises:
        LossplugError: There is none, or it can't be read.
    """
    safetensors = require("safetensors", "lightning", "a mask file")
    path = Path(path)
    path = path / MASKS if path.is_dir() else path
    if not path.is_file():
        raise LossplugError("there is no mask file", where=str(path), remedy="Export with --masks")
    try:
        with safetensors.safe_open(path, "pt") as file:
            shapes = json.loads((file.metadata() or {})["shapes"])
            return {name: unpack_mask(file.get_tensor(name), tuple(shape)) for name, shape in shapes.items()}
    except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
        if isinstance(error, LossplugError):
            raise
        raise LossplugError(f"the mask file can't be read ({error})", where=str(path)) from None
