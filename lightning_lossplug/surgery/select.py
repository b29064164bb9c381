"""Choosing the weights a technique works on, and saying why each was taken or left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.surgery.plug import latent, plain_class


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer whose parameter techniques may transform.

    Args:
        parameter: Name of the parameter.
        reduction_axis: The axis summed over in the layer's product (None: a lookup, not a product).
        output_axis: The axis of the layer's outputs.
    """

    parameter: str
    reduction_axis: int | None
    output_axis: int = 0


# By dotted path, so that a class of a package that isn't installed needs no import. Subclasses inherit the row.
LAYER_KINDS: dict[str, tuple[LayerKind, ...]] = {
    "torch.nn.modules.linear.Linear": (LayerKind("weight", 1),),
    "torch.nn.modules.conv.Conv1d": (LayerKind("weight", 1),),
    "torch.nn.modules.conv.Conv2d": (LayerKind("weight", 1),),
    "torch.nn.modules.conv.Conv3d": (LayerKind("weight", 1),),
    "torch.nn.modules.sparse.Embedding": (LayerKind("weight", None),),
    "torch.nn.modules.activation.MultiheadAttention": (LayerKind("in_proj_weight", 1),),
    "transformers.pytorch_utils.Conv1D": (LayerKind("weight", 0, 1),),
}

# Parameters that hold the same product of every expert, [experts, out, in] or [experts, in, out].
EXPERT_PARAMETERS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")

HEAD_NAMES = ("head", "heads", "fc", "classifier", "lm_head", "score", "output_layer", "last_linear")


@dataclass(frozen=True)
class Candidate:
    """A weight of a model: the layer, its path, and the parameter's name, reduction axis and output axis."""

    path: str
    layer: nn.Module
    parameter: str
    reduction_axis: int | None
    output_axis: int = 0

    @property
    def name(self) -> str:
        """Path of the layer; with the parameter's name where that isn't ``weight``."""
        return self.path if self.parameter == "weight" else f"{self.path}.{self.parameter}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(latent(self.layer, self.parameter).shape)


@dataclass(frozen=True)
class Choice:
    """One row of a selection: a candidate, whether it was taken, and why (or with what setting)."""

    candidate: Candidate
    taken: bool
    note: str


