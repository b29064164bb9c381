"""``lossplug show NAME``: formula, parameters, source and plot of one name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_lossplug.cli.arguments import new_parser
from lightning_lossplug.cli.catalog import CONFIG, descriptions, docstring, find, readable, record, split_docstring
from lightning_lossplug.cli.output import console, plain, table, to_json
from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.recipes import config_path
from lightning_lossplug.registry import Entry

EPILOG = """examples:
  lossplug show poly_loss --plot poly.png
  lossplug show focal --set gamma=5 --plot focal.png
  lossplug show recipe/nm_srste"""


def run(arguments: list[str]) -> None:
    """Explains a name.

    Raises:
        LossplugError: Unknown or ambiguous name, or no plot for it.
    """
    parser = new_parser("show", "Explain a name: formula, parameters with defaults, source, plot.", EPILOG)
    parser.add_argument("name", help="a name or alias; KIND/NAME where it has several meanings")
    parser.add_argument("--kind", help="loss, recipe, schedule, callback, model, data, config ...")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write loss and gradient over the margin (PNG)")
    parser.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="a parameter of the loss, for the plot"
    )
    parser.add_argument("--json", action="store_true", help="as an object, docstring included")
    options = parser.parse_args(arguments)
    entry = find(options.name, options.kind)
    parameters = dict(_setting(text) for text in options.set)
    drawn = None
    if options.plot is not None:
        from lightning_lossplug.cli import margin

        drawn = margin.curve(entry, parameters)
        shown = ", ".join(f"{key}={value}" for key, value in parameters.items())
        margin.draw(drawn, f"{entry.name}({shown})" if shown else entry.name, options.plot)
    if options.json:
        print(to_json({**record(entry), "docstring": docstring(entry)}))
        return
    _print(entry, parameters, options.plot, drawn)


def _print(entry: Entry, parameters: dict[str, Any], plot: Path | None, drawn: Any) -> None:
    out = console()
    text, _ = split_docstring(readable(docstring(entry)))
    also = f"  [dim]also {', '.join(entry.aliases)}[/dim]" if entry.aliases else ""
    out.print(f"[bold]{entry.name}[/bold]  [dim]{entry.kind}, {entry.family}[/dim]{also}\n")
    out.print(text, markup=False)
    if entry.kind == CONFIG:
        syntax = require("rich.syntax", "cli", "lossplug show").Syntax
        out.print(syntax(config_path(entry.name).read_text(encoding="utf-8"), "yaml", background_color="default"))
        out.print(f"[dim]lossplug fit --recipe {entry.name}[/dim]")
        return
    described = descriptions(entry)
    rows = [
        (
            f"[bold]{p.name}[/bold]",
            "[dim]required[/dim]" if p.required else plain(repr(p.default)),
            plain(p.annotation),
            plain(described.get(p.name, described.get(f"{p.name}_", ""))),
        )
        for p in entry.parameters()
    ]
    if rows:
        out.print()
        out.print(table("parameters", ["name", "default", "type", "meaning"], rows))
    if entry.signature:
        out.print(f"called as: {entry.signature}")
    if entry.paper or entry.arxiv:
        out.print(f"paper: {plain(entry.paper)}" + (f"  https://arxiv.org/abs/{entry.arxiv}" if entry.arxiv else ""))
    _print_curve(out, entry, parameters, plot, drawn)


def _print_curve(out: Any, entry: Entry, parameters: dict[str, Any], plot: Path | None, drawn: Any) -> None:
    from lightning_lossplug.cli import margin

    if not margin.can_draw(entry):
        return
    if drawn is None:
        try:
            drawn = margin.curve(entry, parameters)
        except LossplugError as error:  # a required parameter: the page is of use without the curve
            out.print(f"[dim]no curve: {plain(str(error))}[/dim]")
            return
    reach = float(drawn.x[-1])
    for name, values in (("loss", drawn.loss), ("gradient", drawn.gradient)):
        low, high = float(values.min()), float(values.max())
        out.print(f"{name:<9}{margin.sparkline(values)}  {low:.3g} to {high:.3g}", markup=False)
    out.print(f"[dim]         {-reach:g} ... {reach:g}, {drawn.axis}[/dim]")
    out.print(
        f"plot: {plot}" if plot else f"[dim]as PNG: lossplug show {entry.name} --plot {entry.name}.png[/dim]",
        soft_wrap=True,
    )


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise LossplugError(f"--set {text} has no value", remedy="Write --set NAME=VALUE")
    return name, require("yaml", "cli", "lossplug show --set").safe_load(value)
