"""Local steps between compressed messages, by a callback: SCALLION and SCAFCOM."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lossplug.callbacks.exchange_base import ExchangeCallback, given
from lightning_lossplug.communication import GradientExchange, create
from lightning_lossplug.communication.local_updates import LocalUpdate
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number
from lightning_lossplug.registry import registry


class LocalUpdates(ExchangeCallback):
    r"""Every DDP process takes ``local_steps`` optimizer steps of its own, then sends one compressed message.

    DDP's own exchange of gradients is switched off. Local gradients are corrected by what the processes know of each
    other, so that data that differ between them do no harm; see :mod:`lightning_lossplug.communication.local_updates`.
    A round ends after ``local_steps`` steps and with the last batch of an epoch, so that what is validated and saved
    there is the common model; K is then the number of steps taken, and lr K the sum of their learning rates. Batch-norm
    statistics are averaged (variances by second moments) at the end of a round.

    With ``participation`` below 1 the processes that aren't drawn take their steps too, and throw them away. A round in
    which a weight became infinite or NaN on some process is taken back on all of them. Needs one ``torch.optim.SGD``
    without momentum and no gradient clipping. Checkpoints, bit-identical resuming and one device are as for
    :class:`CompressedGradients`; a checkpoint inside a round holds the weights of every process.

    Args:
        method: ``scafcom`` (contractive compressors) or ``scallion`` (unbiased ones).
        compressor: ``topk``, ``block_topk``, ``randk``, ``scaled_sign``, ``natural``, ``qsgd``, ``lowrank`` or
            ``identity``; ``scallion`` takes ``randk``, ``natural`` and ``qsgd`` in their unbiased form.
        local_steps: Optimizer steps between two messages, >= 1.
        lr_global: Factor of the step of the common model, > 0.
        participation: Share of the processes that report in a round, in (0, 1].
        alpha: Damping of ``scallion``, in (0, 1]; None: 0.1.
        beta: Share of the new gradient in ``scafcom``, in (0, 1]; None: 0.2.
        ratio: Share of the entries that ``topk`` and ``randk`` send; None: 0.01.
        block_size: Entries per sent entry of ``block_topk``; None: 128.
        levels: Steps above zero of ``qsgd``; None: 7.
        low_rank: Columns of the factors of ``lowrank``; None: 2.
        min_numel: Smaller tensors travel uncompressed.
        seed: Of random compressors and of who reports.

    Raises:
        LossplugError: Unknown names, values out of range, a compressor that doesn't suit the method; at the start of a
            fit what :class:`CompressedGradients` refuses, another optimizer, or gradient clipping.
    """

    rule: LocalUpdate

    def __init__(
        self,
        method: str = "scafcom",
        compressor: str = "topk",
        local_steps: int = 10,
        lr_global: float = 1.0,
        participation: float = 1.0,
        alpha: float | None = None,
        beta: float | None = None,
        ratio: float | None = None,
        block_size: int | None = None,
        levels: int | None = None,
        low_rank: int | None = None,
        min_numel: int = 1024,
        seed: int = 0,
    ) -> None:
        rule = registry.create(
            "local_update", method, participation=participation, seed=seed, **given(alpha=alpha, beta=beta)
        )
        options = given(ratio=ratio, block_size=block_size, levels=levels, rank=low_rank)
        if method == "scallion" and compressor in ("randk", "natural", "qsgd"):
            options["unbiased"] = True
        super().__init__(rule, create(compressor, **options), min_numel, seed)
        self.local_steps = int(check_number(self.where, "local_steps", local_steps, least=1))
        self.lr_global = check_number(self.where, "lr_global", lr_global, above=0)
        self.steps = 0  # of this round
        self._start: dict[str, Tensor] = {}
        self._rates: dict[str, float] = {}  # summed learning rates of this round
        self._handle: RemovableHandle | None = None

    def begin(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        wrapped: DistributedDataParallel,
        exchange: GradientExchange,
        saved: dict[str, Any] | None,
    ) -> None:
        """Switches DDP's exchange off, and goes back into the round of the checkpoint."""
        optimizer = self._optimizer(trainer)
        wrapped.require_backward_grad_sync = False
        parameters = _trained(pl_module)
        self.steps, self._rates = 0, dict.fromkeys(parameters, 0.0)
        open_round = (saved or {}).get("round")
        if saved is not None and open_round is not None:
            same = saved["ranks"] == dist.get_world_size()  # else the round starts again
            if same:
                self.steps, self._rates = open_round["steps"], dict(open_round["rates"])
            with torch.no_grad():
                for name, start in open_round["start"].items():
                    parameters[name].copy_(open_round["own"][name][dist.get_rank()] if same else start)
            self._start = {name: value.to(parameters[name]) for name, value in open_round["start"].items()}
        else:
            self._start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._handle = optimizer.register_step_post_hook(self._after_step(parameters))

    def _optimizer(self, trainer: Trainer) -> Optimizer:
        optimizer = trainer.optimizers[0]
        plain = type(optimizer) is SGD and all(group["momentum"] == 0 for group in optimizer.param_groups)
        if len(trainer.optimizers) != 1 or not plain:
            raise LossplugError(
                "the mean gradient of a round is read off the weights, which takes plain SGD",
                where=self.where,
                remedy="Use one torch.optim.SGD with momentum=0",
            )
        if trainer.gradient_clip_val:
            raise LossplugError(
                "gradient clipping would change the corrected gradients",
                where=self.where,
                remedy="Leave gradient_clip_val out",
            )
        return optimizer

    def _after_step(self, parameters: dict[str, nn.Parameter]) -> Any:
        names = {id(parameter): name for name, parameter in parameters.items()}

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.steps += 1
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) in names:
                        self._rates[names[id(parameter)]] += float(group["lr"])

        return after

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Corrects the local gradients."""
        if self._alone or self.exchange is None:
            return
        for name, parameter in _trained(pl_module).items():
            if parameter.grad is not None:
                parameter.grad += self.rule.correction(self.exchange.states.get(name))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends a round when it is due."""
        last = batch_idx + 1 == trainer.num_training_batches
        if not self._alone and self.steps and (self.steps >= self.local_steps or last):
            self._end_round(pl_module)
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @torch.no_grad()
    def _end_round(self, pl_module: LightningModule) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        parameters, found = _trained(pl_module), {}
        for name, parameter in parameters.items():
            rate = self._rates[name]
            drift = (self._start[name] - parameter) / rate if rate else torch.zeros_like(parameter)
            found[name] = drift - self.rule.correction(exchange.states.get(name))
        skipped = exchange.skipped
        exchange.exchange(found)
        exchange.commit()
        for name, parameter in parameters.items():
            if exchange.skipped == skipped:
                self._start[name] -= self.lr_global * self._rates[name] * found[name]
            parameter.copy_(self._start[name])
        _average_statistics(pl_module)
        self.steps, self._rates = 0, dict.fromkeys(parameters, 0.0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a round that ``max_steps`` cut short, and says what was sent."""
        if self.steps and not self._alone:
            self._end_round(pl_module)
        super().on_train_end(trainer, pl_module)

    def gather(self, pl_module: LightningModule) -> dict[str, Any]:
        """Adds the weights of all processes, if the checkpoint falls into a round."""
        state = super().gather(pl_module)
        if self.steps:
            own: dict[str, list[Tensor]] = {}
            for name, parameter in _trained(pl_module).items():
                mine = parameter.detach().contiguous()
                into = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
                dist.gather(mine, into, 0)
                own[name] = [tensor.cpu() for tensor in into or []]
            start = {name: tensor.cpu().clone() for name, tensor in self._start.items()}
            state["round"] = {"steps": self.steps, "rates": dict(self._rates), "start": start, "own": own}
        return state

    def _clean_up(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the hook off."""
        self._clean_up()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an exception, when ``teardown`` is not called."""
        self._clean_up()


def _trained(pl_module: LightningModule) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}


def _average_statistics(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
            both = torch.stack([norm.running_mean, norm.running_var + norm.running_mean.square()])
            dist.all_reduce(both)
            mean, second = both / dist.get_world_size()
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((second - mean.square()).clamp_min(0))
