"""A report of how a student stands beside its teachers: table, text and picture."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_lossplug.callbacks.distillation_base import DistillationCallback
from lightning_lossplug.callbacks.teacher_agreement import labels_of
from lightning_lossplug.distillation.report_text import COLUMNS, TABLE, Details, read_report, report_text
from lightning_lossplug.distillation.signals import Signals
from lightning_lossplug.distillation.teacher_cache import CachedTeacher
from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.losses.checks import check_choice, check_number
from lightning_lossplug.metrics import CapacityGap

TEXT, PICTURE = "distillation_report.md", "distillation_report"
MOST_CLASSES = 1000  # above, they are tokens
On = Literal["val", "train"]


class Pair(NamedTuple):
    """A teacher of a callback.

    Args:
        callback: Position of the callback among those that distil.
        teacher: Position of the teacher among those of the callback.
    """

    callback: int
    teacher: int


class DistillationReport(Callback):
    """Writes how the student stands beside every teacher of the run, epoch by epoch, and where it loses.

    It reads the logits that ``Distillation``, ``OnlineDistillation`` and ``SelfDistillation`` callbacks of the run have
    anyway (in validation it asks them for the teacher's, once, together with ``agreement=True``) and counts
    :class:`~lightning_lossplug.metrics.CapacityGap`: accuracy, calibration error and negative log-likelihood of both,
    the gap, agreement, divergence. Logged under ``DistillationReport/``; one line per epoch and teacher goes to
    ``distillation_report.csv``. After the fit ``distillation_report.md`` says in which classes and at which confidence
    of the teacher the student loses, and a picture per teacher shows it with the reliability diagrams. The run is the
    same with and without it. A resumed run continues the table.

    Args:
        folder: Where the files go; None: the logger's folder, else the Trainer's ``default_root_dir``.
        on: ``val``: every validation, both in eval mode; ``train``: the training batches as they were seen (augmented,
            the student in training mode), which costs no pass of a teacher and is what a cache of logits can do. A run
            that is resumed within an epoch counts the rest of it.
        bins: Bins of the confidence, >= 1.
        plot: Draw the pictures at the end (needs matplotlib).

    Raises:
        LossplugError: No distillation in the run, or none whose logits can be read; a value out of range; matplotlib
            is missing and ``plot`` is on.
    """

    def __init__(self, folder: str | None = None, on: On = "val", bins: int = 15, plot: bool = True) -> None:
        check_choice("DistillationReport", "on", on, get_args(On))
        self.folder, self.on, self.plot = folder, on, plot
        self.bins = int(check_number("DistillationReport", "bins", bins, least=1))
        self.names: dict[Pair, tuple[str, str]] = {}
        self.details: dict[Pair, Details] = {}
        self._counts: dict[Pair, CapacityGap] = {}
        self._watched: list[tuple[DistillationCallback, Any]] = []
        self._place: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the callbacks to listen to."""
        if stage != "fit":
            return
        if self.plot:
            require("matplotlib", "cli", "DistillationReport(plot=True)")
        self._forget()
        self.names, self.details = {}, {}
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = [c for c in callbacks if isinstance(c, DistillationCallback)]
        if not found:
            raise LossplugError(
                "there is no distillation in this run to report",
                where="DistillationReport",
                remedy="Add a Distillation or OnlineDistillation callback, or leave this one out",
            )
        for i, callback in enumerate(found):
            self._check(callback)
            observer = partial(self._observe, i, callback)
            callback.observers[self.on].append(observer)
            self._watched.append((callback, observer))

    def _check(self, callback: DistillationCallback) -> None:
        why = None
        if any(isinstance(n, CachedTeacher) and n.k is not None for n in callback.networks()):
            why = "its cache holds the largest log-probabilities alone"
        elif self.on == "train" and getattr(callback, "loss", None) is None:
            why = "it compares features alone in training"
        elif self.on == "train" and getattr(callback, "fused", False):
            why = "with fused=True there are no logits in training"
        if why is not None:
            raise LossplugError(f"{callback.where} can't be reported: {why}", where="DistillationReport")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the table, or cuts it back to where the checkpoint was."""
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)  # on all ranks: log_dir is broadcast
        self._place = folder if trainer.is_global_zero else None
        if self._place is not None:
            kept = [row for row in read_report(folder) if row["step"] <= trainer.global_step > 0]
            self._place.mkdir(parents=True, exist_ok=True)
            self._write(kept)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        assert self._place is not None
        part = self._place / f"{TABLE}.part"
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        part.replace(self._place / TABLE)

    def _observe(self, number: int, callback: DistillationCallback, found: Signals) -> None:
        y = labels_of(found)
        for j, (z, network) in enumerate(zip(found.teachers, callback.networks(), strict=True)):
            if z.shape != found.student.shape:
                raise LossplugError(
                    f"the student has {found.student.shape[-1]} classes or tokens, the teacher {z.shape[-1]}",
                    where="DistillationReport",
                    remedy="With different vocabularies there is no report",
                )
            pair = Pair(number, j)
            if pair not in self._counts:
                classes = z.shape[-1] if z.shape[-1] <= MOST_CLASSES else None
                self._counts[pair] = CapacityGap(self.bins, classes).to(z.device)
                self.names[pair] = (f"{callback.where} {type(callback.loss_module).__name__}", type(network).__name__)
            self._counts[pair].update(found.student.detach(), z.detach(), y, found.mask)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what the validation gave."""
        if self.on == "val" and not trainer.sanity_checking:
            self._record(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what the epoch gave."""
        if self.on == "train":
            self._record(trainer, pl_module)

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts, self._counts = self._counts, {}
        rows = []
        for pair, metric in counts.items():
            values = metric.compute()
            with metric.sync_context():
                self.details[pair] = Details.of(metric)
            middle = f"{pair.callback}.{pair.teacher}/" if len(counts) > 1 else ""
            pl_module.log_dict(  # type: ignore[call-arg]
                {f"DistillationReport/{middle}{k}": v for k, v in values.items()},
                on_step=False,
                on_epoch=True,
                rank_zero_only=False,
            )
            name, network = self.names[pair]
            where = {"callback": pair.callback, "teacher": pair.teacher, "method": name, "network": network}
            step = {"step": trainer.global_step, "epoch": trainer.current_epoch, "on": self.on}
            rows.append({**step, **where, **{k: float(v) for k, v in values.items()}})
        if self._place is not None and rows:
            known = [row for row in read_report(self._place) if row["step"] < trainer.global_step]
            self._write(known + rows)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the text and draws the pictures."""
        if self._place is None:
            return
        rows = read_report(self._place)
        if not rows:
            what = "no validation ran" if self.on == "val" else "no epoch ended"
            rank_zero_warn(f"DistillationReport: there is nothing to report: {what}")
            return
        (self._place / TEXT).write_text(report_text(rows, self.details), encoding="utf-8")
        if self.plot:
            from lightning_lossplug.distillation.report_plot import draw_report

            for pair, details in self.details.items():
                own = [row for row in rows if (row["callback"], row["teacher"]) == pair]
                suffix = "" if len(self.details) == 1 else f"_{pair.callback}_{pair.teacher}"
                title = f"{self.names[pair][0]}, teacher {self.names[pair][1]}"
                draw_report(own, details, self._place / f"{PICTURE}{suffix}.png", title)
        rank_zero_info(f"DistillationReport: {len(rows)} records and {TEXT} in {self._place}")

    def _forget(self) -> None:
        for callback, observer in self._watched:
            callback.observers[self.on].remove(observer)
        self._watched, self._counts = [], {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listens no more."""
        self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an exception."""
        self._forget()
