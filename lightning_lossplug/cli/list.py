"""``lossplug list``: everything that has a name."""

from __future__ import annotations

from itertools import groupby

from lightning_lossplug.cli.arguments import new_parser
from lightning_lossplug.cli.catalog import CONFIG, entries, plural, record, select
from lightning_lossplug.cli.output import console, plain, table, to_json
from lightning_lossplug.recipes import config_title
from lightning_lossplug.registry import Entry


def run(arguments: list[str]) -> None:
    """Lists what is registered.

    Raises:
        LossplugError: Neither a kind nor a family.
    """
    parser = new_parser("list", "List what has a name: losses, recipes, schedules, callbacks, models, data, configs.")
    parser.add_argument(
        "what", nargs="?", help="a kind (losses, recipes, callbacks ...) or a family (classification ...)"
    )
    parser.add_argument("--json", action="store_true", help="an array of objects with parameters and source")
    options = parser.parse_args(arguments)
    chosen = select(options.what, entries())
    if options.json:
        print(to_json([record(entry) for entry in chosen]))
        return
    out = console()
    for kind, group in groupby(chosen, key=lambda entry: entry.kind):
        out.print(_section(kind, list(group)))
    out.print("[dim]lossplug show NAME explains one of them[/dim]")


def _section(kind: str, found: list[Entry]) -> object:
    title = f"{plural(kind)} ({len(found)})"
    if kind == CONFIG:
        configs = [(f"[bold]{entry.name}[/bold]", plain(config_title(entry.name))) for entry in found]
        return table(f"{title}, for lossplug fit --recipe NAME", ["name", "what it trains"], configs)
    columns = (
        ["name", "family", "called as", "paper", "arXiv"] if kind == "loss" else ["name", "family", "paper", "arXiv"]
    )
    if not any(entry.paper or entry.arxiv for entry in found):
        columns = ["name", "family", "module"]
    rows: list[tuple[str, ...]] = []
    for entry in found:
        names = f"[bold]{entry.name}[/bold]" + (f" [dim]({', '.join(entry.aliases)})[/dim]" if entry.aliases else "")
        link = f"[link=https://arxiv.org/abs/{entry.arxiv}]{entry.arxiv}[/link]" if entry.arxiv else ""
        cells = {
            "name": names,
            "family": entry.family,
            "called as": entry.signature or "",
            "paper": plain(entry.paper),
            "arXiv": link,
            "module": entry.module,
        }
        rows.append(tuple(cells[column] for column in columns))
    return table(title, columns, rows, cut=["paper"])
