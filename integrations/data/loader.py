"""A training loader that a killed run can continue in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.data.order import count_batches, epoch_order, mix, rank_batches

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class ShuffledEpochs(Sampler[int]):
    """Visits all samples in the order of :func:`epoch_order`; Lightning calls ``set_epoch`` before each epoch."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.samples, self.seed, self.epoch = len(dataset), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.samples, self.seed, self.epoch).tolist())

    def __len__(self) -> int:
        return self.samples


class SequentialEpochs(SequentialSampler):
    """Visits all samples in their own order; a SequentialSampler, as ``Trainer(overfit_batches=…)`` asks for."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch, which matters to augmentation only."""
        self.epoch = epoch


class ResumableLoader:
    """Iterates a map-style dataset in batches; order and position survive a restart exactly.

    The order is a function of ``(seed, epoch)``, so only the position has to be kept. Three ways to use it:

    * With ``trainer=`` (in ``train_dataloader`` of a module or data module: ``trainer=self.trainer``): the position is
      the Trainer's own count of finished batches. This is exact wherever in the epoch the checkpoint was written.
    * Given to ``trainer.fit`` as it is: Lightning saves and loads :meth:`state_dict`. Lightning 2.6 forgets to load it
      when ``configure_optimizers`` reads ``trainer.estimated_stepping_batches``; add the callback ``ExactResume``,
      which makes up for that.
    * In a plain loop: call ``set_epoch`` before each epoch, save :meth:`state_dict`, load it again.

    Under ``torch.distributed`` every process gets its part of each global batch, the same number of batches on all of
    them. Each epoch starts fresh workers, and a batch counts when it is handed out, not when a worker prefetches it.
    It is not a ``DataLoader``, so Lightning leaves its order alone.

    Args:
        dataset: Map-style. ``__getitems__(indices)`` is used if present; ``set_epoch(epoch)`` is called if present, for
            augmentation that depends on the epoch.
        batch_size: Samples per process and batch.
        seed: Seed of the order.
        shuffle: Whether to shuffle, anew in each epoch.
        drop_last: Whether to leave out the incomplete last batch.
        num_workers: Worker processes; 0 loads in this process.
        collate_fn: As for ``DataLoader``.
        trainer: The Trainer that iterates the loader. One loader only, not a collection of loaders.

    Raises:
        LossplugError: Fewer samples than one batch with ``drop_last``; or, when the iteration is resumed inside an
            epoch, the data, the seed, the batch size or the number of processes is not that of the saved state. (At the
            end of an epoch they may change.)
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        num_workers: int = 0,
        collate_fn: Callable[[Any], Any] | None = None,
        trainer: Trainer | None = None,
    ) -> None:
        if batch_size < 1:
            raise LossplugError(f"batch_size is {batch_size}", remedy="Give at least 1")
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch_size, seed, shuffle
        self.drop_last, self.num_workers, self.collate_fn, self.trainer = drop_last, num_workers, collate_fn, trainer
        # Lightning looks for `loader.sampler.set_epoch`
        self.sampler = ShuffledEpochs(dataset, seed) if shuffle else SequentialEpochs(dataset)  # type: ignore[arg-type]
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._length = count_batches(len(self.sampler), batch_size, self.world_size, drop_last)
        self._done = 0
        self._saved: dict[str, int] | None = None

    def __len__(self) -> int:
        """Number of batches of a whole epoch, also after a resume."""
        return self._length

    def __iter__(self) -> Iterator[Any]:
        # A generator on purpose: Lightning makes the iterator before it says which epoch it is for.
        epoch = self.sampler.epoch
        first = self._first_batch(epoch)
        if callable(set_epoch := getattr(self.dataset, "set_epoch", None)):
            set_epoch(epoch)
        order = torch.tensor(list(self.sampler))
        batches = rank_batches(order, self.batch_size, self.rank, self.world_size, self.drop_last)
        # DataLoader draws a seed for its workers whenever it is iterated; its own generator keeps the global one,
        # which dropout uses, untouched by restarts
        generator = torch.Generator().manual_seed(mix(self.seed, epoch, self.rank))
        inner = DataLoader(
            self.dataset,
            batch_sampler=[batch.tolist() for batch in batches[first:]],
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            generator=generator,
        )
        self._done = first
        for batch in inner:
            self._done += 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch of the next iteration."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """Returns the position (epoch, batches handed out) and what it is relative to."""
        progress = self._trainer_progress()
        return {
            "epoch": self.sampler.epoch,
            "batches": self._done if progress is None else progress,
            **self._geometry(),
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Makes the next iteration of the saved epoch start after the batches it had handed out."""
        self._saved = dict(state_dict)
        self.set_epoch(self._saved["epoch"])

    def _geometry(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "shuffle": int(self.shuffle),
            "samples": len(self.sampler),
            "batch_size": self.batch_size,
            "world_size": self.world_size,
        }

    def _trainer_progress(self) -> int | None:
        """Batches of this epoch that the Trainer has finished, if it is the Trainer that iterates this loader."""
        if self.trainer is None or self.trainer.train_dataloader is not self:
            return None
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]

    def _first_batch(self, epoch: int) -> int:
        saved = self._saved if self._saved is not None and self._saved["epoch"] == epoch else None
        first = self._trainer_progress()
        if first is None:
            first = saved["batches"] if saved is not None else 0
            self._saved = None  # an epoch is continued once; when it is begun again it starts at its start
        if saved is not None and 0 < first < self._length:
            for name, value in self._geometry().items():
                if saved[name] != value:
                    raise LossplugError(
                        f"the run stopped in mid-epoch with {name} {saved[name]} and is resumed with {value}",
                        where="training data",
                        remedy=f"Resume with {name} {saved[name]}, or from a checkpoint of the end of an epoch",
                    )
        return first
