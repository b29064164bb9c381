"""Parameter groups of their own for scales, made while an optimizer is built.

Adding a group to a finished optimizer breaks schedulers that have counted its groups. So the groups are split when the
optimizer's constructor is given them, inside :func:`scale_groups`, and schedulers built after it count right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

Owners = Sequence[tuple[nn.Parameter, Sequence[nn.Parameter]]]


def split_groups(
    params: Iterable[Any], defaults: dict[str, Any], owners: Owners, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Returns an optimizer's groups with scales moved into groups of their own, at the end.

    Scales that no group names join the group of their layer's weight, with its options.

    Args:
        params: What the optimizer's constructor was given: parameters, named parameters or groups.
        defaults: Its defaults.
        owners: Per quantised layer its weight and its scales.
        lr: Factor of the group's learning rate.
        weight_decay: Weight decay of the scales.
    """
    groups = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    members = [_listed(group["params"]) for group in groups]
    held = {id(_parameter(item)) for items in members for item in items}
    scales = {id(scale) for _, owned in owners for scale in owned}
    left, own = [], []
    for group, items in zip(groups, members, strict=True):
        kept = [item for item in items if id(_parameter(item)) not in scales]
        moved = [item for item in items if id(_parameter(item)) in scales]
        inside = {id(_parameter(item)) for item in items}
        named = bool(items) and isinstance(items[0], tuple)
        for i, (weight, owned) in enumerate(owners):
            for j, scale in enumerate(owned):
                if id(weight) in inside and id(scale) not in held:
                    held.add(id(scale))
                    moved.append((f"scale.{i}.{j}", scale) if named else scale)
        if kept or not moved:
            left.append({**group, "params": kept})
        if moved:
            options = {**group, "params": moved}
            if "lr" in group or "lr" in defaults:
                options["lr"] = group.get("lr", defaults.get("lr")) * lr
            if "weight_decay" in group or "weight_decay" in defaults:
                options["weight_decay"] = weight_decay
            own.append(options)
    return left + own


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, nn.Parameter) else list(params)


def _parameter(item: Any) -> Any:
    return item[1] if isinstance(item, tuple) else item


@contextmanager
def scale_groups(owners: Owners, lr: float = 1.0, weight_decay: float = 0.0) -> Iterator[None]:
    """Every optimizer that is built inside gets groups by :func:`split_groups`.

    Args:
        owners: Per quantised layer its weight and its scales.
        lr: Factor of the learning rate of the scales.
        weight_decay: Weight decay of the scales.
    """
    build = Optimizer.__init__

    def split(self: Optimizer, params: Any, defaults: dict[str, Any]) -> None:
        if isinstance(params, nn.Parameter) or not isinstance(params, Iterable):
            build(self, params, defaults)  # torch says what is wrong
        else:
            build(self, split_groups(params, defaults, owners, lr, weight_decay), defaults)

    Optimizer.__init__ = split  # type: ignore[assignment]
    try:
        yield
    finally:
        Optimizer.__init__ = build  # type: ignore[method-assign]
