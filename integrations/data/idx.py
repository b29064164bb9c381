"""Reader for IDX files, the format of MNIST and its relatives."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError

_UINT8 = 0x08


def read_idx(path: str | Path) -> Tensor:
    """Reads an IDX file of unsigned bytes, gzip-compressed if its name ends in ``.gz``.

    The format: two zero bytes, the type (8 = uint8), the number of dimensions; each dimension as a big-endian 32-bit
    integer; then the values in row-major order.

    Args:
        path: The file.

    Returns:
        uint8 tensor of the file's shape.

    Raises:
        LossplugError: The file is missing, not an IDX file of bytes, or its length does not match its header.
    """
    path = Path(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise LossplugError("no such file", where=str(path), remedy="Check the folder") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LossplugError(
            f"the gzip file is damaged or cut off ({error})", where=str(path), remedy="Fetch it again"
        ) from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UINT8 or content[3] == 0:
        raise LossplugError(
            f"not an IDX file of unsigned bytes: it begins with {content[:4].hex(' ') or 'nothing'}",
            where=str(path),
            remedy="Expected 00 00 08 and the number of dimensions",
        )
    dimensions = content[3]
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise LossplugError("the header is cut off", where=str(path), remedy="Fetch it again")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise LossplugError(
            f"the header promises {math.prod(shape)} values ({list(shape)}), the file has {len(content) - header}",
            where=str(path),
            remedy="Fetch it again",
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)


def find_idx(folder: Path, stem: str) -> Path:
    """Returns ``folder/stem`` or ``folder/stem.gz``, whichever exists.

    Raises:
        LossplugError: Neither exists.
    """
    for name in (stem, f"{stem}.gz"):
        if (folder / name).is_file():
            return folder / name
    raise LossplugError(f"there is no {stem} and no {stem}.gz", where=str(folder), remedy="Check the folder")
