"""The sparsity stage of a plugged weight: an N:M mask and what becomes of the weights it prunes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lossplug.sparsity.bits import pack_rows, unpack_rows
from lightning_lossplug.sparsity.native import for_a_moment
from lightning_lossplug.sparsity.saving import hook_layer, in_pass, note, unhook_layer
from lightning_lossplug.sparsity.signals import Watched
from lightning_lossplug.sparsity.ste import GradMode, attenuate, packed_ste
from lightning_lossplug.surgery.plug import PluggedLayer, transform_of


class NMTransform(Watched):
    """Reads a weight as ``W * [mask + decay (1 - mask)]`` with a straight-through gradient.

    Mask and decay are buffers: they follow the device, are broadcast from rank 0 by DDP, and are in every checkpoint.
    The mask is held as bits, rounded up to bytes per index of the weight's first axis (``pack_rows``). Changing them in
    place never recompiles; only the passage between dense, decayed and hard does, once each.

    Args:
        weight: The weight, for shape and device.
        grad_mode: ``ste`` (identity) or ``masked`` (the true derivative).
        axis: The reduction axis, along which groups run.
        output_axis: The axis of the outputs.
    """

    stage: ClassVar[str] = "sparsity"

    bits: Tensor
    decay: Tensor

    def __init__(self, weight: Tensor, grad_mode: GradMode = "ste", axis: int = 1, output_axis: int = 0) -> None:
        super().__init__()
        self.grad_mode, self.axis, self.output_axis = grad_mode, axis, output_axis
        self.shape = weight.shape
        self.register_buffer("bits", pack_rows(torch.ones_like(weight, dtype=torch.bool)))
        self.mode = "dense"  # a Python mirror of decay, so that reading a weight never waits for a device
        self.register_buffer("decay", torch.ones((), dtype=torch.float32, device=weight.device))

    @property
    def mask(self) -> Tensor:
        """The mask as a bool tensor of the weight's shape, true where an entry is kept: unpacked at each reading."""
        return unpack_rows(self.bits, self.shape)

    def set_bits(self, bits: Tensor) -> None:
        """Takes a mask in bits."""
        self.bits.copy_(bits)

    def set_decay(self, decay: float) -> None:
        """Sets the factor of the pruned weights: 1 is dense, 0 is a hard mask."""
        self.decay.fill_(decay)
        mode = "dense" if decay == 1 else "hard" if decay == 0 else "decayed"
        if mode != self.mode:  # a module's attributes are slow to set
            self.mode = mode

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the effective weight."""
        if self.mode == "dense":
            return weight
        with for_a_moment() if in_pass() else nullcontext():
            value = packed_ste(weight, self.bits, None if self.mode == "hard" else self.decay, self.grad_mode)
        note(value, self.make, weight)
        return value

    def make(self, weight: Tensor) -> Tensor:
        """Returns the value of the effective weight, without a gradient."""
        return attenuate(weight, self.bits, None if self.mode == "hard" else self.decay)

    def plugged(self, layer: nn.Module, parameter: str) -> None:
        """Hooks the layer, so that its product keeps no masked copy of the weight for the backward pass."""
        super().plugged(layer, parameter)
        hook_layer(layer)

    def unplugged(self, layer: nn.Module, parameter: str) -> None:
        """Takes the hooks off with the last masked parameter."""
        super().unplugged(layer, parameter)
        rest = type(layer).plugged_parameters if isinstance(layer, PluggedLayer) else ()
        if not any(isinstance(transform_of(layer, "sparsity", other), NMTransform) for other in rest):
            unhook_layer(layer)

    def reset(self) -> None:
        """Goes back to where a new run starts: nothing is pruned."""
        self.set_bits(pack_rows(torch.ones(self.shape, dtype=torch.bool, device=self.bits.device)))

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
