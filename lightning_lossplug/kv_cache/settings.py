"""What a person says about a shrunk KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.codes import check_bits
from lightning_lossplug.kv_cache.residual import RESIDUALS
from lightning_lossplug.losses.checks import check_choice, check_number

FACTORS = ("cskv", "eigen_attention", "matryoshka_kv")
INITS = ("whitened", "asvd", "svd")
ALLOCATIONS = ("uniform", "spectrum", "sensitivity")
K_METRICS = ("plain", "gradient")
TRAIN_ON = ("moments", "text")
V_METRICS = ("plain", "output", "gradient")


@dataclass(frozen=True)
class KVShrinkSettings:
    """Settings of :func:`fit_factors`, the same in Python, YAML and on the command line.

    Args:
        k_ratio: Share of the key channels that is removed, in [0, 1). 0 keeps everything: the exact cache.
        v_ratio: Share of the value channels that is removed, in [0, 1).
        budget: Instead of the ratios: bytes of an old token over its bytes in the dense cache, in (0, 1].
        bytes_per_token: Instead of the ratios: bytes of an old token over all layers.
        allocation: ``uniform``: every layer the same share. ``spectrum``: channels go where they remove the most
            relative error, under the same number of bytes. ``sensitivity``: where they remove the most loss, as
            gradients of the loss with respect to keys and values tell it.
        k_weight: Importance of an error of keys over one of values, > 0, for ``spectrum`` and ``sensitivity``.
        factors: ``cskv``: ``init`` and what follows it. ``eigen_attention``: an orthogonal basis for the keys of all
            heads and one for the values of each (:func:`eigen_attention`). ``matryoshka_kv``: nested orthogonal bases
            by head, trained for ``steps`` end to end (:func:`matryoshka_kv`).
        error_budget: For ``eigen_attention``, instead of ratios or a budget: relative error of the output of an
            attention block, in (0, 1).
        init: ``whitened`` (the optimum on the calibration text), ``asvd`` or ``svd``.
        k_metric: Where ``whitened`` (and ``spectrum``) counts the error of keys: ``plain`` for the keys themselves,
            ``gradient`` in the loss, to second order.
        v_metric: The same of values: ``plain``, ``output`` after the output projection of the attention block, where
            it is found, or ``gradient``.
        head_group: Key-value heads that share a code, a divisor of all heads (Palu's groups, 1 for a code per head); 0:
            all heads of a layer, which loses least at equal bytes.
        alpha: Exponent of ``asvd``'s input scale, >= 0.
        means: Code the deviation from the mean. It lowers the squared error and can still raise the perplexity: tokens
            that attention rests on have values near 0, which a code through 0 keeps and a code about the mean doesn't.
        k_bits: Bits of a key code's channel: 16 (the model's dtype), 8, 4 or 2.
        v_bits: The same for values.
        window: Recent tokens kept exactly, the current one among them, w >= 1.
        residual: ``sliding``: always the last w. ``block``: those since the last multiple of w, 1 to w, as in CSKV's
            code. ``block_lagged``: w to 2 w - 1, coded by blocks of w (:func:`exact_tokens`).
        sinks: First tokens of every row kept exactly, >= 0, and left out of the calibration: they look like no other
            token and get most of the attention, so their error would count most.
        steps: Steps of reconstruction training after ``init``; 0 for none, which is right for ``whitened``. For
            ``matryoshka_kv`` end-to-end steps on the calibration text; 0 for principal axes.
        lr: Its learning rate.
        train_on: What ``cskv`` trains on: ``moments`` (the same loss, in seconds), or ``text``, as published, which
            trains few-bit codes straight through their rounding (:func:`stream_factors`).
    """

    k_ratio: float = 0.8
    v_ratio: float = 0.8
    budget: float | None = None
    bytes_per_token: float | None = None
    allocation: str = "uniform"
    k_weight: float = 1.0
    factors: str = "cskv"
    error_budget: float | None = None
    init: str = "whitened"
    k_metric: str = "plain"
    v_metric: str = "plain"
    head_group: int = 0
    alpha: float = 0.5
    means: bool = False
    k_bits: int = 16
    v_bits: int = 16
    window: int = 32
    residual: str = "sliding"
    sinks: int = 4
    steps: int = 0
    lr: float = 1e-3
    train_on: str = "moments"

    def __post_init__(self) -> None:
        where = "KVShrinkSettings"
        check_number(where, "k_ratio", self.k_ratio, least=0, below=1)
        check_number(where, "v_ratio", self.v_ratio, least=0, below=1)
        check_number(where, "k_weight", self.k_weight, above=0)
        check_number(where, "alpha", self.alpha, least=0)
        check_number(where, "lr", self.lr, above=0)
        check_choice(where, "factors", self.factors, FACTORS)
        check_choice(where, "init", self.init, INITS)
        check_choice(where, "allocation", self.allocation, ALLOCATIONS)
        check_choice(where, "k_metric", self.k_metric, K_METRICS)
        check_choice(where, "v_metric", self.v_metric, V_METRICS)
        check_choice(where, "train_on", self.train_on, TRAIN_ON)
        check_choice(where, "residual", self.residual, RESIDUALS)
        check_bits(where, self.k_bits)
        check_bits(where, self.v_bits)
        if self.budget is not None:
            check_number(where, "budget", self.budget, above=0, most=1)
        if self.bytes_per_token is not None:
            check_number(where, "bytes_per_token", self.bytes_per_token, above=0)
        if self.budget is not None and self.bytes_per_token is not None:
            raise LossplugError("both budget and bytes_per_token are given", where=where, remedy="Give one of them")
        self._check_factors(where)
        for name, least in (("window", 1), ("sinks", 0), ("steps", 0), ("head_group", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise LossplugError(f"{name} is {value!r}, allowed are whole numbers from {least}", where=where)

    def _check_factors(self, where: str) -> None:
        if self.error_budget is not None:
            check_number(where, "error_budget", self.error_budget, above=0, below=1)
            if self.factors != "eigen_attention" or self.budget is not None or self.bytes_per_token is not None:
                raise LossplugError("error_budget is for factors='eigen_attention' without another budget", where=where)
        if self.factors != "cskv":
            for name in ("init", "k_metric", "v_metric", "head_group", "means", "train_on"):
                if getattr(self, name) != getattr(KVShrinkSettings, name):
                    raise LossplugError(
                        f"{name} is {getattr(self, name)!r}, which is for factors='cskv'",
                        where=where,
                        remedy="Leave it out",
                    )
        if self.factors == "eigen_attention" and self.steps:
            raise LossplugError(
                f"steps is {self.steps}, and eigen_attention trains nothing", where=where, remedy="Leave it out"
            )

    @property
    def looks_at_text(self) -> bool:
        """Whether making the factors needs texts beside the moments."""
        trains = self.factors == "matryoshka_kv" or self.train_on == "text"
        return self.error_budget is not None or (trains and self.steps > 0)

    @property
    def needs_gradients(self) -> bool:
        """Whether calibration has to record gradients."""
        return "gradient" in (self.k_metric, self.v_metric) or self.allocation == "sensitivity"
