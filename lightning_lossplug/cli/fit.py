"""``lossplug fit``: a LightningCLI whose models, data and callbacks have short names."""

from __future__ import annotations

import importlib
import re
import time
from argparse import ArgumentError
from pathlib import Path
from typing import Any

from lightning_lossplug.cli.config_errors import condense
from lightning_lossplug.cli.output import console, jsonable, plain, table, to_json, write_text
from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.recipes import config_path
from lightning_lossplug.registry import registry

PLUGGABLE = {"model": "model", "data": "data", "callback": "trainer.callbacks"}


def run(arguments: list[str]) -> None:
    """Trains.

    Raises:
        LossplugError: A mistake in the configuration, the data, the model or the output folder.
    """
    require("lightning", "lightning", "lossplug fit")
    require("jsonargparse", "cli", "lossplug fit")
    require("docstring_parser", "cli", "lossplug fit")
    arguments = expand_recipes(arguments)
    from lightning_lossplug.cli.quiet import lightning_output

    with lightning_output():
        import_named(arguments)
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        from lightning_lossplug.cli.lightning_cli import FitCLI

        try:
            cli = FitCLI.parse(arguments)
        except (ValueError, TypeError, MisconfigurationException, ArgumentError) as error:
            raise condense(error, FitCLI.known_options(), short_names()) from error
        started = time.perf_counter()
        try:
            cli.train()
        except MisconfigurationException as error:
            raise LossplugError(" ".join(str(error).split())) from error
        report(cli, arguments, time.perf_counter() - started)


def expand_recipes(arguments: list[str]) -> list[str]:
    """Replaces ``--recipe NAME`` by ``--config FILE``.

    Raises:
        LossplugError: No such recipe, or no name.
    """
    expanded: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, name = argument.partition("=")
        if option != "--recipe":
            expanded.append(argument)
            continue
        if not equals:
            name = next(rest, "")
        expanded += ["--config", str(config_path(name))]
    return expanded


def import_named(arguments: list[str]) -> None:
    """Imports the registered models, data modules and callbacks that the arguments name.

    A class has to be imported for its short name to be known.

    Raises:
        LossplugError: A named one lacks its optional package.
    """
    text = " ".join(arguments)
    for file in _config_files(arguments):
        if file.is_file():
            text += " " + file.read_text(encoding="utf-8", errors="replace")
    words = set(re.findall(r"\w+", text))
    if any(word.startswith("lossplug_ddp") for word in words):
        importlib.import_module("lightning_lossplug.callbacks.compressed_strategy")  # its strategies get their names
    for entry in registry:
        if entry.kind in PLUGGABLE and words & {entry.name, *entry.aliases}:
            entry.load()


def _config_files(arguments: list[str]) -> list[Path]:
    found = []
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("--config", "-c"):
            found.append(Path(value if equals else "".join(arguments[index + 1 : index + 2])))
    return found


def short_names() -> dict[str, list[str]]:
    """Returns the names that can stand for a class, by configuration key."""
    names: dict[str, list[str]] = {key: [] for key in PLUGGABLE.values()}
    for entry in registry:
        if entry.kind in PLUGGABLE:
            names[PLUGGABLE[entry.kind]].append(entry.name)
    import lightning.pytorch.callbacks

    names["trainer.callbacks"] += lightning.pytorch.callbacks.__all__
    return names


def report(cli: Any, arguments: list[str], seconds: float) -> None:
    """Prints what came out, and writes it as ``results.json`` beside the run's logs."""
    trainer = cli.trainer
    if not trainer.is_global_zero:
        return
    metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    best = getattr(trainer.checkpoint_callback, "best_model_path", "") if trainer.checkpoint_callback else ""
    results = {
        "command": "fit",
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "seconds": round(seconds, 2),
        "metrics": metrics,
        "checkpoint": best or None,
        "arguments": arguments,
    }
    rows = [(plain(name), f"{value:.4g}") for name, value in metrics.items()]
    out = console()
    out.print(table(f"after {trainer.global_step} steps, {seconds:.0f} s", ["metric", "value"], rows, right=["value"]))
    if cli.folder is not None:
        write_text(cli.folder / "results.json", to_json(jsonable(results)) + "\n")
        out.print(f"results     {cli.folder / 'results.json'}", soft_wrap=True, markup=False)
    if best:
        out.print(f"checkpoint  {best}", soft_wrap=True, markup=False)
        out.print(f"[dim]lossplug export {plain(best)} --output DIR[/dim]", soft_wrap=True)
