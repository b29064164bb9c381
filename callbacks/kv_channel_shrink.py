"""A shrunk KV cache for the language model that a run trains."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.attention import attention_blocks
from lightning_lossplug.kv_cache.files import factors_from_state, factors_to_state, save_kv_factors
from lightning_lossplug.kv_cache.fingerprint import fingerprint
from lightning_lossplug.kv_cache.plan import KVFactors, fit_factors
from lightning_lossplug.kv_cache.recorder import MomentRecorder
from lightning_lossplug.kv_cache.settings import KVShrinkSettings
from lightning_lossplug.kv_cache.shrink import record_moments
from lightning_lossplug.losses.checks import check_choice


class KVChannelShrink(Callback):
    """Calibrates the language model of a run for a KV cache of low-rank codes; training itself is not changed.

    Old keys (before rotation) and values are kept as codes of a share of their channels, recent ones exactly
    (after CSKV, arXiv 2409.10593, with closed-form factors). The factors are in every checkpoint from the moment they
    exist, as ``callback.factors``, and in ``output`` after the fit; use them with
    ``ChannelShrunkCache(model, callback.factors)`` in ``generate``.

    Args:
        k_ratio: Share of the key channels that is removed, in [0, 1).
        v_ratio: Share of the value channels that is removed, in [0, 1).
        budget: Instead of the ratios: bytes of an old token over its bytes in the dense cache, in (0, 1].
        bytes_per_token: Instead of the ratios: bytes of an old token over all layers.
        allocation: ``uniform`` (every layer the same share) or ``spectrum`` (where channels remove the most error).
        k_weight: Importance of a relative error of keys over one of values, for ``spectrum``.
        init: ``whitened`` (the optimum on the calibration text), ``asvd`` or ``svd``.
        v_metric: Where ``whitened`` counts the error of values: ``plain``, or ``output``, after the output projection.
        alpha: Exponent of the input scale of ``asvd``.
        means: Code the deviation from the mean; see :class:`KVShrinkSettings`.
        k_bits: Bits of a key code's channel: 16 (the model's dtype), 8, 4 or 2.
        v_bits: The same for values.
        window: Recent tokens kept exactly, the current one among them.
        sinks: First tokens of every row kept exactly.
        steps: Steps of reconstruction training after ``init``.
        lr: Its learning rate.
        when: ``start``: passes over the first training batches before the first step. ``training``: the forward passes
            of the training itself, without any extra pass; early ones are of weights that have moved since. ``end``:
            as ``start``, with the final weights.
        calib_batches: Training batches for ``start`` and ``end``, per process.
        output: Folder to write the factors to at the end of the fit, that of the exported model say.

    Raises:
        LossplugError: A value out of range; at the start of the fit: a model whose cache can't be shrunk; after
            calibration: too little text.
    """

    def __init__(
        self,
        k_ratio: float = 0.8,
        v_ratio: float = 0.8,
        budget: float | None = None,
        bytes_per_token: float | None = None,
        allocation: Literal["uniform", "spectrum"] = "uniform",
        k_weight: float = 1.0,
        init: Literal["whitened", "asvd", "svd"] = "whitened",
        v_metric: Literal["plain", "output"] = "output",
        alpha: float = 0.5,
        means: bool = False,
        k_bits: int = 16,
        v_bits: int = 16,
        window: int = 32,
        sinks: int = 4,
        steps: int = 0,
        lr: float = 1e-3,
        when: Literal["start", "training", "end"] = "end",
        calib_batches: int = 64,
        output: str | None = None,
    ) -> None:
        self.settings = KVShrinkSettings(
            k_ratio=k_ratio,
            v_ratio=v_ratio,
            budget=budget,
            bytes_per_token=bytes_per_token,
            allocation=allocation,
            k_weight=k_weight,
            init=init,
            v_metric=v_metric,
            alpha=alpha,
            means=means,
            k_bits=k_bits,
            v_bits=v_bits,
            window=window,
            sinks=sinks,
            steps=steps,
            lr=lr,
        )
        check_choice("KVChannelShrink", "when", when, ("start", "training", "end"))
        if calib_batches < 1:
            raise LossplugError(f"calib_batches is {calib_batches}, allowed is 1 or more", where="KVChannelShrink")
        self.when, self.calib_batches, self.output = when, calib_batches, output
        self.factors: KVFactors | None = None
        self.recorder: MomentRecorder | None = None
        self._restored: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the model before anything is computed."""
        attention_blocks(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrates (``start``), or begins to record (``training``); a resumed run goes on."""
        state, self._restored = self._restored, None
        if state is None and trainer.global_step == 0:
            self.factors = None
        if self.when == "training":
            self.recorder = MomentRecorder(pl_module, self.settings.sinks)
            self.recorder.load_state_dict({} if state is None else state.get("moments") or {})
            self.recorder.start()
        elif self.when == "start" and self.factors is None:
            self._calibrate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the factors of ``training`` and ``end``, and writes them."""
        if self.when == "training" and self.recorder is not None:
            self.recorder.stop()
            self._fit(pl_module, self.recorder)
        elif self.when == "end":
            self._calibrate(trainer, pl_module)
        if self.factors is not None:
            # the weights have moved with this callback watching: the factors are still theirs
            now = fingerprint(pl_module, attention_blocks(pl_module))
            self.factors = dataclasses.replace(self.factors, fingerprint=now)
            if self.output is not None and trainer.is_global_zero:
                save_kv_factors(self.factors, self.output)

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = trainer.train_dataloader
        with isolate_rng():  # the order of the training batches stays what it is
            batches = itertools.islice(iter(loader), self.calib_batches)  # type: ignore[arg-type]
            self._fit(pl_module, record_moments(pl_module, map(_token_ids, batches), self.settings.sinks))

    def _fit(self, pl_module: LightningModule, recorder: MomentRecorder) -> None:
        recorder.all_reduce()
        self.factors = fit_factors(pl_module, recorder, self.settings)
        summary = self.factors.summary(next(iter(pl_module.parameters())).element_size())
        rank_zero_info(
            f"KVChannelShrink: {summary['bytes_per_token']} bytes per old token instead of "
            f"{summary['dense_bytes_per_token']} ({summary['share']:.1%}), {len(summary['layers'])} layers, "
            f"calibrated on {summary['tokens']} tokens"
        )

    def state_dict(self) -> dict[str, Any]:
        """The factors, if they exist; the moments while ``training`` records."""
        moments = self.recorder.state_dict() if self.when == "training" and self.recorder is not None else None
        return {"factors": None if self.factors is None else factors_to_state(self.factors), "moments": moments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._restored = state_dict
        self.factors = None if state_dict["factors"] is None else factors_from_state(state_dict["factors"])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the hooks off."""
        if self.recorder is not None:
            self.recorder.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an exception, when ``teardown`` is not called."""
        if self.recorder is not None:
            self.recorder.stop()


def _token_ids(batch: Any) -> dict[str, Tensor | None]:
    """The part of a training batch that calibration needs: a dict with ``input_ids``, or a tensor of token ids."""
    if isinstance(batch, (list, tuple)) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor) and batch.ndim == 2 and batch.dtype in (torch.int64, torch.int32):
        return {"input_ids": batch}
    try:
        return {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")}
    except (TypeError, KeyError, IndexError, AttributeError):
        raise LossplugError(
            f"a training batch of type {type(batch).__name__} has no input_ids",
            where="KVChannelShrink",
            remedy="Use when='training', which needs no batches of its own",
        ) from None
