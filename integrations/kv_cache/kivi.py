"""A KV cache of few bits for transformers, with keys rounded by channel and values by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache.movable import MovableLayer
from lightning_lossplug.kv_cache.kivi import GROUP, check_residual, dequantize_groups, quantize_groups
from lightning_lossplug.kv_cache.pages import Pages
from lightning_lossplug.kv_cache.store import nbytes


class KIVILayer(MovableLayer):
    """Rounded old tokens and exact recent ones; whatever is rounded is rounded once.

    Args:
        bits: 8, 4 or 2.
        residual: Keys are rounded in blocks of so many tokens; of values the last so many stay exact.
    """

    is_croppable = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, bits: int, residual: int) -> None:
        super().__init__()
        self.bits, self.residual = bits, residual
        self.key_forms, self.value_forms = (Pages(2), Pages(2)), (Pages(2), Pages(2))
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds new tokens; returns all keys and values, old ones as they were rounded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        assert self.keys is not None
        assert self.values is not None
        self.seen += key_states.shape[2]
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        keys, values = self._all()
        self._round()
        return keys, values

    def _round(self) -> None:
        assert self.keys is not None
        assert self.values is not None
        full = self.keys.shape[2] // self.residual * self.residual
        if full:
            self._add(self.key_forms, self.keys[:, :, :full], -2, GROUP)
            self.keys = self.keys[:, :, full:].clone()
        old = self.values.shape[2] - self.residual
        if old > 0:
            self._add(self.value_forms, self.values[:, :, :old], -1, self._value_group())
            self.values = self.values[:, :, old:].clone()

    def _value_group(self) -> int:
        assert self.values is not None
        width = self.values.shape[-1]
        return GROUP if width % GROUP == 0 else width

    def _add(self, forms: tuple[Pages, Pages], states: Tensor, axis: int, group: int) -> None:
        for form, part in zip(forms, quantize_groups(states, self.bits, axis, group), strict=True):
            form.append(part)

    def _all(self) -> tuple[Tensor, Tensor]:
        found = []
        for forms, exact, axis in ((self.key_forms, self.keys, -2), (self.value_forms, self.values, -1)):
            assert exact is not None
            if len(forms[0]):
                packed, ranges = (form.read(0, len(form)) for form in forms)
                old = dequantize_groups(packed, ranges, self.bits, axis, exact.shape[-1], self.dtype)
                exact = torch.cat([old, exact], dim=2)
            found.append(exact)
        return found[0], found[1]

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def _apply(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._apply(function)
        if self.is_initialized:
            for form in (*self.key_forms, *self.value_forms):
                form.apply(function)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back nothing.

        Raises:
            LossplugError: Tokens are to be taken back.
        """
        if tokens_to_remove:
            raise LossplugError("rounded tokens can't be taken back", where="KIVICache.crop")

    def reset(self) -> None:
        """Forgets all tokens."""
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False
        for form in (*self.key_forms, *self.value_forms):
            form.clear()
        self.seen = 0

    def nbytes(self) -> int:
        """Returns the bytes of the live tensors."""
        forms = (*self.key_forms, *self.value_forms)
        return nbytes(self.keys, self.values, *(page for form in forms for page in form.pages))


class KIVICache(Cache):
    """A cache of rotated keys rounded by channel (32 tokens share a range) and values rounded by token.

    Needs no calibration. The prompt is attended to exactly; every later step reads old tokens as they were rounded,
    once. (KIVI, arXiv 2402.02750. The ``QuantizedCache`` of transformers rounds keys and values along one axis and
    rounds its whole history again whenever the residual is full.) Layers with a sliding window keep their own cache.
    It saves memory and not time: every step rebuilds what it reads.

    Args:
        model: The model.
        bits: 8, 4 or 2.
        residual: Keys are rounded in blocks of so many tokens, and of values the last so many stay exact; a multiple of
            32.

    Raises:
        LossplugError: A value out of range.
    """

    def __init__(self, model: nn.Module, bits: int = 4, residual: int = 128) -> None:
        check_residual(bits, residual)
        config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        layers = [
            KIVILayer(bits, residual) if kind == "full_attention" else DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)
            for kind, arguments in zip(*get_layer_types_and_kwargs(config), strict=True)
        ]
        super().__init__(layers=layers)

    def activate_past_recording(self) -> None:
        """Called by assisted decoding, which takes tokens back.

        Raises:
            LossplugError: Always.
        """
        raise LossplugError(
            "assisted decoding takes tokens back, which a cache of rounded tokens can't",
            where="KIVICache",
            remedy="Generate without an assistant, or without this cache",
        )

    def nbytes(self) -> int:
        """Returns the bytes of the live tensors of the rounded layers."""
        return sum(layer.nbytes() for layer in self.layers if isinstance(layer, KIVILayer))
