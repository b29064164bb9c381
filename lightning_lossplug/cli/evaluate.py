"""``lossplug evaluate``: checkpoints and artifacts side by side on one test split."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from lightning_lossplug.cli.arguments import new_parser, positive_int
from lightning_lossplug.cli.fit import import_named, short_names
from lightning_lossplug.cli.output import (
    bytes_text,
    console,
    plain,
    progress,
    require_writable,
    table,
    to_json,
    write_text,
)
from lightning_lossplug.errors import LossplugError, require

EPILOG = """examples:
  lossplug evaluate run/last.ckpt
  lossplug evaluate dense.ckpt sparse.ckpt artifact/ --json results.json
  lossplug evaluate artifact/ --data DigitsData --data.img_size 16"""
LOWER = ("calibration_error", "nll", "perplexity")


def run(arguments: list[str]) -> None:
    """Evaluates.

    Raises:
        LossplugError: Something can't be read, or no data is given and no checkpoint remembers any.
    """
    parser = new_parser("evaluate", "Metrics, sparsity, size and latency, side by side on the test split.", EPILOG)
    parser.add_argument("paths", nargs="+", help="Lightning checkpoints, and folders for timm or transformers")
    parser.add_argument(
        "--data", metavar="NAME", help="data module and, as --data.KEY VALUE, its arguments; default: the checkpoint's"
    )
    parser.add_argument(
        "--model", help="class of the modules, if a checkpoint doesn't say: a short name or a dotted path"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--limit-batches", type=positive_int, metavar="N", help="evaluate on the first N batches")
    parser.add_argument("--latency-batch", type=positive_int, default=8, metavar="N", help="samples per timed pass (8)")
    parser.add_argument("--latency-rounds", type=positive_int, default=30, metavar="N", help="timed passes each (30)")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON; - prints them instead of the table")
    data_arguments, rest = split_data(arguments)
    options = parser.parse_args(rest)
    require("lightning", "lightning", "lossplug evaluate")
    if options.json not in (None, "-"):
        if Path(options.json).exists() and options.json in options.paths:
            raise LossplugError("is to be evaluated, not to be written", where=options.json)
        require_writable(Path(options.json))
    from lightning_lossplug.cli.quiet import lightning_output

    sys.path.insert(0, str(Path.cwd()))  # the class of a training script in this folder
    try:
        with lightning_output():
            results = evaluate(options, data_arguments)
    finally:
        sys.path.pop(0)
    if options.json == "-":
        print(to_json(results))
        return
    _print(results)
    if options.json:
        write_text(Path(options.json), to_json(results) + "\n")


def split_data(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Splits off ``--data`` and ``--data.KEY`` with their values."""
    data: list[str] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        option, equals, _ = argument.partition("=")
        if option != "--data" and not option.startswith("--data."):
            rest.append(argument)
            continue
        data.append(argument)
        if not equals:
            data += [value for value in [next(waiting, None)] if value is not None]
    return data, rest


def parse_data(arguments: list[str]) -> Any:
    """Builds a data module from ``--data NAME --data.KEY VALUE``.

    Raises:
        LossplugError: Unknown name, key or value.
    """
    jsonargparse = require("jsonargparse", "cli", "--data")
    require("docstring_parser", "cli", "--data")
    from lightning.pytorch import LightningDataModule

    from lightning_lossplug.cli.config_errors import condense

    import_named(arguments)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    try:
        return parser.instantiate_classes(parser.parse_args(arguments)).data
    except (ValueError, TypeError, ArgumentError) as error:
        raise condense(error, ["data"], short_names()) from error


def evaluate(options: Any, data_arguments: list[str]) -> dict[str, Any]:
    """Returns the results, one record per path."""
    from lightning_lossplug.integrations.evaluation import load_subject, paired_latency, task_metrics, weight_numbers
    from lightning_lossplug.integrations.network import rebuild_data

    check_device(options.device)
    data = parse_data(data_arguments) if data_arguments else None
    with progress() as bar:
        subjects = [load_subject(path, options.model) for path in bar.track(options.paths, description="loading")]
        for subject in subjects:
            if data is None and subject.checkpoint is not None:
                data = rebuild_data(subject.checkpoint, subject.name)
        if data is None:
            raise LossplugError("there is no data to evaluate on", remedy="Add --data NAME (lossplug list data)")
        data.prepare_data()
        data.setup("test")
        loader = data.test_dataloader()
        count = min(len(loader), options.limit_batches or len(loader))
        records = []
        for subject in subjects:
            batches = bar.track(islice(loader, count), total=count, description=subject.name)
            records.append(
                {
                    "path": subject.name,
                    **task_metrics(subject.network, batches, options.device),
                    **weight_numbers(subject.network, subject.groups),
                    **({"note": subject.note} if subject.note else {}),
                }
            )
        batch = next(iter(loader))
        networks = [subject.network for subject in subjects]
        size, rounds = options.latency_batch, options.latency_rounds
        times = paired_latency(networks, batch, device=options.device, size=size, rounds=rounds)
    for record, mine in zip(records, times, strict=True):
        record["latency_ms"] = median(mine)
        record["latency_ratio"] = median(own / first for own, first in zip(mine, times[0], strict=True))
    return {
        "data": type(data).__name__,
        "batches": count,
        "device": options.device,
        "latency_batch": size,
        "latency_rounds": rounds,
        "results": records,
    }


def check_device(device: str) -> None:
    """Checks that a device exists.

    Raises:
        LossplugError: It doesn't.
    """
    import torch

    if device != "cpu" and not (device.partition(":")[0] == "cuda" and torch.cuda.is_available()):
        raise LossplugError(f"there is no device {device!r} here", remedy="Use --device cpu")


def _print(results: dict[str, Any]) -> None:
    records = results["results"]
    metrics = [key for key in ("accuracy", "perplexity", "calibration_error", "nll") if key in records[0]]
    columns = ["", *metrics, "parameters", "sparsity", "weights", "nominal", "latency", "ratio"]
    rows = []
    for record in records:
        best = {key: (min if key in LOWER else max)(other[key] for other in records) for key in metrics}
        marks = [
            f"[bold]{record[k]:.4g}[/bold]" if record[k] == best[k] and len(records) > 1 else f"{record[k]:.4g}"
            for k in metrics
        ]
        rows.append(
            (
                plain(record["path"]) + (f" [dim]({record['note']})[/dim]" if "note" in record else ""),
                *marks,
                f"{record['parameters']:,}",
                f"{record['sparsity']:.1%}",
                bytes_text(record["bytes"]),
                bytes_text(record["nominal_bytes"]),
                f"{record['latency_ms']:.2f} ms",
                f"{record['latency_ratio']:.2f}",
            )
        )
    out = console()
    out.print(table(f"{results['data']}, {results['batches']} test batches", columns, rows, right=columns[1:]))
    out.print(
        "[dim]weights: dense bytes; nominal: nonzero values and their positions; latency: median of "
        f"{results['latency_rounds']} interleaved passes of {results['latency_batch']} samples[/dim]"
    )
