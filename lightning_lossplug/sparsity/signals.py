"""What a score sees of a layer in training: how large its inputs and the gradients of its weights are.

Sums of squares are collected between optimizer steps, added over ranks once per step, and merged into a running mean
that is a buffer of the model: the same on every rank, and in every checkpoint. The first steps are averaged evenly;
once ``1 / steps`` is below ``1 - ema`` the mean is an exponential one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lossplug.surgery.plug import WeightTransform, transform_of


class Watched(WeightTransform):
    """A weight transform that can watch the inputs and the gradient of its layer."""

    input_square: Tensor
    input_steps: Tensor
    grad_square: Tensor
    grad_steps: Tensor
    _collected: Tensor  # sums of squares since the last step and, last, the number of rows they are over

    def __init__(self) -> None:
        super().__init__()
        self.watched: tuple[str, ...] = ()
        # Read by the hook; Python values, so that a compiled layer is specialised on them.
        self.gathering = False
        self.calibrating = False  # else only passes that build a graph count: validation doesn't

    def watch(self, signals: Sequence[str], layer: nn.Module, weight: Tensor, axis: int) -> None:
        """Adds the buffers of some of :data:`~lightning_lossplug.sparsity.scores.SIGNALS`."""
        self.watched = tuple(signals)
        if "input_norm" in signals:
            convolution = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
            self._spatial = weight.ndim - 2 if convolution else 0
            self._groups = int(layer.groups) if convolution else 1  # type: ignore[arg-type]
            self._axis = axis
            width = weight.shape[axis] * self._groups
            self.register_buffer("input_square", torch.zeros(width, device=weight.device))
            self.register_buffer("input_steps", torch.zeros((), dtype=torch.int64, device=weight.device))
            # Not a buffer: DDP would overwrite it with what rank 0 has collected.
            self._collected = torch.zeros(width + 1, device=weight.device)
        if "grad_norm" in signals:
            self.register_buffer("grad_square", torch.zeros_like(weight, dtype=torch.float32, requires_grad=False))
            self.register_buffer("grad_steps", torch.zeros((), dtype=torch.int64, device=weight.device))

    def plugged(self, layer: nn.Module, parameter: str) -> None:
        """Hooks the layer's input."""
        if "input_norm" in self.watched:
            layer.register_forward_pre_hook(_see_input)

    def unplugged(self, layer: nn.Module, parameter: str) -> None:
        """Takes the hook off, found by its function since a copied layer has a copied hook."""
        for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _see_input]:
            del layer._forward_pre_hooks[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if "input_norm" in self.watched:
            self._collected = fn(self._collected).float()
            self.input_square = self.input_square.float()
        if "grad_norm" in self.watched:
            self.grad_square = self.grad_square.float()
        return self

    @torch.no_grad()
    def see_input(self, values: Tensor) -> None:
        """Adds the squares of a batch of inputs."""
        values = values.detach().movedim(values.ndim - 1 - self._spatial, -1).reshape(-1, len(self.input_square))
        self._collected[:-1] += torch.linalg.vector_norm(values, dim=0, dtype=torch.float32).square()
        self._collected[-1:] += len(values)

    @torch.no_grad()
    def see_gradient(self, grad: Tensor, ema: float) -> None:
        """Merges the gradient of one optimizer step, the same on every rank; one with an overflow is left out."""
        square = grad.float().square()
        _merge(self.grad_square, self.grad_steps, square, square.isfinite().all(), ema)

    def reset_signals(self) -> None:
        """Forgets everything seen."""
        for signal, (square, steps) in {
            "input_norm": ("input_square", "input_steps"),
            "grad_norm": ("grad_square", "grad_steps"),
        }.items():
            if signal in self.watched:
                getattr(self, square).zero_()
                getattr(self, steps).zero_()
        if "input_norm" in self.watched:
            self._collected.zero_()

    def steps_seen(self) -> int:
        """Returns over how many steps the rarest signal was gathered (waits for the device)."""
        counts = {"input_norm": "input_steps", "grad_norm": "grad_steps"}
        return min(int(getattr(self, counts[signal])) for signal in self.watched)

    def signals(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns the watched signals, shaped to broadcast against the weight."""
        found = {}
        if "input_norm" in self.watched:
            norm = self.input_square.sqrt()
            if self._groups > 1:  # [groups, in per group] -> a row per output channel
                rows = norm.view(self._groups, -1).repeat_interleave(weight.shape[0] // self._groups, 0)
                found["input_norm"] = rows.view(*rows.shape, *[1] * (weight.ndim - 2))
            else:
                found["input_norm"] = norm.view([-1 if place == self._axis else 1 for place in range(weight.ndim)])
        if "grad_norm" in self.watched:
            found["grad_norm"] = self.grad_square.sqrt()
        return found


def _see_input(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """The forward pre-hook; a function, so that the layer can be pickled and a copy finds its own transform."""
    transform = transform_of(layer, "sparsity")
    if not isinstance(transform, Watched) or not transform.gathering or not inputs:
        return
    if transform.calibrating or torch.is_grad_enabled():
        transform.see_input(inputs[0])


@torch.no_grad()
def merge_inputs(transforms: Sequence[Watched], ema: float) -> None:
    """Adds what the layers saw since the last step over all ranks, and merges it into their running means.

    Every rank has to call it at the same step; it is one collective for all layers.
    """
    ours = [t for t in transforms if "input_norm" in t.watched]
    if not ours:
        return
    together = torch.cat([t._collected for t in ours])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(together)
    for transform, sums in zip(ours, together.split([len(t._collected) for t in ours]), strict=True):
        mean = sums[:-1] / sums[-1].clamp_min(1)
        usable = (sums[-1] > 0) & mean.isfinite().all()
        _merge(transform.input_square, transform.input_steps, mean, usable, ema)
        transform._collected.zero_()


def _merge(average: Tensor, steps: Tensor, value: Tensor, usable: Tensor, ema: float) -> None:
    """Moves a running mean by one step, without waiting for the device."""
    share = torch.clamp(1 / (steps + 1).float(), min=1 - ema) * usable
    average.copy_(torch.where(usable, average + (value - average) * share, average))
    steps.add_(usable)
