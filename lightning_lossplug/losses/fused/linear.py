"""Losses of a linear classifier straight from its input: the logits are never materialised."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.base import FusableLoss, Loss, check_labels
from lightning_lossplug.losses.fused.engines import PACKAGES, Ask, choose, require_engine, total
from lightning_lossplug.losses.fused.objective import Objective
from lightning_lossplug.losses.fused.precision import product_dtype, statistics_dtype
from lightning_lossplug.losses.fused.tiles import linear_stats
from lightning_lossplug.losses.reduction import check_reduction
from lightning_lossplug.registry import registry

Backend = Literal["auto", "rows", "tiles", "liger", "cce"]
WHERE = "fused_linear"


class HeadLoss(NamedTuple):
    """Loss of a head, log-partitions where asked for, and which back end computed them."""

    value: Tensor
    lse: Tensor | None
    engine: str


def fusable(loss: str | Loss) -> FusableLoss:
    """Returns the loss of a name, or the loss itself.

    Raises:
        LossplugError: It needs more of the logits than their statistics.
    """
    built: object = loss
    if isinstance(loss, str):
        built = registry.create("loss", loss) if registry.get("loss", loss).facts.get("fusable") else None
    if not isinstance(built, FusableLoss):
        name = loss if isinstance(loss, str) else type(loss).__name__
        known = ", ".join(sorted(e.name for e in registry if e.kind == "loss" and e.facts.get("fusable")))
        raise LossplugError(f"the loss {name!r} needs materialised logits", where=WHERE, remedy=f"Fusable are: {known}")
    return built


def fused_linear(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss: str | Loss = "cross_entropy",
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int | None = None,
    reduction: str | None = None,
    sample_weight: Tensor | None = None,
    denominator: Tensor | float | None = None,
    class_weight: Tensor | None = None,
    backend: Backend = "auto",
    tile: int | None = None,
    filter_eps: float | Literal["auto"] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Computes ``loss(softcap(hidden @ weight.T + bias), target)`` without holding the logits.

    Any loss of the registry with the fact ``fusable`` can be taken. Rows with the ignored label are dropped before any
    matrix product. Half-precision logits are rounded to half precision, as a materialised head rounds them; statistics,
    losses and whatever is summed over tiles are float32. Under autocast the products are in autocast's dtype.

    Back ends: ``rows`` forms the gradients in the forward pass, one chunk of rows at a time (three matrix products);
    ``tiles`` walks over the vocabulary and recomputes in backward (four products, the least memory, any upstream
    gradient). ``liger`` and ``cce`` are the kernels of the packages liger-kernel and cut-cross-entropy: cross-entropy
    only, a scalar, on CUDA. ``auto`` takes ``tiles`` unless a scalar is differentiated; then ``rows``, or on CUDA the
    fastest of ``rows`` and the installed packages, tried once per size (not under deterministic algorithms).

    Args:
        hidden: Input of the classifier, [..., D].
        weight: Classifier, [V, D].
        target: Class indices, [...].
        loss: Registry name, or a fusable loss object (with its class weights, label smoothing, ...).
        bias: [V].
        softcap: :math:`c > 0` of :math:`c \tanh(z / c)`; None: plain logits.
        ignore_index: Overrides the loss's.
        reduction: Overrides the loss's: ``none`` (shape of ``target``, 0 where ignored), ``mean`` or ``sum``.
        sample_weight: Factor of each row's loss, shape of ``target``.
        denominator: What ``mean`` divides by instead of the summed weights of the kept rows.
        class_weight: Overrides the loss's class weights, [V].
        backend: ``auto``, ``rows``, ``tiles``, ``liger`` or ``cce``.
        tile: Rows of a chunk (``rows``) or columns of a tile (``tiles``); None: chosen by the sizes.
        filter_eps: Entries of the logits' gradient below it may be dropped, ``auto``: by the dtype; a saving of
            ``cce`` alone, at the cost of rare tokens' gradients. None or 0: exact gradients.
        return_lse: Also return the log-partition of each row, shape of ``target``, 0 where ignored.

    Returns:
        The loss; with ``return_lse`` the pair ``(loss, lse)``, both differentiable.

    Raises:
        LabelError: A label outside [0, V) (checked on CPU).
        LossplugError: Shapes, dtypes or a loss that don't fit; a back end asked for that can't serve, and why.
    """
    found = head_loss(
        hidden,
        weight,
        target,
        loss,
        bias=bias,
        softcap=softcap,
        ignore_index=ignore_index,
        reduction=reduction,
        sample_weight=sample_weight,
        denominator=denominator,
        class_weight=class_weight,
        backend=backend,
        tile=tile,
        filter_eps=filter_eps,
        return_lse=return_lse,
    )
    return found.value if found.lse is None else (found.value, found.lse)


