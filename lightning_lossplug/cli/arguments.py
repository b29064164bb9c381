"""argparse whose complaints are a :class:`LossplugError`: one line, exit code 2."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from lightning_lossplug.errors import LossplugError, suggestion


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Turns argparse's message into one line, with the nearest option for a misspelt one."""
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown is None:
            raise LossplugError(message, remedy=f"See: {self.prog} --help")
        given = unknown.group(1).partition("=")[0]
        options = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        if not given.startswith("-"):
            raise LossplugError(f"unexpected argument {given!r}", remedy=f"See: {self.prog} --help")
        raise LossplugError(f"unknown option {given}", remedy=suggestion(given, options))


def new_parser(command: str, description: str, epilog: str | None = None) -> Parser:
    """Returns the parser of a subcommand; options can't be abbreviated, so that a new one never changes a script."""
    return Parser(
        prog=f"lossplug {command}",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive_int(text: str) -> int:
    """An argparse type: an integer above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return value
