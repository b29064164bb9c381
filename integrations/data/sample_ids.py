"""A data set that says which sample each one is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from lightning_lossplug.distillation.sample_ids import Identified
from lightning_lossplug.integrations.data.order import mix


class WithSampleIds(Dataset[Identified]):
    """Wraps a map-style data set: batches come with an id per sample, which distillation callbacks take off again.

    For caches of teacher logits (``cache_teacher``, ``Distillation("cache:FOLDER")``) of data with random augmentation;
    without it no ids are needed. The module sees the batch it knows. An id is a hash of the sample's index, the number
    of samples and, where the data set has ``targets`` or ``labels``, of these: another data set, or the same in
    another order, gives other ids.

    Args:
        dataset: Map-style. A data set whose ``__getitems__`` returns finished batches keeps doing so.
        name: Goes into the ids, to tell apart data sets that look the same.
        collate_fn: For a loader that has one: pass it here, and the loader :meth:`collate`.
    """

    def __init__(self, dataset: Any, name: str = "", collate_fn: Callable[[Any], Any] | None = None) -> None:
        self.dataset, self.collate_fn = dataset, collate_fn or default_collate
        digest = hashlib.sha256(f"{name} {len(dataset)}".encode())
        tensors = getattr(dataset, "tensors", None)
        targets = next((t for k in ("targets", "labels") if (t := getattr(dataset, k, None)) is not None), None)
        targets = tensors[-1] if targets is None and tensors else targets
        if targets is not None:
            digest.update(torch.as_tensor(targets).cpu().contiguous().numpy().tobytes())
        self.salt = int.from_bytes(digest.digest()[:7], "big")

    def __len__(self) -> int:
        return len(self.dataset)

    def sample_id(self, index: int) -> int:
        """Returns the id of a sample."""
        return mix(self.salt, index)

    def __getitem__(self, index: int) -> Identified:
        return Identified(self.dataset[index], torch.tensor(self.sample_id(index)))

    def __getitems__(self, indices: list[int]) -> Any:
        """Returns a finished batch where the data set does, else the samples."""
        if not hasattr(self.dataset, "__getitems__"):
            return [self[i] for i in indices]
        found = self.dataset.__getitems__(indices)
        ids = torch.tensor([self.sample_id(i) for i in indices])
        if isinstance(found, list):
            return [Identified(sample, i) for sample, i in zip(found, ids, strict=True)]
        return Identified(found, ids)

    def collate(self, samples: Any) -> Identified:
        """Puts samples and ids into a batch."""
        if isinstance(samples, Identified):
            return samples
        return Identified(self.collate_fn([s.sample for s in samples]), torch.stack([s.sample_id for s in samples]))

    def set_epoch(self, epoch: int) -> None:
        """Tells the data set the epoch, where it wants to know."""
        if callable(told := getattr(self.dataset, "set_epoch", None)):
            told(epoch)
