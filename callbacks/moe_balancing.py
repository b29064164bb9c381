"""Balanced experts without an auxiliary loss, for the routers of transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_lossplug.callbacks.sharded import refuse_deepspeed
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.losses.moe_bias_balancing import bias_step

BIAS = "e_score_correction_bias"


class MoEBalancing(Callback):
    r"""Moves the selection bias of every router after each optimizer step, so that its experts get equal shares.

    :math:`b_i \leftarrow b_i + u\,\mathrm{sign}(\bar c - c_i)` with the tokens :math:`c_i` that expert i got in the
    step, over all micro-batches and processes; gates don't see the bias (loss-free balancing, arXiv 2408.15664). Works
    on routers with a buffer ``e_score_correction_bias`` that return the chosen experts, as DeepSeek-V3, GLM-4-MoE,
    dots.1 and their relatives have in transformers. The bias is saved with the model. Logs the worst router's load of
    its busiest expert over the mean load, minus 1 (``MoEBalancing/max_violation``).

    Args:
        update_rate: u >= 0, per step; 0 freezes the bias.
        center: Keep the mean of the bias where it is.

    Raises:
        LossplugError: At the start of the fit: no such router, or its bias is not float32 (smaller types lose steps of
            this size); at the first step: a router that doesn't return the experts it chose.
    """

    def __init__(self, update_rate: float = 1e-3, center: bool = False) -> None:
        self.update_rate = check_number("MoEBalancing", "update_rate", update_rate, least=0)
        self.center = center
        self.routers: dict[str, nn.Module] = {}
        self.counts: dict[str, Tensor] = {}
        self.max_violation = 0.0
        self._handles: list[RemovableHandle] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the routers, hooks them and the optimizer."""
        refuse_deepspeed(trainer, "MoEBalancing")
        self._remove()
        found = ((name, m) for name, m in pl_module.named_modules() if isinstance(getattr(m, BIAS, None), Tensor))
        self.routers = dict(found)
        if not self.routers:
            raise LossplugError(
                f"no module has a buffer {BIAS}",
                where="MoEBalancing",
                remedy="It balances routers such as DeepSeek-V3's; use the loss moe_bias_balancing in one of your own",
            )
        for name, router in self.routers.items():
            bias = getattr(router, BIAS)
            if bias.dtype != torch.float32:
                raise LossplugError(
                    f"the bias is {bias.dtype}", where=name, remedy="Keep it in float32: router.float() after casting"
                )
            self.counts[name] = torch.zeros(bias.numel(), dtype=torch.int64, device=bias.device)
            self._handles.append(router.register_forward_hook(self._counter(name)))
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._step))
        rank_zero_info(f"MoEBalancing: {len(self.routers)} routers, update_rate={self.update_rate}")

    def _counter(self, name: str) -> Any:
        def count(router: nn.Module, inputs: Any, output: Any) -> None:
            # Activation checkpointing repeats the forward pass of all routers, which the sign does not notice.
            if not router.training:
                return
            parts = output if isinstance(output, (tuple, list)) else (output,)
            chosen = [p for p in parts if isinstance(p, Tensor) and p.dtype in (torch.int64, torch.int32)]
            if len(chosen) != 1:
                raise LossplugError(
                    f"the {type(router).__name__} doesn't return the experts it chose",
                    where=name,
                    remedy="Use the loss moe_bias_balancing inside a router of your own",
                )
            index = chosen[0].detach().reshape(-1).long()
            self.counts[name].scatter_add_(0, index, torch.ones_like(index))

        return count

    @torch.no_grad()
    def _step(self, *_: Any) -> None:
        worst = 0.0
        names = [name for name in self.counts if self.routers[name].training]
        for name in names:
            counts = self.counts[name]
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(counts)
            bias = getattr(self.routers[name], BIAS)
            total = int(counts.sum())
            if total:
                bias.copy_(bias_step(bias, counts, self.update_rate, self.center))
                worst = max(worst, float(counts.max()) * len(counts) / total - 1)
            counts.zero_()
        self.max_violation = worst

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the imbalance of the last step."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            pl_module.log("MoEBalancing/max_violation", self.max_violation, on_step=True, on_epoch=False)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.counts.clear()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the hooks off."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an exception, when ``teardown`` is not called."""
        self._remove()
