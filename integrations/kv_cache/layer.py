"""One layer of a shrunk cache: codes of old tokens, exact keys and values of recent ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache.movable import MovableLayer
from lightning_lossplug.integrations.kv_cache.states import Pending, ShrunkStates
from lightning_lossplug.kv_cache.attention import join_heads, split_heads
from lightning_lossplug.kv_cache.factors import Factors
from lightning_lossplug.kv_cache.history import RotaryHistory
from lightning_lossplug.kv_cache.latent import LatentDecoders, LatentTokens, latent_attention
from lightning_lossplug.kv_cache.native import NativeDecoders, native_attention, native_fits, native_or_warn
from lightning_lossplug.kv_cache.plan import LayerFactors
from lightning_lossplug.kv_cache.residual import exact_tokens
from lightning_lossplug.kv_cache.rotary import Rotary
from lightning_lossplug.kv_cache.settings import KVShrinkSettings
from lightning_lossplug.kv_cache.store import CodeStore, nbytes
from lightning_lossplug.kv_cache.triton_attention import attend, has_triton


class ChannelShrunkLayer(MovableLayer):
    """Keys are coded before rotation and rotated again when they are rebuilt; recent tokens stay as they came.

    Args:
        factors: Of this layer.
        rotary: How its keys are rotated.
        settings: Window, residual and bits.
        attention: ``auto``, ``native``, ``triton``, ``latent`` or ``rebuild`` (:class:`ChannelShrunkCache`).
    """

    is_croppable = False  # codes can't be taken back
    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, factors: LayerFactors, rotary: Rotary, settings: KVShrinkSettings, attention: str) -> None:
        super().__init__()
        self.attention = attention
        self.latent: LatentDecoders | None = None
        self.native: NativeDecoders | None = None
        self.triton = False
        self.factors, self.rotary, self.settings = factors, rotary, settings
        self.key_codes = CodeStore(factors.keys.rank, settings.k_bits)
        self.value_codes = CodeStore(factors.values.rank, settings.v_bits)
        self.history: RotaryHistory | None = None
        self.seen = 0
        self.sink_columns: Tensor | None = None  # [batch, sinks], shared by all layers of a cache
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None
        self.announced = 0  # tokens whose tables the hook has handed over
        self.encoders: tuple[Factors, Factors]
        self.decoders: tuple[Factors, Factors]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype and device from the first keys."""
        super().lazy_initialization(key_states, value_states)
        batch, heads, _, width = key_states.shape
        expected, given = self.factors.keys.width, heads * width
        if expected != given:
            raise LossplugError(
                f"the factors are for {expected} key channels, the model has {given}",
                where="ChannelShrunkCache",
                remedy="Load the factors of this model",
            )
        pair = (self.factors.keys, self.factors.values)
        # codes are written in float32 whatever the model's dtype: one token a step, and it is rounded once only
        self.encoders = tuple(f.to(self.device, torch.float32) for f in pair)  # type: ignore[assignment]
        self.decoders = tuple(f.to(self.device, self.dtype) for f in pair)  # type: ignore[assignment]
        self.keys = key_states.new_empty(batch, heads, 0, width)
        self.values = value_states.new_empty(batch, heads, 0, value_states.shape[-1])

    def announce(self, history: RotaryHistory, columns: Tensor | None, tokens: int) -> None:
        """Says where tables and sinks of the next ``tokens`` tokens are; called by the hook before the block runs."""
        self.history, self.sink_columns, self.announced = history, columns, self.seen + tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds new tokens; returns all keys and values, old ones rebuilt from their codes.

        Raises:
            LossplugError: The model's hooks are not in place, or the batch has changed.
        """
        new = key_states.shape[-2]
        if self.history is None or self.announced != self.seen + new:
            raise LossplugError(
                "the cache is used without its hooks, so it doesn't know the rotary tables",
                where="ChannelShrunkCache",
                remedy="Use it with the model it was made for: ChannelShrunkCache(model, factors)",
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self.seen and self.keys.shape[0] != key_states.shape[0]:
            raise LossplugError(
                f"the cache holds {self.keys.shape[0]} rows and is given {key_states.shape[0]}",
                where="ChannelShrunkCache",
                remedy="Make a new one, or call reset()",
            )
        first = self.seen == 0
        self.seen += new
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        if first and self.sink_columns is not None:
            self.sink_keys = self.keys.gather(2, self._sink_index(self.keys))
            self.sink_values = self.values.gather(2, self._sink_index(self.values))
        if not first:
            self._encode(keep=max(self.exact, new))
        if new <= self.exact and len(self.key_codes) and self._can_attend():
            return self._pending()  # nothing is encoded any more before the attention has run
        keys, values = self._all()
        self._encode(keep=self.exact)
        return keys, values

    def _can_attend(self) -> bool:
        """Whether attention can read the codes; found out at the first token after the prompt."""
        if self.attention == "rebuild":
            return False
        if self.latent is None:
            assert self.keys is not None
            assert self.history is not None
            pairing = self.rotary.pairing(self.history, self.keys.shape[-1])
            if pairing is None:
                self.attention = "rebuild"
                return False
            self.latent = LatentDecoders.of(*self.decoders, self.keys.shape[1], pairing)
            if self.attention in ("auto", "native") and self.device.type == "cpu" and native_or_warn() is not None:
                self.native = NativeDecoders(self.latent)
            on_gpu = self.device.type == "cuda" and has_triton()
            self.triton = self.attention == "triton" or (self.attention == "auto" and on_gpu)
        return True

    def _pending(self) -> tuple[Tensor, Tensor]:
        """Stand-ins for all keys and values."""
        assert self.keys is not None
        assert self.values is not None
        assert self.history is not None
        assert self.latent is not None
        sinks = None
        if self.sink_columns is not None and self.sink_keys is not None and self.sink_values is not None:
            sinks = (self.sink_columns, self.sink_keys, self.sink_values)
        tokens = LatentTokens(
            self.latent, self.key_codes, self.value_codes, self.history, self.keys, self.values, sinks
        )
        pending = Pending(partial(self._attend, tokens), self._all)
        shape = (*self.keys.shape[:2], self.seen)
        keys = ShrunkStates(pending, 0, (*shape, self.keys.shape[-1]), self.keys)
        values = ShrunkStates(pending, 1, (*shape, self.values.shape[-1]), self.values)
        return keys, values

    def _attend(self, tokens: LatentTokens, query: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        if self.triton:
            return attend(query, tokens, scale, mask)
        library = None if self.native is None or not native_fits(tokens) else native_or_warn()
        if library is None or self.native is None:
            return latent_attention(query, tokens, scale, mask)
        return native_attention(library, query, tokens, self.native, scale, mask)

    @property
    def exact(self) -> int:
        """Last tokens that are kept exactly."""
        return exact_tokens(self.seen, self.settings.window, self.settings.residual)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def _encode(self, keep: int) -> None:
        """Turns all exact tokens but the last ``keep`` into codes."""
        assert self.keys is not None
        assert self.values is not None
        assert self.history is not None
        old = self.keys.shape[-2] - keep
        if old <= 0:
            return
        start = len(self.key_codes)
        exact = self.keys[:, :, :old].float()
        if self.latent is not None and self.latent.pairing.in_halves:
            turned = self.latent.pairing.turn(exact, *self.history.inverse(start, start + old, compact=True))
        else:
            turned = self.rotary.rotate(exact, *self.history.inverse(start, start + old, compact=False))
        plain = join_heads(turned)
        keys, values = self.encoders
        self.key_codes.append(keys.code(plain).to(self.dtype))
        self.value_codes.append(values.code(join_heads(self.values[:, :, :old]).float()).to(self.dtype))
        # a slice would keep the memory of the whole
        self.keys = self.keys[:, :, old:].clone()
        self.values = self.values[:, :, old:].clone()

    def _all(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        assert self.history is not None
        old, heads = len(self.key_codes), self.keys.shape[1]
        if not old:
            return self.keys, self.values
        k, v = self.decoders
        plain = split_heads(k.rebuild(self.key_codes.read(self.dtype)), heads)
        rebuilt = self.rotary.rotate(plain, *self.history.read(0, old))
        values = split_heads(v.rebuild(self.value_codes.read(self.dtype)), heads)
        keys = torch.cat([rebuilt.to(self.dtype), self.keys], dim=-2)
        values = torch.cat([values, self.values], dim=-2)
        if self.sink_keys is not None and self.sink_values is not None:
            keys.scatter_(2, self._sink_index(keys), self.sink_keys)
            values.scatter_(2, self._sink_index(values), self.sink_values)
        return keys, values

    def _sink_index(self, states: Tensor) -> Tensor:
        assert self.sink_columns is not None
        return self.sink_columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])

    def _apply(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._apply(function)
        if self.is_initialized:
            self.key_codes.apply(function)
            self.value_codes.apply(function)
            if self.sink_keys is not None and self.sink_values is not None:
                self.sink_keys, self.sink_values = function(self.sink_keys), function(self.sink_values)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens, as long as they are exact.

        Args:
            tokens_to_remove: Negative, as transformers says it.

        Raises:
            LossplugError: Some of them are coded already.
        """
        count = abs(tokens_to_remove)
        if count == 0 or not self.is_initialized:
            return
        assert self.keys is not None
        assert self.values is not None
        assert self.history is not None
        if count > self.keys.shape[-2] or tokens_to_remove > 0:
            raise LossplugError(
                f"{count} tokens can't be taken back, {self.keys.shape[-2]} are kept exactly",
                where="ChannelShrunkCache.crop",
                remedy="Use a larger window, or another cache for this kind of decoding",
            )
        self.keys, self.values = self.keys[:, :, :-count].clone(), self.values[:, :, :-count].clone()
        self.seen -= count
        self.announced = self.seen

    def reset(self) -> None:
        """Forgets all tokens."""
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False
        self.latent = self.native = None
        self.triton = False
        self.key_codes.clear()
        self.value_codes.clear()
        self.history = None
        self.sink_columns = self.sink_keys = self.sink_values = None
        self.seen = self.announced = 0

    def nbytes(self) -> int:
        """Returns the bytes of the live tensors, rotary tables, sink columns and factors not included."""
        exact = (self.keys, self.values, self.sink_keys, self.sink_values)
        return nbytes(*exact, *self.key_codes.parts, *self.value_codes.parts)
