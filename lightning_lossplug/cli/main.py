"""Entry point of ``lossplug``: finds the subcommand, and turns mistakes into one line and an exit code.

Every subcommand is a module with ``run(arguments)``, imported only when it is asked for.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from lightning_lossplug.errors import LossplugError, suggestion

COMMANDS = {
    "demo": "train dense and compressed on embedded data, compare, export; under three minutes",
    "fit": "train by configuration (LightningCLI): model, data, callbacks",
    "run": "add the callbacks of a recipe to the Trainers of a script nobody edits",
    "check": "what a recipe would do to a model: layers taken, skipped, refused; size and step time",
    "evaluate": "metrics, size and latency of checkpoints and artifacts, side by side",
    "export": "write a checkpoint as a plain folder for timm, transformers or torch",
    "quantize": "a trained model in few bits, calibrated on some text or data, without training",
    "cache-teacher": "run a teacher once over training data and store its logits",
    "shrink-kv": "calibrate a language model for a KV cache of a fraction of the bytes",
    "sparsity": "zeros per layer, N:M patterns, and which layers 2:4 kernels can use",
    "list": "losses, recipes, schedules, callbacks, models, data, metrics, configs",
    "show": "what a name means: formula, parameters, source, plot",
}

OPTIONS = ("--help", "--version", "--debug")

OK, MISTAKE, INTERRUPTED = 0, 2, 130
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)  # what a person mends, and no bug of ours


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Without the program's name; None takes ``sys.argv``.

    Returns:
        0; 2 for a mistake in arguments, files or settings, or a full disk; 130 when interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = given[: given.index("--")] if "--" in given else given  # behind it stands somebody else's command
    debug = os.environ.get("LOSSPLUG_DEBUG", "") not in ("", "0") or "--debug" in own
    given = [argument for argument in own if argument != "--debug"] + given[len(own) :]
    try:
        _dispatch(given)
        sys.stdout.flush()
    except LossplugError as error:
        if debug:
            raise
        print(f"lossplug: error: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        if debug:
            raise
        print("lossplug: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of `lossplug list | head` is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if debug or error.errno not in DISK:
            raise
        print(f"lossplug: error: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return MISTAKE
    except SystemExit as stop:  # --help of a subcommand
        return stop.code if isinstance(stop.code, int) else OK
    return OK


def _dispatch(given: list[str]) -> None:
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return
    if given[0] == "--version":
        from lightning_lossplug import __version__

        print(f"lossplug {__version__}")
        return
    command, rest = given[0], given[1:]
    if command not in COMMANDS:
        kind, known = ("option", OPTIONS) if command.startswith("-") else ("command", tuple(COMMANDS))
        raise LossplugError(f"unknown {kind} {command!r}", remedy=suggestion(command, known))
    importlib.import_module(f"lightning_lossplug.cli.{command.replace('-', '_')}").run(rest)


def usage() -> str:
    """Returns the help of the program."""
    rows = "\n".join(f"  {name:<15}{text}" for name, text in COMMANDS.items())
    return (
        "usage: lossplug COMMAND [options]\n\n"
        "New losses, N:M sparsity, quantisation, distillation and a small KV cache for any LightningModule.\n\n"
        f"commands:\n{rows}\n\n"
        "options:\n"
        "  -h, --help  this text; `lossplug COMMAND --help` explains a command\n"
        "  --version   the version\n"
        "  --debug     show the traceback of an error (also LOSSPLUG_DEBUG=1)"
    )


if __name__ == "__main__":
    sys.exit(main())
