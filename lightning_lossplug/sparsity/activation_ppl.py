r"""PPL-p%: how sparse a language model's feed-forward activations can be while its perplexity rises by p percent.

Of a token t, with a the input of a down projection, neuron i weighs :math:`n_{ti} = |a_{ti}|\,\|W_{:,i}\|_2`.
A threshold tau leaves out the neurons with :math:`n_{ti} \le \tau`, which costs the layer
:math:`\mathrm{CETT}(\tau) = \mathrm{mean}_t \|\sum_{n_{ti}\le\tau} a_{ti} W_{:,i}\| / \|\mathrm{FFN}(x_t)\|`. One
number c, shared by all layers, sets each layer's largest tau with CETT at most c; a bisection over c finds the largest
whose perplexity is within p percent of the dense one.

A measure, nothing that runs faster: entries are zeroed and multiplied all the same.

Source: Sparsing Law, arXiv 2411.02335.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import register

# Down projections of feed-forward blocks, by the names of transformers' and timm's models.
DOWN = ("*down_proj", "*mlp.c_proj", "*mlp.fc2", "*DenseReluDense.wo", "*dense_4h_to_h", "*mlp.w2", "*feed_forward.w2")
Loss = Callable[[nn.Module, Any], tuple[float, int]]
_QUANTILE_ENTRIES = 1 << 22


@dataclass(frozen=True)
class PPLSparsity:
    """The result of :func:`ppl_p_sparsity`.

    Args:
        sparsity: Share of feed-forward activations that were zeroed, over all layers and tokens.
        layers: The same for each layer, by the path of its down projection.
        thresholds: Of each layer's :math:`n`.
        cett: The shared bound c that was found.
        loss: Mean negative log-likelihood of the dense model, in nats per token.
        sparse_loss: Of the sparse one.
        p: Allowed increase of the perplexity, in percent.
    """

    sparsity: float
    layers: dict[str, float]
    thresholds: dict[str, float]
    cett: float
    loss: float
    sparse_loss: float
    p: float


def causal_lm_loss(model: nn.Module, batch: dict[str, Any]) -> tuple[float, int]:
    """Returns the mean loss of a transformers language model on a batch, and the number of tokens it is a mean of."""
    labels = batch.get("labels", batch["input_ids"])
    count = int((labels[:, 1:] != -100).sum())
    return float(model(**{**batch, "labels": labels}).loss), count


class _Layer:
    """One down projection: what it saw in the dense run, and its CETT as a function of the threshold."""

    def __init__(self, module: nn.Module, tokens: int) -> None:
        weight = module.weight.detach().float()  # type: ignore[union-attr, operator]
        self.weight = weight.T if isinstance(module, nn.Linear) else weight  # [d_ff, d]
        self.norms = self.weight.norm(dim=1)
        self.tokens, self.seen = tokens, 0
        self.parts: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.known: dict[int, float] = {}
        self.hits = self.total = 0

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        room = self.tokens - self.seen
        if room > 0:
            a = args[0].detach().float().flatten(0, -2)[:room]
            self.seen += len(a)
            self.parts.append(a)
            self.outputs.append(output.detach().float().flatten(0, -2)[:room].norm(dim=1))

    def prepare(self, candidates: int) -> None:
        self.a, self.out = torch.cat(self.parts), torch.cat(self.outputs)
        self.parts, self.outputs = [], []
        self.n = self.a.abs() * self.norms
        flat = self.n.flatten()
        flat = flat[:: -(-flat.numel() // _QUANTILE_ENTRIES)]
        low, high = float(self.n.min()), float(flat.kthvalue(max(1, int(0.99 * flat.numel()))).values)
        self.grid = torch.linspace(low, max(low, high), candidates, dtype=torch.float64)

    def cett(self, index: int) -> float:
        if index not in self.known:
            left_out = torch.where(self.n <= float(self.grid[index]), self.a, 0) @ self.weight
            self.known[index] = float((left_out.norm(dim=1) / self.out.clamp(min=1e-12)).mean())
        return self.known[index]

    def threshold(self, c: float) -> float:
        low, high = 0, len(self.grid) - 1  # the first candidate is taken even where no CETT is within c
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.cett(middle) <= c else (low, middle - 1)
        return float(self.grid[low])

    def cut(self, threshold: float, module: nn.Module, args: Any) -> tuple[Any, ...]:
        gone = args[0].abs() * self.norms.to(args[0]) <= threshold
        self.hits += int(gone.count_nonzero())
        self.total += gone.numel()
        return (args[0].masked_fill(gone, 0), *args[1:])


@register(
    "metric",
    "ppl_p_sparsity",
    family="activation_sparsity",
    paper="Sparsing Law: Towards Large Language Models with Greater Activation Sparsity",
    arxiv="2411.02335",
)
@torch.no_grad()
def ppl_p_sparsity(
    model: nn.Module,
    batches: Sequence[Any],
    p: float = 1.0,
    include: Sequence[str] = DOWN,
    tokens: int = 1024,
    candidates: int = 65536,
    tolerance: float = 1e-3,
    loss: Loss = causal_lm_loss,
) -> PPLSparsity:
    """Returns the largest activation sparsity at which the perplexity rises by at most p percent.

    Layer thresholds come from the dense run, as in the paper's code, so errors of earlier layers add up in later ones.
    The returned setting is one that was run and found within p. The bisection takes ``log2(1 / tolerance)`` passes over
    the batches.

    Args:
        model: In evaluation mode.
        batches: Evaluation data; run again and again, so no iterator.
        p: > 0, in percent.
        include: Glob patterns of the down projections' paths.
        tokens: Tokens of the dense run that CETT is taken over; memory is ``tokens x d_ff`` floats per layer, twice.
        candidates: Thresholds per layer, linear from the smallest n to its 0.99 quantile.
        tolerance: Where the bisection over c in [0, 1] ends; the paper's code uses 1e-6.
        loss: Gives the mean loss of a batch and the number of tokens in it.

    Raises:
        LossplugError: A value out of range, no such layer, no batch, or a model in training mode.
    """
    if not p > 0:
        raise LossplugError(f"p is {p}, allowed is > 0", where="ppl_p_sparsity")
    if not 0 < tolerance < 1 or candidates < 2 or tokens < 1:
        what = f"tolerance, candidates and tokens are {tolerance}, {candidates} and {tokens}"
        raise LossplugError(what, where="ppl_p_sparsity", remedy="Give (0, 1), 2 or more and 1 or more")
    if model.training:
        raise LossplugError("the model is in training mode", where="ppl_p_sparsity", remedy="Call eval()")
    chosen = ((n, m) for n, m in model.named_modules() if any(fnmatchcase(n, pattern) for pattern in include))
    modules = {name: module for name, module in chosen if isinstance(getattr(module, "weight", None), Tensor)}
    if not modules or not len(batches):
        what = "no layer matches include" if not modules else "there is no batch"
        raise LossplugError(what, where="ppl_p_sparsity", remedy="Name the down projections, for example ['*.fc2']")
    layers = {path: _Layer(module, tokens) for path, module in modules.items()}
    with ExitStack() as stack:
        for path, module in modules.items():
            stack.callback(module.register_forward_hook(layers[path].keep).remove)
        dense = _mean_loss(model, batches, loss)
    for path, layer in layers.items():
        if not layer.seen:
            raise LossplugError("it didn't run on the batches", where=path, remedy="Leave it out of include")
        layer.prepare(candidates)

    def run(c: float) -> PPLSparsity:
        thresholds = {path: layer.threshold(c) for path, layer in layers.items()}
        with ExitStack() as stack:
            for path, module in modules.items():
                layers[path].hits = layers[path].total = 0
                stack.callback(module.register_forward_pre_hook(partial(layers[path].cut, thresholds[path])).remove)
            found = _mean_loss(model, batches, loss)
        shares = {path: layer.hits / layer.total for path, layer in layers.items()}
        whole = sum(layer.hits for layer in layers.values()) / sum(layer.total for layer in layers.values())
        return PPLSparsity(whole, shares, thresholds, c, dense, found, p)

    best, low, high = run(0.0), 0.0, 1.0
    while high - low > tolerance:
        middle = (low + high) / 2
        found = run(middle)
        if found.sparse_loss - dense <= math.log1p(p / 100):
            best, low = found, middle
        else:
            high = middle
    return best


def _mean_loss(model: nn.Module, batches: Sequence[Any], loss: Loss) -> float:
    results = [loss(model, batch) for batch in batches]
    return sum(value * count for value, count in results) / max(sum(count for _, count in results), 1)
