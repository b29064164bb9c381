"""Keys and values of a shrunk cache that are rebuilt only if somebody looks at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

MAX_ROWS = 64  # query rows of a key-value head, from which on rebuilding once is cheaper
_PLAIN = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    *(getattr(Tensor, name) for name in ("size", "dim", "__len__", "is_floating_point", "numel")),
}


class Pending:
    """What stands behind a pair of states: how to attend to it, and how to rebuild it.

    Args:
        attend: ``attend(query, scale, mask)`` on ``[batch, key-value heads, rows, d]``; it returns None if it can't.
        rebuild: Returns all keys and values.
        watch: Called with every query before.
        rows: Query rows of a key-value head that ``attend`` takes at most; None for any number, causal ones too.
    """

    def __init__(
        self,
        attend: Callable[..., Tensor | None],
        rebuild: Callable[[], tuple[Tensor, Tensor]],
        watch: Callable[[Tensor], None] | None = None,
        rows: int | None = MAX_ROWS,
    ) -> None:
        self.attend, self.rebuild, self.watch, self.rows = attend, rebuild, watch, rows
        self.rebuilt: tuple[Tensor, Tensor] | None = None

    def get(self, which: int) -> Tensor:
        """Returns the keys (0) or the values (1)."""
        if self.rebuilt is None:
            self.rebuilt = self.rebuild()
        return self.rebuilt[which]


class ShrunkStates(Tensor):
    """Stands for all keys (or values) of a layer in the attention function.

    ``scaled_dot_product_attention`` of a few queries attends to the codes; any other operation gets the rebuilt tensor,
    so that an attention function that is not known here is slow, and never wrong.
    """

    pending: Pending
    which: int

    @staticmethod
    def __new__(
        cls: type[ShrunkStates], pending: Pending, which: int, shape: tuple[int, ...], like: Tensor
    ) -> ShrunkStates:
        """Makes the stand-in, of dtype and device of ``like``."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made.pending, made.which = pending, which
        return made

    def __init__(self, pending: Pending, which: int, shape: tuple[int, ...], like: Tensor) -> None: ...

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PLAIN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            out = _attend(*args, **kwargs)
            if out is not None:
                return out
        args, kwargs = tree_map(_rebuilt, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_rebuilt, (args, kwargs or {}))
        return func(*args, **kwargs)


def _rebuilt(value: Any) -> Any:
    return value.pending.get(value.which) if isinstance(value, ShrunkStates) else value


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """The attention over codes, or None where only the rebuilt tensors will do."""
    if not (isinstance(key, ShrunkStates) and isinstance(value, ShrunkStates)) or isinstance(query, ShrunkStates):
        return None
    if key.pending is not value.pending or query.ndim != 4:
        return None
    pending, (batch, heads, tokens, width) = key.pending, key.shape
    if pending.watch is not None:
        pending.watch(query)
    groups, left = divmod(query.shape[1], heads)
    if (
        dropout_p
        or (is_causal and pending.rows is not None)
        or left
        or (groups > 1 and not enable_gqa)
        or query.shape[0] != batch
        or query.shape[3] != width
    ):
        return None
    rows = groups * query.shape[2]
    if (pending.rows is not None and rows > pending.rows) or (torch.is_grad_enabled() and query.requires_grad):
        return None
    if attn_mask is not None:
        if attn_mask.ndim != 4 or attn_mask.shape[3] != tokens:
            return None
        if attn_mask.dtype is torch.bool:
            lowest = torch.finfo(torch.float32).min
            attn_mask = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill_(~attn_mask, lowest)
        if attn_mask.shape[1:3] != (1, 1):
            attn_mask = attn_mask.expand(-1, query.shape[1], query.shape[2], -1).reshape(-1, heads, rows, tokens)
    scale = width**-0.5 if scale is None else scale
    out = pending.attend(query.reshape(batch, heads, rows, width), scale, attn_mask)
    return None if out is None else out.reshape(*query.shape[:3], out.shape[-1])
