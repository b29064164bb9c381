"""Calibration: moments of unrotated keys and of values, taken from ordinary forward passes by hooks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.attention import (
    AttentionBlock,
    Tap,
    attention_blocks,
    block_input,
    counted_tokens,
    join_heads,
    rotary_tables,
)
from lightning_lossplug.kv_cache.moments import Moments


class LayerMoments:
    """What calibration keeps of one layer.

    Args:
        keys: Moments of the keys of all heads of a token, after bias and key norm, before rotation, ``[H_kv * d]``.
        values: Moments of the values.
        inputs: Sum of the absolute inputs of the block, float64 ``[h]``.
        input_count: How many vectors that was.
        gradients: Moments of the gradients of keys and of values, or None (:func:`gradient_moments`).
    """

    def __init__(
        self,
        keys: Moments,
        values: Moments,
        inputs: Tensor,
        input_count: int = 0,
        gradients: tuple[Moments, Moments] | None = None,
    ) -> None:
        self.keys, self.values, self.inputs, self.input_count = keys, values, inputs, input_count
        self.gradients = gradients

    def add_gradients(self, more: tuple[Moments, Moments]) -> None:
        """Adds gradients of some more tokens."""
        if self.gradients is None:
            self.gradients = more
            return
        for mine, new in zip(self.gradients, more, strict=True):
            mine.add(new)

    def input_scale(self) -> Tensor:
        """Returns the mean absolute input of every channel, ``[h]``."""
        return self.inputs / max(self.input_count, 1)

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums."""
        branches = {"keys": self.keys.state_dict(), "values": self.values.state_dict()}
        gradients = None if self.gradients is None else [moments.state_dict() for moments in self.gradients]
        return {**branches, "inputs": self.inputs.cpu(), "input_count": self.input_count, "gradients": gradients}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> LayerMoments:
        """Rebuilds what :meth:`state_dict` returned."""
        keys, values = Moments.from_state(state["keys"]), Moments.from_state(state["values"])
        pair = state.get("gradients")
        gradients = None if pair is None else (Moments.from_state(pair[0]), Moments.from_state(pair[1]))
        return cls(keys, values, state["inputs"].clone(), state["input_count"], gradients)


class MomentRecorder:
    """Records what attention blocks would put into the cache, while the model runs as it does.

    The forward passes may be those of a training: nothing is changed, nothing gets a gradient, no cache is needed.
    Padding is left out where the attention mask says so. With gradient checkpointing tokens count twice, which changes
    no mean.

    Args:
        model: A decoder of transformers, or a module that holds one.
        sinks: First tokens of every row that are left out, since a cache keeps them exactly.

    Raises:
        LossplugError: No block whose cache can be shrunk (:func:`attention_blocks`).
    """

    def __init__(self, model: nn.Module, sinks: int = 0) -> None:
        self.sinks = sinks
        self.blocks = attention_blocks(model)
        self.layers: dict[int, LayerMoments] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def tokens(self) -> int:
        """Tokens recorded so far."""
        return min((layer.keys.count for layer in self.layers.values()), default=0)

    def start(self) -> MomentRecorder:
        """Puts the hooks in place."""
        self.stop()
        for block in self.blocks.values():
            hook = self._hook(block)
            self._handles.append(block.module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def stop(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> MomentRecorder:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def all_reduce(self) -> None:
        """Sums over all processes."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        for layer in self.layers.values():
            layer.keys.all_reduce()
            layer.values.all_reduce()
            for moments in layer.gradients or ():
                moments.all_reduce()
            count = torch.tensor(layer.input_count, device=layer.inputs.device)
            dist.all_reduce(layer.inputs)
            dist.all_reduce(count)
            layer.input_count = int(count)

    def state_dict(self) -> dict[int, Any]:
        """Returns the sums of every layer."""
        return {index: layer.state_dict() for index, layer in self.layers.items()}

    def load_state_dict(self, state: dict[int, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            LossplugError: The sums are of other layers.
        """
        if state and set(state) != set(self.blocks):
            raise LossplugError("the calibration is of a model with other layers", where="checkpoint")
        self.layers = {index: LayerMoments.from_state(layer) for index, layer in state.items()}

    def _hook(self, block: AttentionBlock) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cos, sin = rotary_tables(block, kwargs)
            inputs = block_input(args, kwargs)
            mask = kwargs.get("attention_mask")

            def see(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
                with torch.no_grad():
                    batch, _, tokens, _ = keys.shape
                    valid = counted_tokens(mask, batch, tokens, self.sinks, keys.device)
                    plain = block.rotary.unrotate(keys.detach().float(), cos.float(), sin.float())
                    self._record(block.index, join_heads(plain), join_heads(values.detach()), inputs.detach(), valid)
                return keys, values

            return args, {**kwargs, block.cache: Tap(see, kwargs.get(block.cache))}

        return hook

    def _record(self, index: int, keys: Tensor, values: Tensor, inputs: Tensor, valid: Tensor | None) -> None:
        layer = self.layers.get(index)
        if layer is None:
            layer = LayerMoments(
                Moments(keys.shape[-1]),
                Moments(values.shape[-1]),
                torch.zeros(inputs.shape[-1], dtype=torch.float64),
            )
            self.layers[index] = layer
        layer.keys.update(keys, valid)
        layer.values.update(values, valid)
        rows = inputs.flatten(0, -2) if valid is None else inputs[valid]
        # MPS has no float64; the sum over one batch fits float32
        layer.inputs = layer.inputs + rows.abs().float().sum(0).to(layer.inputs.device).double()
        layer.input_count += len(rows)
