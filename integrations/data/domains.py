"""Fashion-MNIST in four domains, one held out: for training that has to generalise to a domain it never saw."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.integrations.data.images import ImageArrays
from lightning_lossplug.integrations.data.loader import ResumableLoader
from lightning_lossplug.integrations.data.mnist import FashionMNISTData
from lightning_lossplug.integrations.data.module import as_is, stratified_split
from lightning_lossplug.integrations.data.order import epoch_order, mix, random_uniform

Domain = Literal["rotation", "background", "blur", "inversion"]
DOMAINS: tuple[str, ...] = get_args(Domain)


def to_domain(images: Tensor, domain: str, index: Tensor, seed: int = 0, strength: float = 1.0) -> Tensor:
    """Moves grey images to a domain, by numbers that depend on ``(index, seed)`` alone.

    At full strength ``rotation`` turns by 30 to 90 degrees, to the left or the right; ``background`` puts a smooth
    random pattern behind the object; ``blur`` is a Gaussian of 1.5 pixels; ``inversion`` swaps black and white. At
    strength s angles, brightness of the pattern and width of the Gaussian are s times that, and only pixels of at
    least 255 (1 - s) are inverted.

    Args:
        images: uint8 ``[samples, height, width]``, objects on black.
        domain: One of ``rotation``, ``background``, ``blur`` and ``inversion``.
        index: Number of each image, int64 ``[samples]``.
        seed: Seed of the draws.
        strength: Above 0 to 1.

    Raises:
        LossplugError: Another domain or strength.
    """
    _check(domain, strength)
    if domain == "inversion":
        return torch.where(images >= 255 * (1 - strength), 255 - images, images)
    x = images[:, None].float()
    if domain == "blur":
        at = torch.arange(-4, 5, dtype=torch.float32)
        row = torch.exp(-(at**2) / (2 * (1.5 * strength) ** 2))
        row = row / row.sum()
        x = F.conv2d(F.conv2d(x, row[None, None, None, :], padding=(0, 4)), row[None, None, :, None], padding=(4, 0))
    elif domain == "rotation":
        draw = 2 * random_uniform(index, seed, 1) - 1
        angle = (draw.sign() * (30 + 60 * draw.abs()) * strength).deg2rad().float()
        cos, sin, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
        turn = torch.stack([torch.stack([cos, -sin, none], 1), torch.stack([sin, cos, none], 1)], 1)
        x = F.grid_sample(x, F.affine_grid(turn, list(x.shape), align_corners=False), align_corners=False)
    else:
        cells = torch.stack([random_uniform(index, seed, 2, cell) for cell in range(25)], 1).float()
        grid = cells.reshape(-1, 1, 5, 5) * (200 * strength)
        pattern = F.interpolate(grid, size=x.shape[-2:], mode="bicubic").clamp(0, 255)
        x = x + pattern * (1 - x / 255)
    return x.round().clamp(0, 255).to(torch.uint8)[:, 0]


class BalancedDomains(Dataset[Any]):
    """Batches with as many samples of each domain: sample ``i`` stands for one of every domain.

    Which ones stand together is drawn anew in every epoch. A batch is that of the parts, one after the other.

    Args:
        parts: A dataset per domain that returns whole batches; longer ones are cut to the shortest.
        seed: Seed of the draw.
    """

    def __init__(self, parts: list[ImageArrays], seed: int = 0) -> None:
        self.parts, self.seed, self.epoch = parts, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch."""
        self.epoch = epoch
        for part in self.parts:
            part.set_epoch(epoch)

    def __len__(self) -> int:
        return min(len(part) for part in self.parts)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """Returns a finished batch of ``len(indices)`` samples of each domain."""
        found = []
        for number, part in enumerate(self.parts):
            order = epoch_order(len(part), mix(self.seed, number), self.epoch)
            found.append(part.__getitems__(order[indices].tolist()))
        return tuple(torch.cat(same) for same in zip(*found, strict=True))


