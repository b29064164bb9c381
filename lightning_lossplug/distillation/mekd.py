"""A teacher that can only be asked: matching what a generator makes of both answers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lossplug.distillation.base import LogitLoss, check_temperature
from lightning_lossplug.distillation.divergences import forward_kl
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import register


@register(
    "loss",
    "mekd",
    family="distillation",
    paper="MEKD: Aligning Logits Generatively for Principled Black-Box Knowledge Distillation",
    signature="logits_teacher",
)
class MEKD(LogitLoss):
    r"""Mapping emulation: :math:`w_f\,\overline{|G(s/g_t) - G(t/g_t)|} + w_{kl}\,\tau\,KL(p^\tau \| q^\tau)`.

    G is a frozen generator that maps a vector of C numbers to an image; it was trained so that the teacher's answers
    to its images spread over the classes. The teacher is only called: ``t`` are its logits, or one-hot vectors. The
    gradient goes through G, which is put in eval mode. The factor is :math:`\tau`, not its square, as released.
    Training the generator is not part of it (in the release an adversarial loss with an information term that has a
    bug; the intended form was not found).

    Use it where only a teacher's answers can be had, and no data.

    Args:
        generator: G: [N, C] to images; None: the logit part alone.
        temperature: :math:`\tau` > 0.
        generator_temperature: :math:`g_t` > 0.
        w_f: Weight >= 0 of the images.
        w_kl: Weight >= 0 of the divergence.
        reduction: ``batchmean`` or ``none``.
    """

    def __init__(
        self,
        generator: nn.Module | Callable[[Tensor], Tensor] | None = None,
        temperature: float = 5.0,
        generator_temperature: float = 5.0,
        w_f: float = 1.0,
        w_kl: float = 1.0,
        reduction: str = "batchmean",
    ) -> None:
        super().__init__(reduction)
        self.temperature = check_temperature("mekd", temperature)
        self.generator_temperature = check_temperature("mekd", generator_temperature, "generator_temperature")
        self.w_f = check_number("mekd", "w_f", w_f, least=0)
        self.w_kl = check_number("mekd", "w_kl", w_kl, least=0)
        # in a tuple: not a sub-module, so that it is neither saved with the loss nor trained by it
        self._generator = (generator,)

    def rows(self, z_s: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Row losses."""
        value = self.w_kl * self.temperature * forward_kl(z_s, z_t, self.temperature)
        (generator,) = self._generator
        if generator is None or self.w_f == 0:
            return value
        if isinstance(generator, nn.Module):
            if any(p.requires_grad for p in generator.parameters()):
                raise LossplugError(
                    "the generator is not frozen", where="mekd", remedy="generator.requires_grad_(False)"
                )
            generator.eval()
        ours = generator(z_s / self.generator_temperature)
        with torch.no_grad():
            theirs = generator(z_t / self.generator_temperature)
        return value + self.w_f * F.l1_loss(ours, theirs, reduction="none").flatten(1).mean(dim=1)
