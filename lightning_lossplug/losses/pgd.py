"""Projected gradient attack, and the small boxes of SABR around its result."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pgd(
    model: nn.Module,
    y: Tensor,
    lower: Tensor,
    upper: Tensor,
    steps: int = 8,
    step_size: float = 0.25,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns points of the box with a high cross-entropy, by signed gradient steps from a random start.

    The network runs in eval mode meanwhile (its batch statistics don't move) and its modes are put back; no parameter
    gets a gradient.

    Args:
        model: Network from inputs to logits [N, C].
        y: Labels [N].
        lower: Lower bounds of the inputs.
        upper: Upper bounds.
        steps: Number of steps.
        step_size: Step in units of half the width of the box.
        generator: Of the random start; None: torch's global one.
    """
    modes = {module: module.training for module in model.modules()}
    step = step_size * (upper - lower) / 2
    noise = torch.rand(lower.shape, dtype=lower.dtype, device=lower.device, generator=generator)
    point = (lower + noise * (upper - lower)).detach()
    model.eval()
    try:
        with torch.enable_grad():
            for _ in range(steps):
                point.requires_grad_(True)
                loss = F.cross_entropy(model(point), y, reduction="sum")
                (grad,) = torch.autograd.grad(loss, point)
                point = torch.minimum(torch.maximum(point.detach() + step * grad.sign(), lower), upper).detach()
    finally:
        for module, training in modes.items():
            module.training = training
    return point


def sabr_box(adversarial: Tensor, lower: Tensor, upper: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Returns the bounds of a box ``tau`` times as wide, as close around the attack as it fits into the given box.

    Args:
        adversarial: Point of the box.
        lower: Lower bounds of the given box.
        upper: Upper bounds.
        tau: Size of the small box in [0, 1] of the given one.
    """
    center, radius = (lower + upper) / 2, (upper - lower) / 2
    room = (1 - tau) * radius
    middle = torch.minimum(torch.maximum(adversarial, center - room), center + room)
    return middle - tau * radius, middle + tau * radius
