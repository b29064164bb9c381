"""What the two golden scripts share: measuring a run, and what leaves it as a file."""

import time
import zlib
from pathlib import Path

import torch


class Clock:
    """Wall and processor seconds of a block, added up over blocks."""

    def __init__(self):
        self.wall = self.processor = 0.0

    def __enter__(self):
        self._start = time.perf_counter(), time.process_time()

    def __exit__(self, *args):
        self.wall += time.perf_counter() - self._start[0]
        self.processor += time.process_time() - self._start[1]


def deflated(path: Path) -> int:
    """Bytes of a file as zip stores it: zeros of a mask cost little there."""
    packer, total = zlib.compressobj(6), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total += len(packer.compress(block))
    return total + len(packer.flush())


def compare(one: torch.Tensor, two: torch.Tensor) -> dict[str, float]:
    """Largest difference of logits, and how often the likeliest class is the same."""
    return {
        "export difference": float((one - two).abs().max()),
        "export agreement": float((one.argmax(-1) == two.argmax(-1)).float().mean()),
    }
