"""From calibration moments to the factors of every layer, under ratios or a budget of bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.allocation import allocate_ranks, rank_of_ratio
from lightning_lossplug.kv_cache.attention import AttentionBlock, attention_blocks, output_metric, projection_weight
from lightning_lossplug.kv_cache.codes import code_bytes
from lightning_lossplug.kv_cache.factors import (
    Factors,
    asvd_init,
    balanced,
    encoder_of,
    metric_root,
    svd_init,
    whitened_init,
)
from lightning_lossplug.kv_cache.fingerprint import check_fingerprint, fingerprint
from lightning_lossplug.kv_cache.moments import Moments
from lightning_lossplug.kv_cache.recorder import LayerMoments, MomentRecorder
from lightning_lossplug.kv_cache.settings import KVShrinkSettings
from lightning_lossplug.kv_cache.size import BranchSize, dense_token_bytes, shrunk_token_bytes
from lightning_lossplug.kv_cache.training import train_factors

TOKENS_PER_CHANNEL = 2  # a covariance of c channels from fewer than this times c tokens mostly shows the sample


@dataclass(frozen=True)
class LayerFactors:
    """Factors of one layer.

    Args:
        keys: Of the unrotated keys of all heads of a token.
        values: Of the values.
        k_error: Relative squared error of keys on the calibration text.
        v_error: The same of values.
    """

    keys: Factors
    values: Factors
    k_error: float
    v_error: float


@dataclass(frozen=True)
class KVFactors:
    """Everything a shrunk cache needs to know of a model.

    Args:
        layers: Factors of every shrunk layer, float32, on the CPU.
        settings: What they were made with.
        fingerprint: Of the model they were made for.
        tokens: Calibration tokens.
    """

    layers: dict[int, LayerFactors]
    settings: KVShrinkSettings
    fingerprint: dict[str, Any]
    tokens: int

    def branches(self) -> list[BranchSize]:
        """Returns widths, ranks and bits of every layer's keys and values."""
        bits = (self.settings.k_bits, self.settings.v_bits)
        return [
            BranchSize(factors.width, factors.rank, b)
            for layer in self.layers.values()
            for factors, b in zip((layer.keys, layer.values), bits, strict=True)
        ]

    def check(self, model: nn.Module) -> dict[int, AttentionBlock]:
        """Checks that the factors were made for a model; returns its attention blocks.

        Raises:
            LossplugError: They were not.
        """
        blocks = attention_blocks(model)
        check_fingerprint(self.fingerprint, model, blocks)
        return blocks

    def summary(self, element_bytes: int) -> dict[str, Any]:
        """Returns ranks, errors and bytes per old token, for tables and files."""
        branches = self.branches()
        dense, shrunk = dense_token_bytes(branches, element_bytes), shrunk_token_bytes(branches, element_bytes)
        return {
            "tokens": self.tokens,
            "dense_bytes_per_token": dense,
            "bytes_per_token": shrunk,
            "share": shrunk / dense,
            "window": self.settings.window,
            "layers": {
                str(index): {
                    "k_width": layer.keys.width,
                    "k_rank": layer.keys.rank,
                    "v_width": layer.values.width,
                    "v_rank": layer.values.rank,
                    "k_error": layer.k_error,
                    "v_error": layer.v_error,
                }
                for index, layer in self.layers.items()
            },
        }