@torch.compiler.disable
def head_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss: str | Loss = "cross_entropy",
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int | None = None,
    reduction: str | None = None,
    sample_weight: Tensor | None = None,
    denominator: Tensor | float | None = None,
    class_weight: Tensor | None = None,
    backend: Backend = "auto",
    tile: int | None = None,
    filter_eps: float | Literal["auto"] | None = None,
    return_lse: bool = False,
) -> HeadLoss:
    """:func:`fused_linear` that tells its back end as well."""
    fused = fusable(loss)
    reduction = fused.reduction if reduction is None else reduction
    check_reduction(reduction)
    ignore_index = fused.ignore_index if ignore_index is None else ignore_index
    class_weight = fused.weight if class_weight is None else class_weight
    check_arguments(hidden, weight, target, bias, softcap, class_weight, sample_weight, tile)
    check_backend(backend, filter_eps)

    weight, bias = whole(weight), None if bias is None else whole(bias)
    y = target.reshape(-1)
    check_labels(y, weight.shape[0], ignore_index, WHERE)
    exact = statistics_dtype(product_dtype(hidden, weight))
    flat = hidden.reshape(-1, hidden.shape[-1])
    kept = torch.nonzero(y != ignore_index).squeeze(1)
    if kept.numel() < y.numel():
        flat, y = flat.index_select(0, kept), y[kept]
    y = y.long()
    class_weight = None if class_weight is None else class_weight.to(device=y.device, dtype=exact)
    row_weight = None if sample_weight is None else sample_weight.reshape(-1).to(exact)[kept]
    objective = Objective(fused, y, class_weight, row_weight)
    factor = _factor(objective, reduction, denominator, exact)

    learned = [p for p in fused.parameters() if p.requires_grad] + [row_weight, factor, class_weight]
    scalar_gradient = (
        reduction != "none" and not return_lse and not any(t is not None and t.requires_grad for t in learned)
    )
    if backend not in ("auto", "tiles") and not scalar_gradient:
        raise LossplugError(
            f"the backend {backend!r} forms the gradients of a scalar; it has no reduction='none', no "
            "return_lse, and no gradients of sample weights, denominator or parameters of the loss",
            where=WHERE,
            remedy="Use backend='auto'",
        )
    ask = Ask(flat, weight, bias, objective, factor, softcap, tile, filter_eps or None)
    if ask.filter_eps is not None:
        backend = "cce"
    if backend in PACKAGES:
        require_engine(backend, ask)
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *ask.leaves))
    if kept.numel() == 0:
        value, lse = _nothing(flat, weight, bias, target, reduction, exact)
        return HeadLoss(value, lse if return_lse else None, "rows" if backend == "auto" else backend)
    if backend == "auto":
        backend = choose(ask) if scalar_gradient and differentiated else "tiles"  # type: ignore[assignment]
    if backend != "tiles":
        return HeadLoss(total(backend, ask), None, backend)
    stats = linear_stats(flat, weight, y, bias=bias, softcap=softcap, needs=fused.needs, u=objective.u, tile=tile)
    rows = objective.rows(stats)
    value = spread(rows, kept, target.shape) if reduction == "none" else rows.sum() * factor
    return HeadLoss(value, spread(stats.lse, kept, target.shape) if return_lse else None, "tiles")


