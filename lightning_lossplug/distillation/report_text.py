"""The report of a distillation run as a table and as text."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_lossplug.errors import LossplugError

TABLE = "distillation_report.csv"
NUMBERS = (
    "student_accuracy",
    "teacher_accuracy",
    "gap",
    "lost",
    "won",
    "agreement",
    "kl",
    "reverse_kl",
    "student_ece",
    "teacher_ece",
    "student_nll",
    "teacher_nll",
)
WHOLE = ("step", "epoch", "callback", "teacher")
COLUMNS = ("step", "epoch", "on", "callback", "teacher", "method", "network", *NUMBERS)
WORST = 10  # classes that are named


class Details(NamedTuple):
    """Where a student stands beside its teacher; each a dict of rows by bin or class, as ``CapacityGap`` has them.

    Args:
        student: Reliability of the student.
        teacher: Reliability of the teacher.
        confidence: Accuracies by the teacher's confidence.
        classes: Accuracies by class, or None.
    """

    student: dict[str, list[float]]
    teacher: dict[str, list[float]]
    confidence: dict[str, list[float]]
    classes: dict[str, list[float]] | None

    @classmethod
    def of(cls, metric: Any) -> Details:
        """Returns what a ``CapacityGap`` has counted."""
        return cls(
            _lists(metric.curve("student")),
            _lists(metric.curve("teacher")),
            _lists(metric.per_confidence()),
            None if metric.classes is None else _lists(metric.per_class()),
        )

    @property
    def labelled(self) -> bool:
        """Whether there were labels."""
        return sum(self.confidence["count"]) > 0

    def worst(self, most: int = WORST) -> list[int]:
        """Returns the classes in which the student falls behind by most samples."""
        if self.classes is None:
            return []
        rows = zip(*(self.classes[name] for name in ("count", "student", "teacher")), strict=True)
        behind = [(t - s) * n if n else 0.0 for n, s, t in rows]
        return [c for c in sorted(range(len(behind)), key=lambda c: -behind[c]) if behind[c] > 0][:most]


def _lists(rows: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in rows.items()}


def read_report(folder: str | Path) -> list[dict[str, Any]]:
    """Reads the table that ``DistillationReport`` wrote into a folder; an empty list where there is none.

    Raises:
        LossplugError: The table is another file's.
    """
    path = Path(folder) / TABLE
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise LossplugError("the table has other columns", where=str(path), remedy="Move it away")
        return [
            {
                name: int(value) if name in WHOLE else (float(value) if value else None) if name in NUMBERS else value
                for name, value in row.items()
            }
            for row in reader
        ]


def report_text(rows: Sequence[dict[str, Any]], details: Mapping[Any, Details]) -> str:
    """Returns the report in Markdown.

    Args:
        rows: As :func:`read_report` gives them.
        details: Of ``(callback, teacher)``, those of the last record.
    """
    lines = ["# Student and teacher", ""]
    for key, found in details.items():
        own = [row for row in rows if (row["callback"], row["teacher"]) == tuple(key)]
        lines += _section(own, found)
    return "\n".join(lines)


def _section(rows: list[dict[str, Any]], details: Details) -> list[str]:
    last = rows[-1]
    data = "validation data" if last["on"] == "val" else "training batches"
    lines = [f"## {last['method']}, teacher {last['network']}", ""]
    lines += [f"On {data} after epoch {last['epoch']} (step {last['step']}):", ""]
    if last["student_accuracy"] is not None:
        lines += ["| | student | teacher |", "| --- | --- | --- |"]
        for title, name in (("accuracy", "accuracy"), ("calibration error", "ece")):
            lines.append(f"| {title} | {_share(last[f'student_{name}'])} | {_share(last[f'teacher_{name}'])} |")
        lines.append(f"| negative log-likelihood | {last['student_nll']:.4f} | {last['teacher_nll']:.4f} |")
        best = max(rows, key=lambda row: row["student_accuracy"])
        lines += [
            "",
            f"The gap is {_share(last['gap'])}: the teacher alone is right on {_share(last['lost'])}, the student "
            f"alone on {_share(last['won'])}. The first record had a gap of {_share(rows[0]['gap'])}; the student's "
            f"best accuracy was {_share(best['student_accuracy'])} after epoch {best['epoch']}.",
        ]
    lines += [
        "",
        f"They agree on {_share(last['agreement'])}; KL(teacher, student) is {last['kl']:.4f} nats, KL(student, "
        f"teacher) {last['reverse_kl']:.4f}.",
        "",
    ]
    if details.labelled and details.classes is not None:
        worst = details.worst()
        lines += ["### Classes where the student loses most", ""]
        lines += _table("class", worst, worst, details.classes) if worst else ["None.", ""]
    if details.labelled:
        bins = len(details.confidence["count"])
        filled = [b for b in range(bins) if details.confidence["count"][b]]
        names = [f"{b / bins:.2f} to {(b + 1) / bins:.2f}" for b in filled]
        lines += ["### By the teacher's confidence", "", *_table("confidence", names, filled, details.confidence)]
    return lines


def _table(title: str, names: Sequence[Any], places: list[int], columns: dict[str, list[float]]) -> list[str]:
    lines = [f"| {title} | samples | student | teacher | gap |", "| --- | --- | --- | --- | --- |"]
    for name, i in zip(names, places, strict=True):
        student, teacher = columns["student"][i], columns["teacher"][i]
        cells = (f"{columns['count'][i]:.0f}", _share(student), _share(teacher), _share(teacher - student))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _share(value: float) -> str:
    return "none" if math.isnan(value) else f"{100 * value:.2f} %"
