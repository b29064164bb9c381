"""Expert balancing of a mixture of experts by a bias that only the choice of experts sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_floating, check_number
from lightning_lossplug.registry import register


def bias_step(bias: Tensor, counts: Tensor, update_rate: float, center: bool = False) -> Tensor:
    r"""Returns the bias after one step, :math:`b_i + u\,\mathrm{sign}(\bar c - c_i)`.

    Args:
        bias: Selection bias [E].
        counts: Tokens that every expert got in the step, over all micro-batches and ranks, [E].
        update_rate: u >= 0.
        center: Subtract the mean of the change, so that the bias doesn't drift as a whole.
    """
    counts = counts.double()
    change = update_rate * torch.sign(counts.mean() - counts)
    return bias + (change - change.mean() if center else change).to(bias)


@register(
    "loss",
    "moe_bias_balancing",
    family="language",
    paper="Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
    arxiv="2408.15664",
    signature="router",
    stateful=True,
)
class MoEBiasBalancing(nn.Module):
    r"""Loss-free load balancing of one router with E experts; not a loss, but used in place of one.

    Call it with the router's scores s [..., E] (after sigmoid or softmax): the k experts of a token are those with the
    largest :math:`s_i + b_i`, their gates are :math:`s_i` alone. After each optimizer step call :meth:`step`:
    :math:`b_i \leftarrow b_i + u\,\mathrm{sign}(\bar c - c_i)` with the counts c of that step. Calls in training mode
    count, over all micro-batches; :meth:`step` sums the counts over ranks. Activation checkpointing counts every token
    twice, which the sign does not notice. The bias is a buffer, kept in float32 whatever the model is cast to (in
    bfloat16 steps of 1e-3 would be lost). Use it to train a mixture of experts without an auxiliary loss
    (arXiv 2408.15664).

    Args:
        num_experts: E.
        k: Experts per token.
        update_rate: u >= 0; 0 freezes the bias.
        center: Keep the mean of the bias where it is.
    """

    bias: Tensor
    counts: Tensor

    def __init__(self, num_experts: int, k: int = 1, update_rate: float = 1e-3, center: bool = False) -> None:
        super().__init__()
        where = "moe_bias_balancing"
        check_number(where, "num_experts", num_experts, least=1)
        self.k = check_number(where, "k", k, least=1, most=num_experts)
        self.update_rate = check_number(where, "update_rate", update_rate, least=0)
        self.center = center
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("counts", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses experts.

        Args:
            scores: Router scores [..., E].

        Returns:
            The gates [..., k] (differentiable) and the experts [..., k].

        Raises:
            LossplugError: Another number of experts.
        """
        check_floating("moe_bias_balancing", scores=scores)
        if scores.ndim == 0 or scores.shape[-1] != self.bias.numel():
            raise LossplugError(
                f"scores {tuple(scores.shape)} for {self.bias.numel()} experts", where="moe_bias_balancing"
            )
        experts = (scores.detach().float() + self.bias).topk(int(self.k), dim=-1).indices
        if self.training:
            chosen = experts.reshape(-1)
            self.counts.scatter_add_(0, chosen, torch.ones_like(chosen))
        return scores.gather(-1, experts), experts

    @torch.no_grad()
    def step(self) -> None:
        """Moves the bias by the counts since the last call and clears them; on all ranks together."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.counts)
        self.bias.copy_(bias_step(self.bias, self.counts, self.update_rate, self.center))
        self.counts.zero_()

    def max_violation(self) -> float:
        """Returns the largest load over the mean load, minus 1, of the counts so far (0: balanced)."""
        total = int(self.counts.sum())
        return 0.0 if total == 0 else float(self.counts.max()) * self.bias.numel() / total - 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoEBiasBalancing:
        kept = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != kept.dtype:
            self.bias = kept.to(self.bias.device)
        return self