def check_backend(backend: str, filter_eps: float | str | None) -> None:
    """Raises :class:`LossplugError` for an unknown back end, or a filter that it doesn't have."""
    if backend not in get_args(Backend):
        raise LossplugError(f"backend is {backend!r}", where=WHERE, remedy=f"Use one of {', '.join(get_args(Backend))}")
    known = filter_eps is None or filter_eps == "auto" or (isinstance(filter_eps, (int, float)) and filter_eps >= 0)
    if not known:
        raise LossplugError(f"filter_eps is {filter_eps!r}, allowed is None, 'auto' or a number >= 0", where=WHERE)
    if filter_eps and backend not in ("auto", "cce"):
        raise LossplugError(
            f"the backend {backend!r} has no gradient filtering (filter_eps={filter_eps!r})",
            where=WHERE,
            remedy="Leave filter_eps None for exact gradients, or use backend='cce'",
        )


def _factor(objective: Objective, reduction: str, denominator: Tensor | float | None, dtype: torch.dtype) -> Tensor:
    """What the summed losses of the rows are multiplied by."""
    y = objective.y
    one = torch.ones((), dtype=dtype, device=y.device)
    if reduction != "mean":
        return one
    if denominator is not None:
        return one / torch.as_tensor(denominator, device=y.device)
    if objective.class_weight is None and objective.row_weight is None:
        return one / max(y.numel(), 1)
    weights = one if objective.class_weight is None else objective.class_weight[y]
    divisor = (weights if objective.row_weight is None else weights * objective.row_weight).sum()
    return torch.where(divisor > 0, 1 / torch.where(divisor > 0, divisor, 1), 0)


def spread(rows: Tensor, kept: Tensor, shape: torch.Size) -> Tensor:
    """Puts the values of the kept rows back among zeros."""
    if kept.numel() == shape.numel():
        return rows.reshape(shape)
    return rows.new_zeros(shape.numel()).index_copy(0, kept, rows).reshape(shape)


def _nothing(
    flat: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reduction: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Zeros that are part of the graph, for a batch without a kept row."""
    anchor = flat.sum().to(dtype) + weight[:0].sum().to(dtype)
    if bias is not None:
        anchor = anchor + bias[:0].sum().to(dtype)
    rows = anchor.new_zeros(target.shape) + anchor
    return (rows if reduction == "none" else anchor), rows


def whole(weight: Tensor) -> Tensor:
    """Returns a sharded (DTensor) weight gathered, any other as it is."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    tile: int | None,
) -> None:
    """Raises :class:`LossplugError` for shapes and values that don't fit each other."""
    if weight.ndim != 2 or hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise LossplugError(
            f"hidden states {tuple(hidden.shape)} don't fit the weight {tuple(weight.shape)}",
            where=WHERE,
            remedy="Expected hidden states [..., D] and a weight [V, D]",
        )
    if target.shape != hidden.shape[:-1] or target.is_floating_point() or target.dtype == torch.bool:
        raise LossplugError(
            f"targets {tuple(target.shape)} of {target.dtype} don't fit hidden states {tuple(hidden.shape)}",
            where=WHERE,
            remedy="Expected class indices of the shape of the hidden states without their last dimension",
        )
    classes = weight.shape[0]
    for name, value in (("bias", bias), ("class_weight", class_weight)):
        if value is not None and tuple(value.shape) != (classes,):
            raise LossplugError(f"{name} has shape {tuple(value.shape)}, expected [{classes}]", where=WHERE)
    if sample_weight is not None and sample_weight.shape != target.shape:
        raise LossplugError(
            f"sample_weight has shape {tuple(sample_weight.shape)}, expected {tuple(target.shape)}", where=WHERE
        )
    if softcap is not None and not softcap > 0:
        raise LossplugError(f"softcap is {softcap}, allowed is > 0", where=WHERE)
    if tile is not None and tile < 1:
        raise LossplugError(f"tile is {tile}, allowed is >= 1", where=WHERE)
