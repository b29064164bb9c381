"""Everything that has a name: the registry, and the recipe files of ``lossplug fit --recipe``."""

from __future__ import annotations

import inspect
import re
from typing import Any

from lightning_lossplug.cli.output import jsonable
from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.recipes import config_names, config_path, config_title
from lightning_lossplug.registry import Entry, registry

CONFIG = "config"
ORDER = (
    *("loss", "recipe", "mask", "score", "transform", "activation", "quantizer", "post_training", "teacher"),
    *("compressor", "error_feedback", "local_update", "schedule", "optimizer", "callback", "strategy", "plugin"),
    *("model", "data", "metric", "function", "exporter", CONFIG),
)


def entries() -> list[Entry]:
    """Returns every entry, kinds in the order of the documentation."""
    configs = [Entry(CONFIG, name, "lightning_lossplug.recipes.config_path", "recipe file") for name in config_names()]
    found = [*registry, *configs]
    return sorted(
        found, key=lambda e: (ORDER.index(e.kind) if e.kind in ORDER else len(ORDER), e.kind, e.family, e.name)
    )


def select(word: str | None, found: list[Entry]) -> list[Entry]:
    """Returns the entries of a kind (singular or plural) or of a family.

    Raises:
        LossplugError: Neither a kind nor a family.
    """
    if word is None:
        return found
    kinds = {alias: entry.kind for entry in found for alias in (entry.kind, plural(entry.kind))}
    chosen = [entry for entry in found if entry.kind == kinds.get(word)] or [e for e in found if e.family == word]
    if not chosen:
        known = {plural(entry.kind) for entry in found} | {entry.family for entry in found}
        raise LossplugError(f"there is no kind or family {word!r}", remedy=suggestion(word, known))
    return chosen


def plural(kind: str) -> str:
    """``loss`` -> ``losses``; data and post_training are their own plurals."""
    if kind in ("data", "post_training"):
        return kind
    if kind.endswith("y"):
        return f"{kind[:-1]}ies"
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


def find(name: str, kind: str | None) -> Entry:
    """Returns the entry of a name or alias; ``KIND/NAME`` says the kind.

    Raises:
        LossplugError: Unknown, or known in several kinds.
    """
    if kind is None and "/" in name:
        kind, _, name = name.partition("/")
    found = select(kind, entries()) if kind else entries()
    hits = [entry for entry in found if name == entry.name] or [entry for entry in found if name in entry.aliases]
    if not hits:
        names = {known for entry in found for known in (entry.name, *entry.aliases)}
        raise LossplugError(f"unknown name {name!r}", remedy=suggestion(name, names))
    if len(hits) > 1:
        options = " or ".join(f"{entry.kind}/{name}" for entry in hits)
        raise LossplugError(f"the name {name!r} has {len(hits)} meanings", remedy=f"Say {options}")
    return hits[0]


def record(entry: Entry) -> dict[str, Any]:
    """Returns an entry for JSON; ``unavailable`` says what is missing when an optional package is."""
    made: dict[str, Any] = {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "family": entry.family,
        "kind": entry.kind,
        "paper": entry.paper,
        "arxiv": entry.arxiv,
        "signature": entry.signature,
        "module": entry.module,
        "parameters": [],
    }
    if entry.kind == CONFIG:
        return {**made, "module": "lightning_lossplug.recipes", "title": config_title(entry.name)}
    try:
        made["module"] = entry.load().__module__
        made["parameters"] = [
            {"name": p.name, "default": jsonable(p.default), "annotation": p.annotation, "required": p.required}
            for p in entry.parameters()
        ]
    except LossplugError as error:
        made["unavailable"] = str(error)
    return made


def docstring(entry: Entry) -> str:
    """Returns the docstring of what an entry builds (of a recipe file: its leading comment)."""
    if entry.kind == CONFIG:
        lines = config_path(entry.name).read_text(encoding="utf-8").splitlines()
        comment = [
            line.lstrip("# ")
            for line in lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), 0)]
        ]
        return "\n".join(comment)
    return inspect.getdoc(entry.load()) or ""


def descriptions(entry: Entry) -> dict[str, str]:
    """Returns what the docstrings of a class and its bases (or of a function) say about the arguments."""
    factory = entry.load()
    found: dict[str, str] = {}
    for owner in reversed(inspect.getmro(factory) if isinstance(factory, type) else (factory,)):
        found.update(split_docstring(readable(inspect.cleandoc(owner.__doc__ or "")))[1])
    return found


SYMBOLS = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "eta": "η", "theta": "θ", "kappa": "κ",
    "lambda": "λ", "mu": "μ", "nu": "ν", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ", "phi": "φ", "psi": "ψ",
    "omega": "ω", "Phi": "Φ", "Delta": "Δ", "Omega": "Ω", "sum": "Σ", "prod": "Π", "cdot": "·", "times": "×", "le": "≤",
    "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "in": "∈", "to": "→", "infty": "∞", "partial": "∂",
    "ldots": "…", "dots": "…", "cdots": "…", "odot": "⊙", "approx": "≈", "quad": " ", "ell": "ℓ", "pm": "±",
    "propto": "∝", "nabla": "∇",
    "top": "ᵀ", "|": "‖", "lVert": "‖", "rVert": "‖", "big": "", "Big": "", "bigl": "", "bigr": "",
    "Bigl": "", "Bigr": "", "left": "", "right": "", "mathrm": "", "mathbf": "", "text": "", "operatorname": "",
}  # fmt: skip


def readable(text: str) -> str:
    """Returns a docstring for a terminal: without reStructuredText marks, LaTeX symbols as characters."""

    def formula(match: re.Match[str]) -> str:
        inner = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)", match.group(1))
        inner = re.sub(r"\\[,;! ]", " ", inner)
        inner = re.sub(r"\\([A-Za-z]+|\|) ?", lambda m: SYMBOLS.get(m.group(1), m.group(1) + " "), inner)
        return re.sub(r"\{([^{}])\}", r"\1", inner)

    text = re.sub(r":math:`([^`]*)`", formula, text)
    text = re.sub(r":(?:class|func|meth|mod|attr):`~?([^`]*)`", r"\1", text)
    return text.replace("``", "")


def split_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Splits a Google-style docstring into its text without ``Args:`` and the descriptions of the arguments."""
    match = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", text, re.MULTILINE)
    if match is None:
        return text, {}
    described: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(match.group(1)).splitlines():
        head = re.match(r"(\w+)(?: \([^)]*\))?: (.*)", line)
        if head and not line.startswith(" "):
            name = head.group(1)
            described[name] = head.group(2).strip()
        elif name:
            described[name] += " " + line.strip()
    rest = text[: match.start()] + text[match.end() :]
    return re.sub(r"\n{3,}", "\n\n", rest).strip(), described
