"""Image sets in IDX files: Fashion-MNIST, MNIST and everything laid out like them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.data.idx import find_idx, read_idx
from lightning_lossplug.integrations.data.images import ImageArrays
from lightning_lossplug.integrations.data.module import BatchedDataModule, stratified_split

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class IDXData(BatchedDataModule):
    """A folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the ``t10k`` pair, each plain or .gz.

    The images stay uint8 in memory; normalising, resizing and augmenting happen per batch. A batch is ``(x, y)``: ``x``
    float32 ``[B, channels, img_size, img_size]``, ``y`` int64 ``[B]``. The validation images are a stratified draw from
    the training file.

    Args:
        root: The folder, or torchvision's root with the files in ``raw`` or ``<name>/raw`` below it.
        batch_size: Samples per process and batch.
        val_split: Validation images, taken from the training images: a number, or a fraction below 1.
        train_limit: Keep only so many of the other training images, classes balanced; null keeps all.
        img_size: Side the images are resized to (bilinear, antialiased); null keeps the stored size.
        channels: 1, or 3 equal ones for models that want colour.
        augment: Whether to shift training images at random by up to an eighth of their side.
        flip: Whether augmentation also mirrors them left to right.
        mean: Mean of the pixels on the scale of 0 to 1.
        std: Their standard deviation.
        with_index: Whether a batch is ``(x, y, index)``.
        num_workers: Worker processes of each loader.
        seed: Seed of split, order and augmentation.

    Raises:
        LossplugError: In ``setup``: missing or damaged files, or a split larger than the data.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 128,
        val_split: int | float = 5000,
        train_limit: int | None = None,
        img_size: int | None = None,
        channels: int = 1,
        augment: bool = False,
        flip: bool = False,
        mean: float = 0.5,
        std: float = 0.5,
        with_index: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.save_hyperparameters(logger=False)
        self.root, self.val_split, self.train_limit = root, val_split, train_limit
        self.img_size, self.channels = img_size, channels
        self.augment, self.flip = augment, flip
        self.mean, self.std, self.with_index = mean, std, with_index

    def setup(self, stage: str) -> None:
        """Reads the files (once) and draws the validation images."""
        if hasattr(self, "train_set"):
            return
        folder = find_folder(self.root)
        images, labels = _read_pair(folder, "train")
        held_out = round(self.val_split * len(labels)) if self.val_split < 1 else int(self.val_split)
        rest = len(labels) - held_out
        limit = rest if self.train_limit is None else min(self.train_limit, rest)
        val, train = stratified_split(labels, [held_out, limit], self.seed)
        shift = images.shape[-1] // 8 if self.augment else 0
        self.train_set = self._dataset(images[train], labels[train], shift=shift, flip=self.augment and self.flip)
        self.val_set = self._dataset(images[val], labels[val])
        self.test_set = self._dataset(*_read_pair(folder, "t10k"))

    def _dataset(self, images: Tensor, labels: Tensor, *, shift: int = 0, flip: bool = False) -> ImageArrays:
        return ImageArrays(
            images,
            labels,
            white=255.0,
            mean=self.mean,
            std=self.std,
            img_size=self.img_size,
            channels=self.channels,
            shift=shift,
            flip=flip,
            seed=self.seed,
            with_index=self.with_index,
        )


class FashionMNISTData(IDXData):
    """Fashion-MNIST: 60000 + 10000 grey images of clothes, 28 x 28, ten classes.

    Args:
        root: Folder with the four IDX files, or torchvision's root; null takes the folder of the Debian package
            ``dataset-fashion-mnist``.
        batch_size: Samples per process and batch.
        val_split: Validation images, taken from the training images: a number, or a fraction below 1.
        train_limit: Keep only so many of the other training images, classes balanced; null keeps all.
        img_size: Side the images are resized to (bilinear, antialiased); null keeps 28.
        channels: 1, or 3 equal ones for models that want colour.
        augment: Whether to shift (up to 3 pixels) and mirror training images at random.
        with_index: Whether a batch is ``(x, y, index)``.
        num_workers: Worker processes of each loader.
        seed: Seed of split, order and augmentation.

    Source: Xiao, Rasul and Vollgraf, Fashion-MNIST, arXiv 1708.07747.
    """

    num_classes = 10

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        val_split: int | float = 5000,
        train_limit: int | None = None,
        img_size: int | None = None,
        channels: int = 1,
        augment: bool = False,
        with_index: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if root is None and not DEBIAN_FASHION_MNIST.is_dir():
            raise LossplugError(
                f"no root was given and {DEBIAN_FASHION_MNIST} does not exist",
                where="FashionMNISTData",
                remedy="Install the Debian package dataset-fashion-mnist, or set root to a folder with the IDX files",
            )
        super().__init__(
            root=str(DEBIAN_FASHION_MNIST) if root is None else root,
            batch_size=batch_size,
            val_split=val_split,
            train_limit=train_limit,
            img_size=img_size,
            channels=channels,
            augment=augment,
            flip=True,
            mean=0.2860,  # of the training pixels
            std=0.3530,
            with_index=with_index,
            num_workers=num_workers,
            seed=seed,
        )


def find_folder(root: str | Path) -> Path:
    """Returns the folder below ``root`` that holds the training images.

    Raises:
        LossplugError: None does, or several do.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise LossplugError("no such folder", where=str(root), remedy="Set root to the folder with the IDX files")
    candidates = [root, root / "raw", *sorted(root.glob("*/raw"))]
    found = [folder for folder in candidates if list(folder.glob("train-images-idx3-ubyte*"))]
    if len(found) != 1:
        what = f"{len(found)} folders below it hold IDX files" if found else "it holds no train-images-idx3-ubyte[.gz]"
        raise LossplugError(what, where=str(root), remedy="Set root to the folder with the IDX files")
    return found[0]


def _read_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images_path = find_idx(folder, f"{part}-images-idx3-ubyte")
    labels_path = find_idx(folder, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    for path, tensor, ndim in ((images_path, images, 3), (labels_path, labels, 1)):
        if tensor.ndim != ndim:
            raise LossplugError(f"has {tensor.ndim} dimensions, not {ndim}", where=str(path), remedy="Check the file")
    if len(images) != len(labels):
        what = f"{len(images)} images but {len(labels)} labels"
        raise LossplugError(what, where=str(images_path), remedy="Check the files")
    return images, labels.long()
