"""The policy gradient of MiniLLM: text of the student, judged token by token by the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lossplug.distillation.base import DistillationLoss
from lightning_lossplug.losses.checks import check_number, check_same_shape, upcast
from lightning_lossplug.registry import register

PAPER = "MiniLLM: Knowledge Distillation of Large Language Models"


def length_normalised_advantages(rewards: Tensor, mask: Tensor, gamma: float = 0.95) -> Tensor:
    r"""Returns :math:`A_t = \frac{1}{n_t}\sum_{k \ge t} \gamma^{k - t} r_k` [N, L] with n_t the tokens left from t on.

    ``gamma`` 0 is the reward over the tokens left.

    Args:
        rewards: Of each token [N, L].
        mask: Tokens that count, bool [N, L].
        gamma: In [0, 1].
    """
    total = rewards.new_zeros(len(rewards))
    left = rewards.new_zeros(len(rewards))
    found = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        held = mask[:, t].to(rewards)
        total = torch.where(mask[:, t], rewards[:, t] + gamma * total, total)
        left = left + held
        found[:, t] = held * total / left.clamp(min=1)
    return found


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Returns values with mean 0 and variance 1 over the mask, 0 elsewhere."""
    held = values[mask]
    if held.numel() < 2:
        return torch.zeros_like(values)
    return ((values - held.mean()) / (held.var(unbiased=False) + 1e-8).sqrt()) * mask


@register(
    "loss", "minillm_policy", family="distillation", paper=PAPER, arxiv="2306.08543", signature="logprobs_teacher"
)
class MiniLLMPolicy(DistillationLoss):
    r"""The long-term part of MiniLLM: clipped policy gradient with :math:`r_t = \log p_T(y_t) - \log p_S(y_t)`.

    Mean over tokens of :math:`-\min(\rho_t A_t, \mathrm{clip}(\rho_t, 1 \pm \epsilon) A_t)`, with
    :math:`\rho_t = w_t\,p_S(y_t)/p_{old}(y_t)`, A the whitened :func:`length_normalised_advantages`. Its other parts
    are ``minillm`` (the exact one-step term) and the task loss on other text.

    Use it with text sampled by the student, or by the mixture of 0.8 student and 0.2 teacher with the importance
    weights w of that.

    Args:
        gamma: Discount in [0, 1].
        clip: :math:`\epsilon` > 0.
        reward_clip: Rewards are cut at plus and minus this.
        whiten: Whether advantages are whitened.
    """

    def __init__(self, gamma: float = 0.95, clip: float = 0.2, reward_clip: float = 100.0, whiten: bool = True) -> None:
        super().__init__()
        self.gamma = check_number("minillm_policy", "gamma", gamma, least=0, most=1)
        self.clip = check_number("minillm_policy", "clip", clip, above=0)
        self.reward_clip = check_number("minillm_policy", "reward_clip", reward_clip, above=0)
        self.whiten = whiten

    def forward(
        self, student: Tensor, old: Tensor, teacher: Tensor, mask: Tensor, importance: Tensor | None = None
    ) -> Tensor:
        """Computes the loss.

        Args:
            student: Log-probabilities of the written tokens [N, L], with gradient.
            old: The same when they were written.
            teacher: The teacher's.
            mask: Tokens that were written, bool [N, L].
            importance: Weights w of a mixed sampler [N, L]; None: 1.

        Raises:
            LossplugError: Shapes that differ.
        """
        check_same_shape("minillm_policy", student=student, old=old, teacher=teacher, mask=mask)
        mask = mask.bool()
        with torch.no_grad():
            rewards = (upcast(teacher) - upcast(old)).clamp(-self.reward_clip, self.reward_clip)
            advantage = length_normalised_advantages(rewards, mask, self.gamma)
            if self.whiten:
                advantage = whitened(advantage, mask)
        ratio = (upcast(student) - upcast(old).detach()).exp()
        if importance is not None:
            ratio = ratio * importance.detach()
        value = torch.minimum(ratio * advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage)
        return -(value * mask).sum() / mask.sum().clamp(min=1)
