"""The base of the built-in data modules: splits in, resumable loaders out."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.data.loader import ResumableLoader


class BatchedDataModule(LightningDataModule):
    """Serves three datasets that return whole batches; a run resumed in mid-epoch gets exactly the batches left.

    A subclass sets ``train_set``, ``val_set`` and ``test_set`` in ``setup``: map-style datasets whose
    ``__getitems__(indices)`` returns a finished batch (indexing a tensor once is many times faster than collating
    samples).

    Args:
        batch_size: Samples per process and batch.
        num_workers: Worker processes of each loader.
        seed: Seed of splits, order and augmentation.
    """

    train_set: Dataset[Any]
    val_set: Dataset[Any]
    test_set: Dataset[Any]

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise LossplugError(
                f"batch_size is {batch_size} and num_workers is {num_workers}",
                where=type(self).__name__,
                remedy="Give batch_size >= 1 and num_workers >= 0",
            )
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._saved_loader: dict[str, int] | None = None

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled by ``(seed, epoch)``, without the incomplete last batch."""
        loader = ResumableLoader(
            self.train_set,
            self.batch_size,
            seed=self.seed,
            shuffle=self.trainer is None or not self.trainer.overfit_batches,  # type: ignore[attr-defined]
            num_workers=self.num_workers,
            collate_fn=as_is,
            trainer=self.trainer,
        )
        if self._saved_loader is not None:
            loader.load_state_dict(self._saved_loader)
        return loader

    def val_dataloader(self) -> DataLoader[Any]:
        """In order, every sample; Lightning spreads it over the processes."""
        return self._in_order(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """In order, every sample; Lightning spreads it over the processes."""
        return self._in_order(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test split."""
        return self._in_order(self.test_set)

    def state_dict(self) -> dict[str, Any]:
        """Returns the training loader's state.

        Lightning keeps it with its loops as well, but does not load that copy if ``configure_optimizers`` reads
        ``trainer.estimated_stepping_batches``.
        """
        loader = self.trainer.train_dataloader if self.trainer is not None else None
        return {"train_loader": loader.state_dict()} if isinstance(loader, ResumableLoader) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state for the training loader, which does not exist yet."""
        self._saved_loader = state_dict["train_loader"]

    def _in_order(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        # its own generator: iterating it draws nothing from the global one, so validation does not move dropout
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=as_is,
            generator=torch.Generator().manual_seed(self.seed),
        )


def as_is(batch: Any) -> Any:
    """The collate function of datasets that return finished batches."""
    return batch


def stratified_split(labels: Tensor, sizes: list[int], seed: int) -> list[Tensor]:
    """Draws disjoint random subsets in which the classes keep their proportions.

    Every sample gets the quantile it has within its class in a random order; sorting by it interleaves the classes
    evenly, and consecutive slices are the subsets.

    Args:
        labels: Class indices, shape ``[samples]``.
        sizes: Size of each subset; the sum is at most ``samples``.
        seed: Seed of the draw.

    Returns:
        One index tensor per size, in the drawn order.
    """
    samples = len(labels)
    if sum(sizes) > samples or min(sizes) < 0:
        raise LossplugError(f"subsets of {sizes} samples were asked for, there are {samples}", remedy="Take fewer")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order]
    quantile = torch.empty(samples, dtype=torch.float64)
    for label in shuffled.unique():
        members = (shuffled == label).nonzero().flatten()
        quantile[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    order = order[torch.argsort(quantile, stable=True)]
    return list(order[: sum(sizes)].split(sizes))
