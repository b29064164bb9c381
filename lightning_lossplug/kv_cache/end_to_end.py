"""Training whatever makes factors against the logits of the dense cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.decode_mode import decode_mode
from lightning_lossplug.kv_cache.plan import KVFactors


def train_end_to_end(
    model: nn.Module,
    texts: Sequence[Tensor],
    groups: list[dict[str, Any]],
    moving: Callable[[int], KVFactors],
    *,
    steps: int,
    prefill: int | None = None,
    report: Callable[[int, float], None] | None = None,
    where: str = "train_end_to_end",
) -> None:
    r"""Minimises :math:`\mathrm{KL}(p_{\mathrm{dense}} \,\|\, p_{\mathrm{codes}})` of the next token by Adam.

    The learning rates fall linearly to 0. The model stays as it is: its weights get no gradient.

    Args:
        model: A causal language model.
        texts: int64 ``[B, T]`` token ids; gone through again if there are more steps.
        groups: Parameter groups with their ``params`` and ``lr``.
        moving: Makes the factors of a step from the parameters.
        steps: Steps.
        prefill: Rows before it see exact tokens; None: the first quarter of a text.
        report: Called with step and loss.
        where: For errors.

    Raises:
        LossplugError: There are no texts, or the loss is not finite.
    """
    if not texts:
        raise LossplugError("there are no batches", where=where)
    device = next(iter(model.parameters())).device
    optimizer = torch.optim.Adam(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    modes = [(module, module.training) for module in model.modules()]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for step in range(steps):
            ids = texts[step % len(texts)].to(device)
            start = max(ids.shape[1] // 4, 1) if prefill is None else prefill
            with torch.no_grad():
                target = model(input_ids=ids, use_cache=False).logits[:, start:].flatten(0, 1).float().log_softmax(-1)
            with torch.enable_grad(), decode_mode(model, moving(step), start):
                found = model(input_ids=ids, use_cache=False).logits[:, start:].flatten(0, 1).float().log_softmax(-1)
                loss = F.kl_div(found, target, log_target=True, reduction="batchmean")
            if not bool(loss.isfinite()):
                raise LossplugError("the loss is not finite", where=where, remedy="Lower lr")
            optimizer.zero_grad()
            loss.backward()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / steps)
            optimizer.step()
            if report is not None:
                report(step, float(loss))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