def fit_factors(
    model: nn.Module, recorder: MomentRecorder, settings: KVShrinkSettings, texts: Sequence[Tensor] = ()
) -> KVFactors:
    """Turns calibration moments into factors.

    Args:
        model: The model that was calibrated.
        recorder: Its moments.
        settings: What is wanted.
        texts: int64 ``[B, T]`` token ids without padding, where ``settings.looks_at_text``.

    Raises:
        LossplugError: Too few calibration tokens (the message says how many are needed), a rank of 0, a budget that is
            too small, an ``init`` that the model has no weights for, or no texts where they are needed.
    """
    widest = max((max(m.keys.width, m.values.width) for m in recorder.layers.values()), default=1)
    needed = TOKENS_PER_CHANNEL * widest
    if recorder.tokens < needed:
        raise LossplugError(
            f"the calibration text has {recorder.tokens} tokens, at least {needed} are needed for {widest} channels",
            where="calibration",
            remedy="Give more text",
        )
    if settings.looks_at_text and not texts:
        raise LossplugError(
            "making these factors looks at texts, and there are none",
            where="fit_factors",
            remedy="fit_factors(model, recorder, settings, texts)",
        )
    if settings.factors != "cskv":
        from lightning_lossplug.kv_cache.bases import eigen_attention, matryoshka_kv

        way = eigen_attention if settings.factors == "eigen_attention" else matryoshka_kv
        return way(model, recorder, settings, texts)
    started = _start_factors(model, recorder, settings)
    if not settings.steps or settings.train_on == "moments":
        return started
    from lightning_lossplug.kv_cache.streamed import stream_factors

    trained = stream_factors(model, started, texts, steps=settings.steps, lr=settings.lr)
    for index, layer in trained.layers.items():
        moments = recorder.layers[index]
        k_error, v_error = (
            relative_error(m.second(centred=settings.means).cpu(), f)
            for m, f in ((moments.keys, layer.keys), (moments.values, layer.values))
        )
        trained.layers[index] = dataclasses.replace(layer, k_error=k_error, v_error=v_error)
    return trained


def _start_factors(model: nn.Module, recorder: MomentRecorder, settings: KVShrinkSettings) -> KVFactors:
    layers = {index: recorder.layers[index] for index in sorted(recorder.layers)}
    metrics = [m for index, layer in layers.items() for m in _metrics(recorder.blocks[index], layer, settings)]
    ranks = layer_ranks(model, recorder, settings, metrics)
    made: dict[int, LayerFactors] = {}
    for position, (index, layer) in enumerate(layers.items()):
        block = recorder.blocks[index]
        k_rank, v_rank = ranks[index]
        keys, k_error = _factors(layer.keys, metrics[2 * position], k_rank, settings, layer, block, "k_proj")
        values, v_error = _factors(layer.values, metrics[2 * position + 1], v_rank, settings, layer, block, "v_proj")
        made[index] = LayerFactors(keys, values, k_error, v_error)
    return KVFactors(made, settings, fingerprint(model, recorder.blocks), recorder.tokens)


def layer_ranks(
    model: nn.Module,
    recorder: MomentRecorder,
    settings: KVShrinkSettings,
    metrics: list[Tensor | None] | None = None,
) -> dict[int, tuple[int, int]]:
    """Returns how many channels the keys and the values of every layer get.

    Args:
        model: The model.
        recorder: Its moments.
        settings: Ratios, budgets, allocation.
        metrics: What an error costs, of keys and values by turns; None for the identity.

    Raises:
        LossplugError: A rank of 0, or a budget that is too small.
    """
    layers = {index: recorder.layers[index] for index in sorted(recorder.layers)}
    branches = [moments for layer in layers.values() for moments in (layer.keys, layer.values)]
    costs: list[Tensor | None] = [None] * len(branches) if metrics is None else list(metrics)
    if settings.allocation == "sensitivity":
        costs = [_gradient(layer, which) for layer in layers.values() for which in (0, 1)]
    element_bytes = next(iter(model.parameters())).element_size()
    ranks = _ranks(branches, costs, settings, element_bytes)
    return {index: (ranks[2 * i], ranks[2 * i + 1]) for i, index in enumerate(layers)}


def _metrics(
    block: AttentionBlock, layer: LayerMoments, settings: KVShrinkSettings
) -> tuple[Tensor | None, Tensor | None]:
    keys = _gradient(layer, 0) if settings.k_metric == "gradient" else None
    if settings.v_metric == "gradient":
        return keys, _gradient(layer, 1)
    values = output_metric(block, layer.values.width) if settings.v_metric == "output" else None
    return keys, None if values is None else values.cpu()


def _gradient(layer: LayerMoments, which: int) -> Tensor:
    if layer.gradients is None:
        raise LossplugError(
            "the calibration has no gradients", where="fit_factors", remedy="record_moments(..., gradients=True)"
        )
    return layer.gradients[which].second(centred=False).cpu()


