"""A shrunk KV cache for the language model that a run trains."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_lossplug.callbacks.sharded import refuse_sharding
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.attention import attention_blocks
from lightning_lossplug.kv_cache.decode_mode import decode_mode
from lightning_lossplug.kv_cache.files import factors_from_state, factors_to_state, save_kv_factors, shared_factors
from lightning_lossplug.kv_cache.fingerprint import fingerprint
from lightning_lossplug.kv_cache.plan import KVFactors, fit_factors
from lightning_lossplug.kv_cache.recorder import MomentRecorder
from lightning_lossplug.kv_cache.settings import KVShrinkSettings
from lightning_lossplug.kv_cache.shrink import record_moments, whole_texts
from lightning_lossplug.losses.checks import check_choice


class KVChannelShrink(Callback):
    """Calibrates the language model of a run for a KV cache of low-rank codes.

    Training itself is not changed, unless ``adapt`` says so.

    Old keys (before rotation) and values are kept as codes of a share of their channels, recent ones exactly
    (after CSKV, arXiv 2409.10593, with closed-form factors). The factors are in every checkpoint from the moment they
    exist, as ``callback.factors``, and in ``output`` after the fit; use them with
    ``ChannelShrunkCache(model, callback.factors)`` in ``generate``.

    Args:
        k_ratio: Share of the key channels that is removed, in [0, 1).
        v_ratio: Share of the value channels that is removed, in [0, 1).
        budget: Instead of the ratios: bytes of an old token over its bytes in the dense cache, in (0, 1].
        bytes_per_token: Instead of the ratios: bytes of an old token over all layers.
        allocation: ``uniform`` (every layer the same share), ``spectrum`` (where channels remove the most error) or
            ``sensitivity`` (where they remove the most loss).
        k_weight: Importance of a relative error of keys over one of values, for ``spectrum``.
        factors: ``cskv``, or orthogonal bases: ``eigen_attention`` or ``matryoshka_kv`` (:class:`KVShrinkSettings`).
        error_budget: For ``eigen_attention``, instead of ratios: relative error of an attention block's output.
        init: ``whitened`` (the optimum on the calibration text), ``asvd`` or ``svd``.
        k_metric: Where ``whitened`` counts the error of keys: ``plain``, or ``gradient``, in the loss.
        v_metric: The same of values: ``plain``, ``output`` (after the output projection) or ``gradient``.
        head_group: Key-value heads that share a code; 0: all heads of a layer.
        alpha: Exponent of the input scale of ``asvd``.
        means: Code the deviation from the mean; see :class:`KVShrinkSettings`.
        k_bits: Bits of a key code's channel: 16 (the model's dtype), 8, 4 or 2.
        v_bits: The same for values.
        window: Recent tokens kept exactly, the current one among them.
        residual: ``sliding``: always as many. ``block`` and ``block_lagged``: coded by blocks of the window.
        sinks: First tokens of every row kept exactly.
        steps: Steps of reconstruction training after ``init``; of end-to-end training for ``matryoshka_kv``.
        lr: Its learning rate.
        train_on: ``moments``, or ``text``: on calibration batches, through the rounding of few-bit codes.
        when: ``start``: passes over the first training batches before the first step. ``training``: the forward passes
            of the training itself, without any extra pass; early ones are of weights that have moved since. ``end``:
            as ``start``, with the final weights.
        calib_batches: Training batches for ``start`` and ``end``, per process.
        adapt: With ``when="start"``: training steps see tokens older than the window through their codes, as decoding
            will, so that the weights learn to live with them. A step's attention costs about twice.
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
        allocation: Literal["uniform", "spectrum", "sensitivity"] = "uniform",
        k_weight: float = 1.0,
        factors: Literal["cskv", "eigen_attention", "matryoshka_kv"] = "cskv",
        error_budget: float | None = None,
        init: Literal["whitened", "asvd", "svd"] = "whitened",
        k_metric: Literal["plain", "gradient"] = "plain",
        v_metric: Literal["plain", "output", "gradient"] = "plain",
        head_group: int = 0,
        alpha: float = 0.5,
        means: bool = False,
        k_bits: int = 16,
        v_bits: int = 16,
        window: int = 32,
        residual: Literal["sliding", "block", "block_lagged"] = "sliding",
        sinks: int = 4,
        steps: int = 0,
        lr: float = 1e-3,
        train_on: Literal["moments", "text"] = "moments",
        when: Literal["start", "training", "end"] = "end",
        calib_batches: int = 64,
        adapt: bool = False,
        output: str | None = None,
    ) -> None:
        self.settings = KVShrinkSettings(
            k_ratio=k_ratio,
            v_ratio=v_ratio,
            budget=budget,
            bytes_per_token=bytes_per_token,
            allocation=allocation,
            k_weight=k_weight,
            factors=factors,
            error_budget=error_budget,
            init=init,
            k_metric=k_metric,
            v_metric=v_metric,
            head_group=head_group,
            alpha=alpha,
            means=means,
            k_bits=k_bits,
            v_bits=v_bits,
            window=window,
            residual=residual,
            sinks=sinks,
            steps=steps,
            lr=lr,
            train_on=train_on,
        )
        check_choice("KVChannelShrink", "when", when, ("start", "training", "end"))
        if when == "training" and self.settings.needs_gradients:
            raise LossplugError(
                "when='training' records no gradients of keys and values",
                where="KVChannelShrink",
                remedy="Use when='end', or neither allocation='sensitivity' nor a metric of gradients",
            )
        if when == "training" and self.settings.looks_at_text:
            raise LossplugError(
                "when='training' keeps no texts, which "
                + (f"factors={factors!r} looks at" if factors != "cskv" else "train_on='text' trains on"),
                where="KVChannelShrink",
                remedy="Use when='end'",
            )
        if adapt and when != "start":
            raise LossplugError(
                f"adapt needs factors before the first step, and when is {when!r}",
                where="KVChannelShrink",
                remedy="Use when='start'",
            )
        if calib_batches < 1:
            raise LossplugError(f"calib_batches is {calib_batches}, allowed is 1 or more", where="KVChannelShrink")
        self.when, self.calib_batches, self.output, self.adapt = when, calib_batches, output, adapt
        self.factors: KVFactors | None = None
        self.recorder: MomentRecorder | None = None
        self._restored: dict[str, Any] | None = None
        self._mode: AbstractContextManager[Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses sharded parameters: calibration calls parts of the model and reads its projections."""
        if stage == "fit":
            refuse_sharding(trainer, "KVChannelShrink", "Calibrate after the training: lossplug shrink-kv")

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

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Puts codes between the model and its old tokens (``adapt``)."""
        if self.adapt and self.factors is not None:
            self._mode = decode_mode(pl_module, self.factors, 1, blocks=attention_blocks(pl_module))
            self._mode.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes them away again."""
        self._leave()

    def _leave(self) -> None:
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)

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
            ids = list(map(_token_ids, batches))
            recorder = record_moments(pl_module, ids, self.settings.sinks, self.settings.needs_gradients)
            self._fit(pl_module, recorder, whole_texts(ids))

    def _fit(self, pl_module: LightningModule, recorder: MomentRecorder, texts: Sequence[Tensor] = ()) -> None:
        recorder.all_reduce()
        # each process has texts of its own
        self.factors = shared_factors(fit_factors(pl_module, recorder, self.settings, texts))
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
        self._leave()
        if self.recorder is not None:
            self.recorder.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an exception, when ``teardown`` is not called."""
        self._leave()
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