class DomainShiftData(FashionMNISTData):
    """Fashion-MNIST whose images are dealt to four domains; one domain is never trained on, and is the test.

    Every image belongs to one domain (:func:`to_domain`), as in PACS. A training batch has as many samples of each
    domain that is trained on. Validation images come from those domains too; the test is all 10,000 test images moved
    to the domain that was held out.

    Args:
        held_out: ``rotation``, ``background``, ``blur`` or ``inversion``.
        root: Folder with the four IDX files; null takes the folder of the Debian package ``dataset-fashion-mnist``.
        batch_size: Samples per process and batch, a multiple of three.
        val_split: Validation images, taken from the training images: a number, or a fraction below 1.
        train_limit: Keep only so many of the other training images (before one domain is left out).
        num_workers: Worker processes of each loader.
        seed: Seed of domains, split and order.
        strength: How far the domains are apart, above 0 to 1 (see :func:`to_domain`).

    Raises:
        LossplugError: Another domain or strength, a batch size that three does not divide, missing files.
    """

    def __init__(
        self,
        held_out: Domain = "rotation",
        root: str | None = None,
        batch_size: int = 96,
        val_split: int | float = 5000,
        train_limit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        strength: float = 1.0,
    ) -> None:
        _check(held_out, strength)
        self.sources = [domain for domain in DOMAINS if domain != held_out]
        if batch_size % len(self.sources):
            raise LossplugError(
                f"batch_size is {batch_size}, {len(self.sources)} domains share a batch",
                where="DomainShiftData",
                remedy=f"Give a multiple of {len(self.sources)}",
            )
        super().__init__(root, batch_size, val_split, train_limit, num_workers=num_workers, seed=seed)
        self.held_out, self.strength = held_out, strength

    def setup(self, stage: str) -> None:
        """Reads the files (once), deals the images to the domains."""
        if hasattr(self, "balanced"):
            return
        super().setup(stage)
        train, val, test = (_images(part) for part in (self.train_set, self.val_set, self.test_set))
        self.balanced = BalancedDomains([self._part(train, domain) for domain in self.sources], self.seed)
        parts = [self._part(val, domain) for domain in self.sources]
        self.val_set = self._dataset(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))
        everything = torch.arange(len(test))
        moved = to_domain(test.images, self.held_out, everything, self.seed, self.strength)
        self.test_set = self._dataset(moved, test.labels)

    def _part(self, whole: ImageArrays, domain: str) -> ImageArrays:
        # Drawn class by class: a fixed stride would give a domain half of the classes, which come in turns.
        shares = [len(whole) // len(DOMAINS)] * len(DOMAINS)
        index = stratified_split(whole.labels, shares, self.seed)[DOMAINS.index(domain)]
        images = to_domain(whole.images[index], domain, index, self.seed, self.strength)
        return self._dataset(images, whole.labels[index])

    def train_dataloader(self) -> ResumableLoader:
        """Domain-balanced batches, shuffled by ``(seed, epoch)``."""
        size = self.batch_size // len(self.sources)
        loader = ResumableLoader(
            self.balanced,
            size,
            seed=self.seed,
            num_workers=self.num_workers,
            collate_fn=as_is,
            trainer=self.trainer,
        )
        if self._saved_loader is not None:
            loader.load_state_dict(self._saved_loader)
        return loader


def _images(part: Dataset[Any]) -> ImageArrays:
    assert isinstance(part, ImageArrays)
    return part


def _check(domain: str, strength: float) -> None:
    if domain not in DOMAINS:
        raise LossplugError(
            f"there is no domain {domain!r}", where="DomainShiftData", remedy=suggestion(domain, DOMAINS)
        )
    if not 0 < strength <= 1:
        raise LossplugError(f"strength is {strength!r}, allowed is above 0 to 1", where="DomainShiftData")