@dataclass(frozen=True)
class Selection:
    """What a technique takes of a model and what it leaves out."""

    choices: tuple[Choice, ...]

    @property
    def taken(self) -> tuple[Candidate, ...]:
        """The candidates taken, in model order."""
        return tuple(choice.candidate for choice in self.choices if choice.taken)

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Returns ``(layer, kind, shape, taken, note)`` per candidate, as text."""
        return [
            (
                choice.candidate.name,
                plain_class(choice.candidate.layer).__name__,
                "x".join(map(str, choice.candidate.shape)),
                "yes" if choice.taken else "no",
                choice.note,
            )
            for choice in self.choices
        ]

    def table(self, *, compact: bool = False) -> str:
        """Returns the selection as a plain-text table.

        Args:
            compact: One row for layers that differ only in numbers of their paths (the blocks of a network).
        """
        rows = self.rows()
        if compact:
            groups: dict[tuple[str, ...], int] = {}
            for layer, *rest in rows:
                key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", layer), *rest)
                groups[key] = groups.get(key, 0) + 1
            rows = [(f"{key[0]} ({count})" if count > 1 else key[0], *key[1:]) for key, count in groups.items()]  # type: ignore[misc]
        rows = [("layer", "kind", "shape", "taken", "why"), *rows]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def candidates(model: nn.Module) -> list[Candidate]:
    """Returns every weight of a supported kind, in model order, each parameter once."""
    found, seen = [], set()
    for path, layer in model.named_modules():
        for kind in layer_kinds(layer):
            parameter = layer._parameters.get(kind.parameter)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append(Candidate(path, layer, kind.parameter, kind.reduction_axis, kind.output_axis))
    return found


def layer_kinds(layer: nn.Module) -> tuple[LayerKind, ...]:
    """Returns the rows of :data:`LAYER_KINDS` for a layer, or those of fused experts; empty for other layers."""
    for base in plain_class(layer).__mro__:
        kinds = LAYER_KINDS.get(f"{base.__module__}.{base.__qualname__}")
        if kinds is not None:
            return kinds
    return _fused_experts(layer)


def _fused_experts(layer: nn.Module) -> tuple[LayerKind, ...]:
    """Finds the 3-D weights of a mixture of experts, whose classes differ from model to model in transformers."""
    shapes = {
        name: parameter.shape
        for name in EXPERT_PARAMETERS
        if (parameter := layer._parameters.get(name)) is not None and parameter.ndim == 3
    }
    down = shapes.get("down_proj")
    up = shapes.get("gate_up_proj", shapes.get("up_proj"))
    if down is None or up is None:
        return ()
    transposed = getattr(layer, "is_transposed", None)
    if transposed is None:
        # The class doesn't say how it stores them. A fused projection, twice as wide on one side, shows it; the shapes
        # of separate ones fit both ways.
        if "gate_up_proj" not in shapes:
            return ()
        transposed = up[1] == down[2] and up[2] == 2 * down[1]
    axes = (1, 2) if transposed else (2, 1)
    return tuple(LayerKind(name, *axes) for name in shapes)


def default_exclusions(model: nn.Module) -> dict[int, str]:
    """Returns ``{id(parameter): reason}`` for what is left out unless it is asked for by name.

    Embeddings and heads tied to them, the output layer, the first convolution (stem or patch embedding) and depthwise
    convolutions: few parameters, a large effect on accuracy, or a reduction axis of one.
    """
    reasons: dict[int, str] = {}
    embeddings = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        for getter in ("get_output_embeddings", "get_classifier"):
            try:
                head = getattr(module, getter)() if callable(getattr(module, getter, None)) else None
            except (AttributeError, NotImplementedError, TypeError):  # a model without a head, in its library's words
                head = None
            for part in head if isinstance(head, (tuple, list)) else (head,):
                if isinstance(part, nn.Module):
                    for layer in part.modules():
                        reasons.update({id(p): "output layer" for p in layer._parameters.values() if p is not None})
    found = candidates(model)
    products = [c for c in found if c.reduction_axis is not None]
    if not reasons and products:
        named = [c for c in products if c.path.rpartition(".")[2] in HEAD_NAMES]
        last = named[-1] if named else products[-1]
        if len(products) > 1:
            reasons[id(latent(last.layer, last.parameter))] = "output layer (the last of the model)"
    stem = next((c for c in products if _is_convolution(c)), None)
    if stem is not None:
        reasons.setdefault(id(latent(stem.layer, stem.parameter)), "first convolution (stem or patch embedding)")
    for candidate in found:
        key = id(latent(candidate.layer, candidate.parameter))
        if candidate.reduction_axis is None:
            reasons[key] = "embedding"
        elif key in embeddings:
            reasons[key] = f"tied to the embedding {embeddings[key]}"
        elif getattr(candidate.layer, "groups", 1) > 1 and candidate.shape[1] == 1:
            reasons[key] = "depthwise convolution"
    return reasons


def _is_convolution(candidate: Candidate) -> bool:
    return isinstance(candidate.layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def matches(patterns: Iterable[str], candidate: Candidate) -> str | None:
    """Returns the first glob pattern that matches the layer's path or the parameter's name, or None."""
    for pattern in patterns:
        if fnmatchcase(candidate.path, pattern) or fnmatchcase(candidate.name, pattern):
            return pattern
    return None


def select(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    *,
    check: Callable[[Candidate], str | None] = lambda candidate: None,
    technique: str = "the technique",
) -> Selection:
    """Chooses weights by glob patterns over module paths.

    Args:
        model: The model whose paths the patterns are matched with.
        include: Patterns; None takes every weight of a product. A pattern without wildcards also overrides
            :func:`default_exclusions`.
        exclude: Patterns that are left out, whatever ``include`` says.
        check: Returns why a weight can't be taken (it is then left out, with that reason), or None.
        technique: Name for messages.

    Raises:
        LossplugError: A pattern matches nothing, nothing is left, or the patterns are one text.
    """
    for name, globs in (("include", include), ("exclude", exclude)):
        require_list(globs, name, technique)
    found = candidates(model)
    names = [c.name for c in found]
    for glob in (*(include or ()), *exclude):
        if found and not any(matches([glob], c) is not None for c in found):
            endings = {name.split(".", cut)[-1] for name in names for cut in range(name.count(".") + 1)}
            remedy = suggestion(glob.strip("*."), endings)
            raise LossplugError(f"the pattern {glob!r} matches no layer", where=technique, remedy=remedy)
    excluded = default_exclusions(model)
    choices = []
    for candidate in found:
        pattern: str | None = "*" if include is None else matches(include, candidate)
        exact = pattern is not None and not any(c in pattern for c in "*?[")
        reason = excluded.get(id(latent(candidate.layer, candidate.parameter)))
        if pattern is None:
            note: str | None = "not in include"
        elif (hit := matches(exclude, candidate)) is not None:
            note = f"excluded by {hit!r}"
        elif reason is not None and not exact:
            note = f"{reason}; include it by its full name to take it"
        else:
            note = check(candidate)
        choices.append(Choice(candidate, note is None, note or ("all" if include is None else f"{pattern}")))
    return Selection(tuple(choices))


def require_list(globs: object, name: str, where: str) -> None:
    """Raises :class:`LossplugError` for a text in the place of a list of patterns: its letters would be patterns."""
    if isinstance(globs, str):
        raise LossplugError(f"{name} is the text {globs!r}", where=where, remedy=f"Write a list: {name}=[{globs!r}]")


def require_taken(selection: Selection, technique: str) -> None:
    """Raises :class:`LossplugError` when a selection took nothing, with the most common reason."""
    if selection.taken:
        return
    notes = [choice.note for choice in selection.choices]
    why = f"; {len(notes)} were left out, the first one because: {notes[0]}" if notes else ": the model has none"
    raise LossplugError(
        f"no layer selected{why}", where=technique, remedy="Name the layers in include, for example include=['*.mlp.*']"
    )
