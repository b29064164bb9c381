"""Compressed gradients with error feedback under DDP, by a callback."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel

from lightning_lossplug.callbacks.exchange_base import ExchangeCallback, given
from lightning_lossplug.communication import GradientExchange, compression_hook, create, create_rule
from lightning_lossplug.errors import LossplugError


class CompressedGradients(ExchangeCallback):
    """Sends gradients between DDP processes in few bytes, and feeds back what the compressor dropped.

    The hook is registered with DDP itself, so that it works on gloo too, where Lightning ignores its own
    ``ddp_comm_hook``. It sits between the backward pass and gradient clipping; the optimizer gets the estimate of the
    rule. Convergence is proven for plain SGD; with Adam the rules are a heuristic. Gradient accumulation exchanges the
    accumulated gradient. A step with a gradient that is not finite on some rank moves no state on any rank.

    Memory: ``ef14`` keeps one copy of the compressed parameters in float32 per process, ``ef21`` two, ``ef21_sgdm`` and
    ``econtrol`` three, and twice that during the exchange. The checkpoint holds what all processes share once, and the
    rest of every process, so it grows with their number. A run resumed with as many processes goes on bit by bit; with
    another number, what differs between processes starts again from what they share.

    On one device nothing is exchanged: the callback says so in one line and does nothing.

    Args:
        rule: ``ef21_sgdm``, ``ef21``, ``ef21_w``, ``econtrol``, ``ef14``, or ``none`` (no feedback, to compare with).
        compressor: ``topk``, ``block_topk``, ``randk``, ``scaled_sign``, ``natural``, ``qsgd``, ``lowrank`` or
            ``identity``.
        ratio: Share of the entries that ``topk`` and ``randk`` send, in (0, 1]; None: 0.01.
        block_size: Entries per sent entry of ``block_topk``; None: 128.
        levels: Steps above zero of ``qsgd``; None: 7.
        low_rank: Columns of the factors of ``lowrank``; None: 2.
        beta: Share of the new gradient in ``ef21_sgdm``, in (0, 1]; None: 0.1.
        eta: Share of the error in ``econtrol``, in [0, 1); None: min(0.1, contraction).
        weights: One per process for ``ef21_w``, summing to 1; None: equal.
        init: ``zero``, or ``dense``: the first gradient travels uncompressed; None: the rule's own.
        min_numel: Smaller tensors travel uncompressed.
        seed: Of random compressors.

    Raises:
        LossplugError: Unknown names, values out of range, options that the rule or compressor doesn't have; at the
            start of a fit: FSDP, DeepSpeed or another strategy that isn't DDP, another communication hook, float16,
            manual optimization, or SAM or GradientAdaptiveQAT in the same run.
    """

    def __init__(
        self,
        rule: str = "ef21_sgdm",
        compressor: str = "topk",
        ratio: float | None = None,
        block_size: int | None = None,
        levels: int | None = None,
        low_rank: int | None = None,
        beta: float | None = None,
        eta: float | None = None,
        weights: list[float] | None = None,
        init: Literal["zero", "dense"] | None = None,
        min_numel: int = 1024,
        seed: int = 0,
    ) -> None:
        options = given(ratio=ratio, block_size=block_size, levels=levels, rank=low_rank)
        made = create_rule(rule, **given(beta=beta, eta=eta, weights=weights, init=init))
        super().__init__(made, create(compressor, **options), min_numel, seed)

    def begin(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        wrapped: DistributedDataParallel,
        exchange: GradientExchange,
        saved: dict[str, Any] | None,
    ) -> None:
        """Registers the hook."""
        try:
            wrapped.register_comm_hook(exchange, compression_hook)
        except RuntimeError as error:
            raise LossplugError(f"DDP refused the hook: {error}", where=self.where, remedy="Keep one hook") from error
