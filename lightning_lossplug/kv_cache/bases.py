"""EigenAttention and MatryoshkaKV: orthogonal bases in the place of free factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache.attention import AttentionBlock, Tap, join_heads, rotary_tables, split_heads
from lightning_lossplug.kv_cache.end_to_end import train_end_to_end
from lightning_lossplug.kv_cache.factors import Factors, balanced
from lightning_lossplug.kv_cache.fingerprint import fingerprint
from lightning_lossplug.kv_cache.gradients import language_model
from lightning_lossplug.kv_cache.orthogonal import (
    axis_energies,
    basis_factors,
    cayley,
    nested_ranks,
    principal_axes,
    ranks_of_threshold,
)
from lightning_lossplug.kv_cache.plan import KVFactors, LayerFactors, layer_ranks, relative_error
from lightning_lossplug.kv_cache.recorder import MomentRecorder
from lightning_lossplug.kv_cache.settings import KVShrinkSettings
from lightning_lossplug.kv_cache.shrink import run_batches
from lightning_lossplug.registry import register

THRESHOLD_STEP = 0.02
SHARES = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)  # of a head's axes that a training step of MatryoshkaKV may keep


@register(
    "function",
    "eigen_attention",
    family="kv_cache",
    paper="Eigen Attention: Attention in Low-Rank Space for KV Cache Compression",
    arxiv="2408.05646",
)
def eigen_attention(
    model: nn.Module, recorder: MomentRecorder, settings: KVShrinkSettings, texts: Sequence[Tensor] = ()
) -> KVFactors:
    r"""Principal axes: one basis for the unrotated keys of all heads of a layer, one for the values of each head.

    With ``error_budget`` a layer's ranks are the least whose singular values (not squared) sum to a threshold; the
    threshold falls from 1 by 0.02 until the relative error :math:`\|o - \hat o\| / \|o\|` of the output of the
    attention block passes the budget, and is taken back by one step. All tokens are coded there, so a window and sinks
    make it better than that. Without it, ranks are those of the ratios or the budget of bytes, and those of the values
    are split over the heads by energy. Keys are not folded into the projections, which rotary models don't allow. (The
    paper leaves open whether "all heads" share one d x d basis or one of all their channels; this is the latter.)

    Args:
        model: The model that was calibrated.
        recorder: Its moments.
        settings: Ranks, or ``error_budget``.
        texts: int64 ``[B, T]``; the first is what errors are measured on.

    Raises:
        LossplugError: A rank that rounds to 0, or below one axis for every head.
    """
    keys, values, energies = {}, {}, {}
    for index, layer in sorted(recorder.layers.items()):
        heads = head_count(recorder.blocks[index], layer.values.width)
        second = layer.values.second(centred=False).cpu()
        keys[index] = principal_axes(layer.keys.second(centred=False).cpu(), 1)
        values[index] = principal_axes(second, heads)
        energies[index] = (
            axis_energies(layer.keys.second(centred=False).cpu(), keys[index]),
            axis_energies(second, values[index]),
        )

    def cut(index: int, k_rank: int, v_ranks: list[int]) -> tuple[Factors, Factors]:
        pieces = [basis[:, :rank] for basis, rank in zip(values[index], v_ranks, strict=True)]
        return basis_factors([keys[index][0, :, :k_rank]]), basis_factors(pieces)

    if settings.error_budget is None:
        ranks = layer_ranks(model, recorder, settings)
        made = {
            index: cut(index, ranks[index][0], nested_ranks(energies[index][1], ranks[index][1])) for index in ranks
        }
    else:
        made = {}

        def choose(index: int, error: Any) -> None:
            steps = int(1 / THRESHOLD_STEP)
            for count in range(steps):
                k_energy, v_energy = energies[index]
                threshold = 1 - count * THRESHOLD_STEP
                ranks = ranks_of_threshold([k_energy[0], *v_energy], threshold)
                pair = cut(index, ranks[0], ranks[1:])
                if count and error(pair) > settings.error_budget:
                    return
                made[index] = pair

        _measure(model, recorder, texts[0], choose)
    return _finish(model, recorder, settings, made)


@register(
    "function",
    "matryoshka_kv",
    family="kv_cache",
    paper="MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal Projection",
    arxiv="2410.14731",
)
def matryoshka_kv(
    model: nn.Module, recorder: MomentRecorder, settings: KVShrinkSettings, texts: Sequence[Tensor] = ()
) -> KVFactors:
    r"""Nested orthogonal bases of every head, trained so that any number of first axes is good.

    :math:`U = U_0\,(I - S)(I + S)^{-1}` with principal axes :math:`U_0` and a skew S that is trained: every step keeps
    a random share of the axes of each head of each layer, and pulls the logits of decoding towards the dense ones.
    :math:`U^\top U = I` after every step, and all axes together are the exact cache. After it, the ranks of the
    settings are split over the heads of a layer, axis by axis, by energy on the calibration text. (The paper's search
    asks the model instead, and its rank schedule is not published with the method card this follows.)

    Args:
        model: A causal language model.
        recorder: Its moments.
        settings: Ranks; ``steps`` and ``lr`` of the training, 0 steps for principal axes.
        texts: int64 ``[B, T]`` for the training.

    Raises:
        LossplugError: A rank that rounds to 0, or below one axis for every head.
    """
    ranks = layer_ranks(model, recorder, settings)
    start: dict[tuple[int, int], Tensor] = {}
    seconds: dict[tuple[int, int], Tensor] = {}
    for index, layer in recorder.layers.items():
        for which, moments in enumerate((layer.keys, layer.values)):
            seconds[index, which] = moments.second(centred=False).cpu()
            heads = head_count(recorder.blocks[index], moments.width)
            start[index, which] = principal_axes(seconds[index, which], heads)
    bases = start
    if settings.steps:
        bases = _trained(model, recorder, settings, texts, start)
    made = {}
    for index, pair in ranks.items():
        branches = []
        for which, rank in enumerate(pair):
            basis = bases[index, which]
            heads_ranks = nested_ranks(axis_energies(seconds[index, which], basis), rank)
            branches.append(basis_factors([u[:, :r] for u, r in zip(basis, heads_ranks, strict=True)]))
        made[index] = (branches[0], branches[1])
    return _finish(model, recorder, settings, made)


def _trained(
    model: nn.Module,
    recorder: MomentRecorder,
    settings: KVShrinkSettings,
    texts: Sequence[Tensor],
    start: dict[tuple[int, int], Tensor],
) -> dict[tuple[int, int], Tensor]:
    device = next(iter(model.parameters())).device
    free = {place: torch.zeros_like(basis, dtype=torch.float32, device=device) for place, basis in start.items()}
    fixed = {place: basis.to(device, torch.float32) for place, basis in start.items()}
    mark = fingerprint(model, recorder.blocks)
    for tensor in free.values():
        tensor.requires_grad_()

    def moving(step: int) -> KVFactors:
        generator = torch.Generator().manual_seed(step)

        def branch(place: tuple[int, int]) -> Factors:
            basis = fixed[place] @ cayley(free[place])
            heads, width, _ = basis.shape
            shares = torch.tensor(SHARES)[torch.randint(len(SHARES), (heads, 1), generator=generator)]
            kept = (torch.arange(width) < (shares * width).ceil()).to(device, torch.float32)
            encode = torch.block_diag(*(basis * kept[:, None]))
            return Factors(encode, encode.T)

        layers = {i: LayerFactors(branch((i, 0)), branch((i, 1)), 0.0, 0.0) for i in sorted(recorder.layers)}
        return KVFactors(layers, settings, mark, recorder.tokens)

    groups = [{"params": list(free.values()), "lr": settings.lr}]
    train_end_to_end(
        language_model(model, recorder.blocks), texts, groups, moving, steps=settings.steps, where="matryoshka_kv"
    )
    return {place: start[place] @ cayley(free[place].detach().cpu().double()) for place in start}


def _finish(
    model: nn.Module,
    recorder: MomentRecorder,
    settings: KVShrinkSettings,
    made: dict[int, tuple[Factors, Factors]],
) -> KVFactors:
    layers = {}
    for index, pair in sorted(made.items()):
        branches, errors = [], []
        for moments, factors in zip((recorder.layers[index].keys, recorder.layers[index].values), pair, strict=True):
            second = moments.second(centred=False).cpu()
            errors.append(relative_error(second, factors))
            branches.append(balanced(factors, second).to(dtype=torch.float32))
        layers[index] = LayerFactors(branches[0], branches[1], errors[0], errors[1])
    return KVFactors(layers, settings, fingerprint(model, recorder.blocks), recorder.tokens)


def _measure(model: nn.Module, recorder: MomentRecorder, text: Tensor, choose: Any) -> None:
    """Runs a text through the model, and has ``choose(layer, error)`` called at every block.

    ``error(pair)`` runs the block again with all keys and values through a pair of factors.
    """

    def watch(block: AttentionBlock) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            exact = output[0].float()
            cos, sin = rotary_tables(block, kwargs)

            def error(pair: tuple[Factors, Factors]) -> float:
                codes = [factors.to(exact.device, torch.float32) for factors in pair]

                def see(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
                    heads = keys.shape[1]
                    plain = join_heads(block.rotary.unrotate(keys.float(), cos.float(), sin.float()))
                    rebuilt = split_heads(codes[0].rebuild(codes[0].code(plain)), heads).to(keys.dtype)
                    low = codes[1].rebuild(codes[1].code(join_heads(values).float()))
                    return block.rotary.rotate(rebuilt, cos, sin), split_heads(low, heads).to(values.dtype)

                # forward itself, so that no hook sees it
                found = module.forward(*args, **{**kwargs, block.cache: Tap(see, None)})[0].float()
                return float((found - exact).norm() / exact.norm().clamp_min(1e-30))

            choose(block.index, error)

        return hook

    handles = [block.module.register_forward_hook(watch(block), with_kwargs=True) for block in recorder.blocks.values()]
    try:
        with torch.no_grad():
            run_batches(model, recorder.blocks, [text])
    finally:
        for handle in handles:
            handle.remove()


def head_count(block: AttentionBlock, width: int) -> int:
    """Returns how many key-value heads a block has.

    Raises:
        LossplugError: It doesn't tell the width of a head.
    """
    size = getattr(block.module, "head_dim", getattr(block.module, "head_size", None))
    if not isinstance(size, int) or width % size:
        raise LossplugError(f"{width} channels are not known to be heads", where=block.path)
    return width // size
