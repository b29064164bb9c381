"""Divergences of two language models from their hidden states: neither model's logits are ever held."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_lossplug.distillation.base import DistillationLoss
from lightning_lossplug.distillation.gkd import GKD, MiniLLM
from lightning_lossplug.distillation.kd import KD
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.fused import fused_linear_divergence
from lightning_lossplug.losses.fused.head import output_heads

WHERE = "fused distillation"
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale")


class OutputHead(NamedTuple):
    """The output embedding of a transformers model.

    Args:
        path: Its path in the module it was looked for in.
        layer: The linear layer.
        model: The transformers model that owns it.
        softcap: Of its logits, or None.
    """

    path: str
    layer: nn.Linear
    model: nn.Module
    softcap: float | None


def output_head(module: nn.Module) -> OutputHead:
    """Returns the one output embedding in a module.

    Raises:
        LossplugError: There is none or there are several, it is no plain linear layer, or the model scales its logits.
    """
    heads = output_heads(module)
    if len(heads) != 1:
        raise LossplugError(f"{type(module).__name__} has {len(heads)} output embeddings", where=WHERE)
    ((path, layer),) = heads.items()
    model = next(m for m in module.modules() if getattr(m, "get_output_embeddings", lambda: None)() is layer)
    config = getattr(model, "config", None)
    odd = [name for name in _SCALES if getattr(config, name, None) not in (None, 1, 1.0)]
    if odd:
        raise LossplugError(
            f"{type(model).__name__} multiplies its logits ({odd[0]})", where=WHERE, remedy="Leave fused out"
        )
    return OutputHead(path, layer, model, getattr(config, "final_logit_softcapping", None))


def fused_options(loss: DistillationLoss | None) -> dict[str, Any]:
    """Returns how :func:`~lightning_lossplug.losses.fused.fused_linear_divergence` computes a loss.

    Raises:
        LossplugError: It can't.
    """
    if isinstance(loss, KD) and loss.divergence == "kl":
        kind: dict[str, Any] = {"kind": "kl"}
    elif isinstance(loss, MiniLLM):
        kind = {"kind": "reverse_kl"}
    elif isinstance(loss, GKD):
        kind = {0: {"kind": "kl"}, 1: {"kind": "reverse_kl"}}.get(loss.beta, {"kind": "jsd", "beta": loss.beta})  # type: ignore[call-overload]
    else:
        raise LossplugError(
            f"{type(loss).__name__} has no fused form", where=WHERE, remedy="Use kd, gkd or minillm, or leave fused out"
        )
    return {**kind, "temperature": loss.temperature, "t2_scale": loss.t2_scale}


def fused_loss(
    loss: DistillationLoss, student: Tensor, teacher: Tensor, ours: OutputHead, theirs: OutputHead, mask: Tensor | None
) -> Tensor:
    """Returns the loss of hidden states [B, L, D] and [B, L, D'], mean over the kept tokens [B, L]."""
    return fused_linear_divergence(
        student,
        ours.layer.weight,
        teacher,
        theirs.layer.weight,
        bias=ours.layer.bias,
        teacher_bias=theirs.layer.bias,
        softcap=ours.softcap,
        teacher_softcap=theirs.softcap,
        mask=mask,
        **fused_options(loss),
    )
