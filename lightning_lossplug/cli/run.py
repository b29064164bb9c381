"""``lossplug run``: adds the callbacks of a recipe to the Trainers of a script that nobody edits."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import IO

from lightning_lossplug.cli.arguments import Parser, new_parser
from lightning_lossplug.cli.hook import Request
from lightning_lossplug.errors import LossplugError, require

EPILOG = """examples:
  lossplug run --recipe sparse.yaml -- python train.py --epochs 3
  lossplug run --recipe vit_digits_2to4 -- torchrun --nproc-per-node 2 train.py

The recipe holds a list of callbacks (of a configuration of lossplug fit, only trainer.callbacks counts):
  callbacks:
    - class_path: SwapLoss
      init_args: {loss: focal, parameters: {gamma: 2.0}}
    - class_path: NMSparsity
      init_args: {n: 2, m: 4}

They are added after the script's own callbacks, to every Trainer it makes. The exit code is the script's."""

FORWARDED = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


def run(arguments: list[str]) -> None:
    """Checks the recipe, runs the command with the recipe in its environment, and passes on how it ended.

    Raises:
        LossplugError: A recipe that is wrong, a command that isn't there, a script that made no Trainer.
        SystemExit: The command ended with another code than 0.
    """
    given, command = split(arguments)
    parser = new_parser("run", "Add the callbacks of a recipe to the Trainers of a script nobody edits.", EPILOG)
    parser.usage = "lossplug run --recipe NAME|FILE [--allow-import MODULE] -- COMMAND ..."
    add_recipe(parser)
    options = parser.parse_args(given)
    if not command:
        raise LossplugError(
            "no command to run", remedy="Give it after --: lossplug run --recipe FILE -- python train.py"
        )
    path, names = checked_recipe(options.recipe, options.allow_import, "lossplug run")
    command = found_command(command)
    print(f"lossplug: {', '.join(names)} for the Trainers of: {' '.join(command)}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="lossplug-") as folder:
        mark = Path(folder) / "mark"
        code = wait(command, Request(str(path), str(mark), options.allow_import))
        found = mark.is_file()
    if code != 0:
        raise SystemExit(code)
    if not found:
        raise no_trainer()


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns what stands before ``--`` and after it."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def add_recipe(parser: Parser) -> None:
    """Adds the options of ``run`` and ``check`` that say what to add."""
    parser.add_argument("--recipe", required=True, help="a YAML file, or a packaged recipe (lossplug list configs)")
    parser.add_argument(
        "--allow-import", action="append", default=[], metavar="MODULE", help="a module the recipe may import from"
    )


def checked_recipe(name: str, allowed: list[str], purpose: str) -> tuple[Path, list[str]]:
    """Returns a recipe's file and the names of its callbacks, after building them once.

    Raises:
        LossplugError: It is wrong, or a package is missing.
    """
    require("lightning", "lightning", purpose)
    require("jsonargparse", "cli", purpose)
    from lightning_lossplug.cli.recipe import build_callbacks, read_recipe, recipe_path

    path = recipe_path(name)
    built = build_callbacks(read_recipe(path, allowed), str(path))
    return path, [type(callback).__name__ for callback in built]


def found_command(command: list[str]) -> list[str]:
    """Returns the command with its program's path.

    Raises:
        LossplugError: There is no such program.
    """
    program = shutil.which(command[0])
    if program is None:
        raise LossplugError(
            f"there is no program {command[0]!r}", remedy="Give the command as in a shell: python train.py"
        )
    return [program, *command[1:]]


def no_trainer() -> LossplugError:
    """The mistake of a command without a Trainer that could be reached."""
    return LossplugError(
        "the command made no Trainer that callbacks could be added to",
        remedy=f"They are found by the Python where lightning_lossplug is installed, here {sys.executable}",
    )


def wait(command: list[str], asked: Request, log: IO[str] | None = None) -> int:
    """Runs a command to its end; what asks this process to stop asks the command.

    Args:
        command: Program and arguments.
        asked: Goes into its environment.
        log: A file that gets what it prints; None: it prints where this process does.

    Returns:
        Its exit code; 128 and the signal's number, if one ended it.
    """
    with subprocess.Popen(command, env=asked.environment(), stdout=log, stderr=log) as process:

        def forward(number: int, frame: FrameType | None) -> None:
            if process.poll() is None:
                process.send_signal(number)

        # Ctrl-C reaches the command by itself, as a member of the terminal's group.
        old = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
        for name in FORWARDED:
            if number := getattr(signal, name, None):
                old[number] = signal.signal(number, forward)
        try:
            code = process.wait()
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code
