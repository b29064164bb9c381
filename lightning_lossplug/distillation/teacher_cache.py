"""Teachers that were run once: logits on disk, found again by sample."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lossplug.distillation.cache_files import (
    FORMAT,
    Manifest,
    open_shard,
    read_manifest,
    write_manifest,
    write_shard,
)
from lightning_lossplug.distillation.networks import fingerprint, freeze
from lightning_lossplug.distillation.sample_ids import Identified, content_ids, main_input
from lightning_lossplug.distillation.signals import LABELS, check_teacher_logits, logits_of
from lightning_lossplug.distillation.topk_logits import top_logits
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_choice, check_number, upcast
from lightning_lossplug.registry import register

WHERE = "teacher cache"
_DTYPES = {"float16": torch.float16, "float32": torch.float32}
Inputs = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]


class StoredTop(NamedTuple):
    """What is stored of a teacher with many classes.

    Args:
        ids: The k classes of largest probability, int64 [..., k].
        log_probs: Their log-probabilities [..., k].
        rest: Log of the probability of all other classes [..., 1].
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor


def call_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments a network gets for a batch: a mapping without its labels, or the first of a sequence."""
    if isinstance(batch, Mapping):
        return (), {key: value for key, value in batch.items() if key not in LABELS}
    return (batch[0] if isinstance(batch, (tuple, list)) else batch,), {}


@torch.no_grad()
def cache_teacher(
    teacher: nn.Module,
    batches: Iterable[Any],
    folder: str | Path,
    *,
    k: int | None = None,
    dtype: str | None = None,
    shard_mb: float = 256.0,
    inputs: Inputs | None = None,
    output: Any = None,
    device: str | torch.device = "cpu",
) -> Manifest:
    """Runs a teacher once over data and writes its logits; called again after a kill, it goes on where it was.

    Samples are told apart by what they hold (:func:`~lightning_lossplug.distillation.content_ids`), or by the ids of a
    data set wrapped in ``WithSampleIds``. Then ``Distillation("cache:FOLDER")`` finds them again in any order.

    Args:
        teacher: Returns logits [N, C] or [N, L, V]; put in eval mode.
        batches: In a fixed order, without random augmentation (unless the data set gives the ids).
        folder: Where to.
        k: Store the k largest log-probabilities and the mass of the rest per row; None: all logits.
        dtype: ``float16`` or ``float32``; None: ``float32`` for all logits, ``float16`` for the k largest.
        shard_mb: Size of a file; what a kill can lose.
        inputs: Returns the teacher's ``(args, kwargs)`` for a batch; None: the first of a sequence, a mapping without
            labels.
        output: Where the logits are in what the teacher returns: key, position or function; None finds them.
        device: Where the teacher runs.

    Returns:
        The manifest: numbers of samples, rows and bytes, fingerprints of teacher and data.

    Raises:
        LossplugError: NaN logits, a cache of another teacher, other data or settings, a shard that was changed.
    """
    if k is not None:
        check_number(WHERE, "k", k, least=1)
    check_number(WHERE, "shard_mb", shard_mb, above=0)
    dtype = dtype or ("float32" if k is None else "float16")
    check_choice(WHERE, "dtype", dtype, _DTYPES)
    writer = _Writer(Path(folder), {"teacher": fingerprint(teacher), "k": k, "dtype": dtype}, shard_mb * 2**20)
    name = f"the teacher {type(teacher).__name__}"
    was_training = [m for m in teacher.modules() if m.training]
    had_grad = freeze(teacher)
    teacher.to(device)
    try:
        for batch in batches:
            ids, batch = (batch.sample_id, batch.sample) if isinstance(batch, Identified) else (None, batch)
            args, kwargs = (inputs or call_of)(batch)
            args = tuple(_to(a, device) for a in args)
            kwargs = {key: _to(value, device) for key, value in kwargs.items()}
            x, mask = main_input(args, kwargs)
            kind = "content" if ids is None else "given"
            ids = (content_ids(x, mask) if ids is None else ids).cpu()
            skipped = writer.skip(ids, kind)
            if skipped == len(ids):
                continue
            logits = upcast(logits_of(teacher(*args, **kwargs), output, name))
            check_teacher_logits(logits, name, frozen=False)
            writer.add(ids[skipped:], logits[skipped:], None if mask is None else mask[skipped:].bool())
    finally:
        for p in had_grad:
            p.requires_grad_(True)
        for module in was_training:
            module.training = True
    return writer.finish()


def _to(value: Any, device: str | torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


class _Writer:
    """Collects rows, writes full shards, and knows which samples are there."""

    def __init__(self, folder: Path, settings: dict[str, Any], limit: float) -> None:
        self.folder, self.settings, self.limit = folder, settings, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LossplugError(f"can't be made: {error.strerror or error}", where=str(folder)) from None
        self.manifest = read_manifest(folder) or {"format": FORMAT, **settings, "shards": []}
        for key, value in settings.items():
            if self.manifest[key] != value:
                raise LossplugError(
                    f"holds logits of {key} {self.manifest[key]!r}, asked for is {value!r}",
                    where=str(folder),
                    remedy="Choose another folder, or delete this one",
                )
        whole = self.manifest["shards"]
        shards: list[Tensor] = []
        for i, record in enumerate(whole):
            try:
                shards.append(open_shard(folder, record, verify=True)["ids"])
            except LossplugError:  # a damaged file, and those after it, are made anew
                self.manifest["shards"] = whole[:i]
                break
        self._count()
        self.known = torch.cat(shards) if shards else torch.empty(0, dtype=torch.int64)
        self.digest = hashlib.sha256(self.known.numpy().tobytes())
        self.seen = 0
        self.parts: list[dict[str, Tensor]] = []
        self.bytes = 0

    def skip(self, ids: Tensor, kind: str) -> int:
        """Returns how many of the next samples are stored already.

        Raises:
            LossplugError: Others are.
        """
        start, self.seen = self.seen, self.seen + len(ids)
        self.manifest.setdefault("ids", kind)
        stored = self.known[start : start + len(ids)]
        if self.manifest["ids"] != kind or not torch.equal(stored, ids[: len(stored)]):
            raise LossplugError(
                "was begun with other data, or the same in another order or precision",
                where=str(self.folder),
                remedy="Give the data it was begun with, in order, or choose another folder",
            )
        return len(stored)

    def add(self, ids: Tensor, logits: Tensor, mask: Tensor | None) -> None:
        """Takes the logits of new samples."""
        if logits.ndim not in (2, 3) or len(logits) != len(ids):
            raise LossplugError(
                f"the teacher's logits have shape {tuple(logits.shape)}, expected [N, C] or [N, L, V]", where=WHERE
            )
        classes, k = logits.shape[-1], self.settings["k"]
        self.manifest.setdefault("classes", classes)
        self.manifest.setdefault("tokens", logits.ndim == 3)
        part = {"ids": ids}
        rows = logits
        if logits.ndim == 3:
            keep = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if mask is None else mask
            part["lengths"], rows = keep.sum(dim=1).cpu(), logits[keep]
        dtype = _DTYPES[self.settings["dtype"]]
        if k is None:
            part["logits"] = rows.to(dtype).cpu()
        else:
            top, log_probs = top_logits(rows, k, torch.float32)
            part["top_ids"], part["log_probs"] = top.int().cpu(), log_probs.to(dtype).cpu()
            others = rows.log_softmax(dim=-1).scatter(-1, top, -torch.inf)
            part["rest"] = others.logsumexp(dim=-1, keepdim=True).float().cpu()
        self.parts.append(part)
        self.bytes += sum(t.numel() * t.element_size() for t in part.values())
        if self.bytes >= self.limit:
            self.flush()

    def flush(self) -> None:
        """Writes a shard, then the manifest that knows it."""
        if not self.parts:
            return
        tensors = {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}
        record = write_shard(self.folder, len(self.manifest["shards"]), tensors)
        self.digest.update(tensors["ids"].numpy().tobytes())
        record["rows"] = int(tensors["lengths"].sum()) if "lengths" in tensors else record["samples"]
        self.manifest["shards"].append(record)
        self._count()
        self.manifest["data"] = self.digest.hexdigest()[:16]
        self.manifest["complete"] = False
        write_manifest(self.folder, self.manifest)
        self.parts, self.bytes = [], 0

    def _count(self) -> None:
        for name in ("samples", "rows"):
            self.manifest[name] = sum(record[name] for record in self.manifest["shards"])

    def finish(self) -> Manifest:
        """Writes what is left and marks the cache as complete."""
        self.flush()
        if self.seen < len(self.known):
            raise LossplugError(
                f"holds {len(self.known)} samples, the data have {self.seen}",
                where=str(self.folder),
                remedy="Give the data it was made from",
            )
        if not self.manifest["samples"]:
            raise LossplugError("there is no batch to run the teacher on", where=WHERE)
        self.manifest["complete"] = True
        write_manifest(self.folder, self.manifest)
        return self.manifest


class CachedTeacher(nn.Module):
    """Answers from a folder of :func:`cache_teacher` as the teacher did: all logits, or :class:`StoredTop`.

    Args:
        folder: The cache.
        verify: Compare the files' checksums when it is opened, which reads them once.
        of: The teacher that it has to be a cache of; None: not compared.

    Raises:
        LossplugError: No cache, an incomplete one, one of another teacher, damaged files; when called: a sample that
            is not in it.
    """

    def __init__(self, folder: str | Path, verify: bool = True, of: nn.Module | None = None) -> None:
        super().__init__()
        self.folder = Path(folder).expanduser()
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise LossplugError(
                "holds no teacher_cache.json", where=str(folder), remedy="lossplug cache-teacher makes it"
            )
        if not manifest.get("complete"):
            raise LossplugError(
                f"is not complete ({manifest.get('samples', 0)} samples)",
                where=str(folder),
                remedy="Run lossplug cache-teacher again: it goes on where it was stopped",
            )
        if of is not None and fingerprint(of) != manifest["teacher"]:
            raise LossplugError(
                f"is a cache of the teacher {manifest['teacher']}, not of {fingerprint(of)}",
                where=str(folder),
                remedy="Make a cache of this teacher",
            )
        self.manifest = manifest
        self.k: int | None = manifest["k"]
        self.shards = [open_shard(self.folder, record, verify) for record in manifest["shards"]]
        wanted = {"logits"} if self.k is None else {"top_ids", "log_probs", "rest"}
        wanted |= {"ids", "lengths"} if manifest["tokens"] else {"ids"}
        widths = {tuple(tensor.shape[1:] for name, tensor in sorted(shard.items())) for shard in self.shards}
        if any(set(shard) != wanted for shard in self.shards) or len(widths) > 1:
            raise LossplugError("its shards hold other tensors than it says", where=str(folder), remedy="Make it anew")
        ids = torch.cat([shard["ids"] for shard in self.shards])
        self._sorted, self._place = ids.sort(stable=True)
        self._first = [0, *accumulate(len(shard["ids"]) for shard in self.shards)]
        self._rows = [self._row_starts(shard) for shard in self.shards]

    @staticmethod
    def _row_starts(shard: dict[str, Tensor]) -> Tensor:
        lengths = shard.get("lengths", torch.ones_like(shard["ids"]))
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    @property
    def fingerprint(self) -> str:
        """Teacher and data, in a line."""
        return f"{self.manifest['teacher']}, cached for {self.manifest['samples']} samples {self.manifest['data']}"

    @property
    def classes(self) -> int:
        """Number of classes or tokens of the teacher."""
        return int(self.manifest["classes"])

    def forward(self, *args: Any, sample_ids: Tensor | None = None, **kwargs: Any) -> Tensor | StoredTop:
        """Returns what the teacher said of the samples a network is called with.

        Args:
            *args: The network's arguments.
            sample_ids: Ids from the data set [N]; needed where the cache was made with such.
            **kwargs: The network's keywords.

        Raises:
            LossplugError: A sample is not in the cache.
        """
        x, mask = main_input(args, kwargs)
        if self.manifest["ids"] == "content":
            sample_ids = content_ids(x, mask)
        elif sample_ids is None:
            raise LossplugError(
                "goes by the ids of the data set, and the batch has none",
                where=str(self.folder),
                remedy="Wrap the data set: WithSampleIds(dataset)",
            )
        places = self.find(sample_ids.cpu())
        names = ["logits"] if self.k is None else ["top_ids", "log_probs", "rest"]
        found = [self._gather(places, name) for name in names]
        if self.manifest["tokens"]:
            keep = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
            total = len(found[0])
            if int(keep.sum()) != total:
                raise LossplugError(
                    f"holds {total} tokens of this batch, which has {int(keep.sum())}",
                    where=str(self.folder),
                    remedy="It was made with another padding or truncation",
                )
            found = [f.new_zeros(*keep.shape, f.shape[-1]).masked_scatter_(keep[..., None], f) for f in found]
        found = [f.to(x.device) for f in found]
        if self.k is None:
            return upcast(found[0])
        return StoredTop(found[0].long(), upcast(found[1]), found[2])

    def find(self, ids: Tensor) -> Tensor:
        """Returns the places [N] of samples in the cache.

        Raises:
            LossplugError: One is not there.
        """
        at = torch.searchsorted(self._sorted, ids).clamp(max=len(self._sorted) - 1)
        missing = self._sorted[at] != ids
        if bool(missing.any()):
            raise LossplugError(
                f"has no logits of {int(missing.sum())} of the {len(ids)} samples of this batch (the first: id "
                f"{int(ids[missing][0])})",
                where=str(self.folder),
                remedy="Other data, preprocessing or precision; with random augmentation use WithSampleIds",
            )
        return self._place[at]

    def _gather(self, places: Tensor, name: str) -> Tensor:
        parts = []
        for place in places.tolist():
            shard = bisect_right(self._first, place) - 1
            starts, i = self._rows[shard], place - self._first[shard]
            parts.append(self.shards[shard][name][int(starts[i]) : int(starts[i + 1])])
        return torch.cat(parts)


@register("teacher", "cache", family="distillation")
def cached_teacher(name: str, verify: bool = True, of: nn.Module | None = None) -> CachedTeacher:
    """Returns a teacher whose logits were stored by ``lossplug cache-teacher``.

    Args:
        name: The folder.
        verify: Compare the files' checksums when it is opened, which reads them once.
        of: The teacher that it has to be a cache of; None: not compared.

    Raises:
        LossplugError: No cache, an incomplete one, one of another teacher, damaged files.
    """
    return CachedTeacher(name, verify, of)
