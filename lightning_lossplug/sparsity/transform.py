"""The sparsity stage of a plugged weight: an N:M mask and what becomes of the weights it prunes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lossplug.sparsity.signals import Watched
from lightning_lossplug.sparsity.ste import GradMode, decayed_ste, masked_ste


class NMTransform(Watched):
    """Reads a weight as ``W * [mask + decay (1 - mask)]`` with a straight-through gradient.

    Mask and decay are buffers: they follow the device, are broadcast from rank 0 by DDP, and are in every checkpoint.
    Changing them in place never recompiles; only the passage between dense, decayed and hard does, once each.

    Args:
        weight: The weight, for shape and device.
        grad_mode: ``ste`` (identity) or ``masked`` (the true derivative).
        axis: The reduction axis, along which groups run.
        output_axis: The axis of the outputs.
    """

    stage: ClassVar[str] = "sparsity"

    mask: Tensor
    decay: Tensor

    def __init__(self, weight: Tensor, grad_mode: GradMode = "ste", axis: int = 1, output_axis: int = 0) -> None:
        super().__init__()
        self.grad_mode, self.axis, self.output_axis = grad_mode, axis, output_axis
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        self.register_buffer("decay", torch.ones((), dtype=torch.float32, device=weight.device))
        self.mode = "dense"  # a Python mirror of decay, so that reading a weight never waits for a device

    def set_decay(self, decay: float) -> None:
        """Sets the factor of the pruned weights: 1 is dense, 0 is a hard mask."""
        self.decay.fill_(decay)
        self.mode = "dense" if decay == 1 else "hard" if decay == 0 else "decayed"

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the effective weight."""
        if self.mode == "dense":
            return weight
        if self.mode == "hard" and self.grad_mode == "ste":
            return masked_ste(weight, self.mask)
        return decayed_ste(weight, self.mask, self.decay, self.grad_mode)

    def reset(self) -> None:
        """Goes back to where a new run starts: nothing is pruned."""
        self.mask.fill_(True)

    def check_fold(self) -> str | None:
        """Refuses while the decay is above 0: the folded weight would not be sparse."""
        if self.mode == "decayed":
            return (
                f"the pruned weights are still multiplied by {float(self.decay):.3g}, so the weight is not sparse yet; "
                "finish the schedule before folding"
            )
        return None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.set_decay(float(self.decay))