def _ranks(
    branches: list[Moments], metrics: list[Tensor | None], settings: KVShrinkSettings, element_bytes: int
) -> list[int]:
    widths = [moments.width for moments in branches]
    bits = [settings.k_bits, settings.v_bits] * (len(branches) // 2)
    ratios = [settings.k_ratio, settings.v_ratio] * (len(branches) // 2)
    names = [f"{name} of layer {i}" for i in range(len(branches) // 2) for name in ("keys", "values")]
    dense = sum(widths) * element_bytes
    limit = settings.bytes_per_token if settings.budget is None else settings.budget * dense
    if limit is None:
        ranks = [rank_of_ratio(w, ratio, name) for w, ratio, name in zip(widths, ratios, names, strict=True)]
        limit = float(sum(map(code_bytes, ranks, bits, [element_bytes] * len(ranks))))
    else:
        ranks = [_affordable(w, b, element_bytes, limit / dense) for w, b in zip(widths, bits, strict=True)]
        if min(ranks) < 1:
            least = sum(code_bytes(1, b, element_bytes) for b in bits)
            raise LossplugError(
                f"the budget of {limit:.4g} bytes per token is too small: some rank rounds to 0",
                where="KVShrinkSettings",
                remedy=f"Give at least {least} bytes, {least / dense:.1%} of the dense {dense}",
            )
    if settings.allocation == "uniform":
        return ranks
    costs = [element_bytes if b == 16 else b / 8 for b in bits]
    weights = [settings.k_weight, 1.0] * (len(branches) // 2)
    absolute = settings.allocation == "sensitivity"
    spectra = []
    for moments, metric in zip(branches, metrics, strict=True):
        second = moments.second(centred=settings.means).cpu()
        root, _ = metric_root(metric, second)
        spectra.append(torch.linalg.eigvalsh(root @ second @ root).flip(0))

    def bytes_of(ranks: list[int]) -> int:
        return sum(map(code_bytes, ranks, bits, [element_bytes] * len(ranks)))

    # ranges and padding of few-bit codes are no multiple of the rank: search the channels that fit with them
    low, high = sum(costs), float(dense)
    best = allocate_ranks(spectra, costs, low, weights=weights, absolute=absolute)
    for _ in range(40):
        middle = (low + high) / 2
        found = allocate_ranks(spectra, costs, middle, weights=weights, absolute=absolute)
        if bytes_of(found) <= limit:
            low, best = middle, found
        else:
            high = middle
    return best


def _affordable(width: int, bits: int, element_bytes: int, share: float) -> int:
    """The largest rank whose code takes at most ``share`` of the dense bytes."""
    limit = share * width * element_bytes + 1e-6
    return max((r for r in range(1, width + 1) if code_bytes(r, bits, element_bytes) <= limit), default=0)


def _factors(
    moments: Moments,
    metric: Tensor | None,
    rank: int,
    settings: KVShrinkSettings,
    layer: LayerMoments,
    block: AttentionBlock,
    name: str,
) -> tuple[Factors, float]:
    second = moments.second(centred=settings.means).cpu()
    weight = None if settings.init == "whitened" else projection_weight(block, name).cpu().double()
    scale = layer.input_scale().cpu() if settings.init == "asvd" else None
    pieces = []
    for channels, part in _head_groups(moments.width, rank, settings, block, name):
        inner = second[channels, channels]
        metric_part = None if metric is None else metric[channels, channels]
        weight_part = None if weight is None else weight[:, channels]
        encode, decode = _start(inner, metric_part, weight_part, scale, part, settings)
        if settings.steps and settings.train_on == "moments":
            encode, decode = train_factors(inner, None, encode, decode, steps=settings.steps, lr=settings.lr)
        pieces.append((encode, decode))
    encode, decode = (torch.block_diag(*parts) for parts in zip(*pieces, strict=True))
    mean = moments.mean().cpu() if settings.means else None
    factors = balanced(Factors(encode, decode, mean), second)
    return factors.to(dtype=torch.float32), relative_error(second, factors)


def _start(
    second: Tensor,
    metric: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    rank: int,
    settings: KVShrinkSettings,
) -> tuple[Tensor, Tensor]:
    if weight is None:
        return whitened_init(second, None, rank, metric)
    decode = svd_init(weight, rank)[1] if scale is None else asvd_init(weight, scale, rank, settings.alpha)[1]
    return encoder_of(decode), decode


def _head_groups(
    width: int, rank: int, settings: KVShrinkSettings, block: AttentionBlock, name: str
) -> list[tuple[slice, int]]:
    """Channels and ranks of the groups of heads that are coded together."""
    if not settings.head_group:
        return [(slice(0, width), rank)]
    size = getattr(block.module, "head_dim", getattr(block.module, "head_size", None))
    heads = width // size if isinstance(size, int) else 0
    groups, left = divmod(heads, settings.head_group)
    if left or not groups or rank < groups:
        raise LossplugError(
            f"{name} has {heads} heads and rank {rank}, which can't be coded in groups of {settings.head_group}",
            where=block.path,
            remedy="Choose a head_group that divides the heads, and a channel per group at least",
        )
    step = width // groups
    return [(slice(i * step, (i + 1) * step), rank // groups + (i < rank % groups)) for i in range(groups)]


def trainable_factors(layer: LayerFactors, device: torch.device) -> LayerFactors:
    """Returns a copy of a layer's factors on a device, whose encoders and decoders want gradients.

    Entries that are 0, those between groups of heads, get none.
    """

    def tensor(fixed: Tensor) -> Tensor:
        moving = fixed.detach().to(device).clone().requires_grad_()
        inside = moving.detach() != 0
        moving.register_hook(lambda gradient: gradient * inside)
        return moving

    def copy(factors: Factors) -> Factors:
        mean = None if factors.mean is None else factors.mean.to(device)
        return Factors(tensor(factors.encode), tensor(factors.decode), mean)

    return dataclasses.replace(layer, keys=copy(layer.keys), values=copy(layer.values))


def relative_groups(layers: Iterable[LayerFactors], lr: float) -> list[dict[str, Any]]:
    """Returns a parameter group per tensor, its ``lr`` relative to the mean size of the entries."""
    tensors = [t for layer in layers for f in (layer.keys, layer.values) for t in (f.encode, f.decode)]
    return [{"params": [t], "lr": lr * float(t.detach().abs().mean())} for t in tensors]


def detached_factors(layer: LayerFactors) -> LayerFactors:
    """Returns a layer's factors without gradients, on the CPU."""

    def plain(factors: Factors) -> Factors:
        mean = None if factors.mean is None else factors.mean.cpu()
        return Factors(factors.encode.detach().cpu(), factors.decode.detach().cpu(), mean)

    return dataclasses.replace(layer, keys=plain(layer.keys), values=plain(layer.values))


def relative_error(second: Tensor, factors: Factors) -> float:
    r"""Returns :math:`E\|x - \hat x\|^2 / E\|x\|^2` from second moments, centred ones if the factors have a mean."""
    product = factors.encode.to(second.dtype) @ factors.decode.to(second.dtype)
    rest = torch.eye(len(second), dtype=second.dtype) - product
    return float((rest * (second @ rest)).sum() / second.diagonal().sum().clamp_min(1e-300))


def layers_from_tensors(tensors: Mapping[str, Tensor], errors: Mapping[str, Any]) -> dict[int, LayerFactors]:
    """Rebuilds layers from :func:`layer_tensors` and the ``layers`` of a summary.

    Raises:
        LossplugError: A tensor is missing.
    """

    def branch(index: str, name: str) -> Factors:
        try:
            encode, decode = tensors[f"{index}.{name}.encode"], tensors[f"{index}.{name}.decode"]
        except KeyError as error:
            raise LossplugError(f"the tensor {error} is missing", where="KV factors") from None
        mean = tensors.get(f"{index}.{name}.mean")
        shapes = encode.ndim == 2 and decode.shape == encode.shape[::-1] and encode.shape[1] <= encode.shape[0]
        if not shapes or (mean is not None and mean.shape != encode.shape[:1]):
            raise LossplugError(f"the factors of layer {index} don't fit each other", where="KV factors")
        return Factors(encode, decode, mean)

    return {
        int(index): LayerFactors(branch(index, "k"), branch(index, "v"), entry["k_error"], entry["v_error"])
        for index, entry in errors.items()
    }


def layer_tensors(factors: KVFactors) -> dict[str, Tensor]:
    """Returns the tensors of all layers under ``LAYER.k.encode`` and the like."""
    found: dict[str, Tensor] = {}
    for index, layer in factors.layers.items():
        for name, branch in (("k", layer.keys), ("v", layer.values)):
            parts = {"encode": branch.encode, "decode": branch.decode, "mean": branch.mean}
            found.update({f"{index}.{name}.{key}": t.contiguous() for key, t in parts.items() if t is not None})
    return found
