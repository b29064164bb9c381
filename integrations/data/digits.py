"""Scikit-learn's handwritten digits: 1797 grey images of 8 x 8 pixels, embedded in the package, no download."""

from __future__ import annotations

import torch

from lightning_lossplug.errors import require
from lightning_lossplug.integrations.data.images import ImageArrays
from lightning_lossplug.integrations.data.module import BatchedDataModule, stratified_split

MEAN, STD = 0.3053, 0.3760  # of all pixels, on the scale of 0 to 1


class DigitsData(BatchedDataModule):
    """Ten classes of 8 x 8 digits in a stratified split of 1257 train, 270 validation and 270 test images.

    A batch is ``(x, y)``: ``x`` float32 ``[B, channels, img_size, img_size]``, ``y`` int64 ``[B]``.

    Args:
        batch_size: Samples per process and batch.
        img_size: Side the images are resized to (bilinear); null keeps 8.
        channels: 1, or 3 equal ones for models that want colour.
        train_limit: Keep only so many training images, classes balanced.
        with_index: Whether a batch is ``(x, y, index)``.
        num_workers: Worker processes of each loader.
        seed: Seed of split and order.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998); the copy of scikit-learn.
    """

    num_classes = 10

    def __init__(
        self,
        batch_size: int = 64,
        img_size: int | None = None,
        channels: int = 1,
        train_limit: int | None = None,
        with_index: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.save_hyperparameters(logger=False)
        self.img_size, self.channels = img_size, channels
        self.train_limit, self.with_index = train_limit, with_index

    def setup(self, stage: str) -> None:
        """Reads and splits the images."""
        digits = require("sklearn.datasets", "vision", "DigitsData").load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8)  # integers 0 to 16
        labels = torch.from_numpy(digits.target).to(torch.int64)
        held_out = round(0.15 * len(labels))
        val, test, train = stratified_split(labels, [held_out, held_out, len(labels) - 2 * held_out], self.seed)
        self.train_set, self.val_set, self.test_set = (
            ImageArrays(
                images[part],
                labels[part],
                white=16.0,
                mean=MEAN,
                std=STD,
                img_size=self.img_size,
                channels=self.channels,
                seed=self.seed,
                with_index=self.with_index,
            )
            for part in (train[: self.train_limit], val, test)
        )
