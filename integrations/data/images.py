"""Small images kept as uint8 in memory and turned into network input a whole batch at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.data.order import random_uniform


class ImageArrays(Dataset[Any]):
    """Grey images as ``(x, y)`` or ``(x, y, index)`` batches.

    ``x = (pixel / white - mean) / std``, resized bilinearly with antialiasing (``align_corners=False``), repeated over
    the channels. Augmentation is a function of ``(seed, epoch, index)``: workers, processes and restarts do not change
    it.

    Args:
        images: uint8, shape ``[samples, height, width]``.
        labels: int64, shape ``[samples]``.
        white: Pixel value that stands for 1.
        mean: Mean of the pixels on the scale of 0 to 1.
        std: Their standard deviation.
        img_size: Side of the output; None keeps the stored size.
        channels: 1 or 3.
        shift: Largest random shift in stored pixels, in each direction; what is shifted in is 0.
        flip: Whether to mirror left to right at random.
        seed: Seed of the augmentation.
        with_index: Whether a batch also holds the sample indices, int64 ``[B]``.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        white: float,
        mean: float,
        std: float,
        img_size: int | None = None,
        channels: int = 1,
        shift: int = 0,
        flip: bool = False,
        seed: int = 0,
        with_index: bool = False,
    ) -> None:
        if len(images) != len(labels):
            raise LossplugError(f"there are {len(images)} images and {len(labels)} labels", remedy="Check the files")
        if channels not in (1, 3):
            raise LossplugError(f"channels is {channels}", remedy="Give 1 or 3")
        if img_size is not None and img_size < 1:
            raise LossplugError(f"img_size is {img_size}", remedy="Give a positive number of pixels or null")
        self.images, self.labels = images, labels
        self.white, self.mean, self.std = white, mean, std
        self.img_size, self.channels = img_size, channels
        self.shift, self.flip, self.seed, self.with_index = shift, flip, seed, with_index
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch, which the augmentation depends on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(part[0] for part in self.__getitems__([index]))

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """Returns a finished batch: float32 ``[B, channels, size, size]``, int64 ``[B]`` (and int64 ``[B]``)."""
        index = torch.tensor(indices, dtype=torch.int64)
        pixels = self.images[index]
        if self.shift or self.flip:
            pixels = self._augment(pixels, index)
        x = pixels[:, None].to(torch.float32).div_(self.white)
        if self.img_size is not None and tuple(x.shape[-2:]) != (self.img_size, self.img_size):
            x = F.interpolate(x, size=(self.img_size, self.img_size), mode="bilinear", antialias=True)
        x = x.sub_(self.mean).div_(self.std)
        if self.channels == 3:
            x = x.repeat(1, 3, 1, 1)
        y = self.labels[index]
        return (x, y, index) if self.with_index else (x, y)

    def _augment(self, pixels: Tensor, index: Tensor) -> Tensor:
        height, width = pixels.shape[1:]
        draws = [random_uniform(index, self.seed, self.epoch, stream) for stream in range(3)]
        top, left = ((draw * (2 * self.shift + 1)).long() for draw in draws[:2])
        rows = top[:, None] + torch.arange(height)
        columns = left[:, None] + torch.arange(width)
        if self.flip:
            columns = torch.where((draws[2] < 0.5)[:, None], columns.flip(1), columns)
        padded = F.pad(pixels, (self.shift,) * 4)
        return padded[torch.arange(len(pixels))[:, None, None], rows[:, :, None], columns[:, None, :]]
