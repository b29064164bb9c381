"""LLM-FP4: minifloat formats whose exponent bias and mantissa are searched by the layer's output error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.formats import FPQuant, fp_quant
from lightning_lossplug.quantization.grid import check_range
from lightning_lossplug.quantization.post.layer import LayerProblem
from lightning_lossplug.quantization.post.method import PostTrainingMethod
from lightning_lossplug.registry import register


def exponent_bias(top: Tensor, exponent: int, mantissa: int) -> Tensor:
    r"""Returns the bias of the minifloat whose largest value is ``top``: :math:`2^E-\log_2 top+\log_2(2-2^{-M})-1`."""
    return 2**exponent - top.log2() + math.log2(2 - 2.0**-mantissa) - 1


def largest_value(bias: Tensor, exponent: int, mantissa: int) -> Tensor:
    """Undoes :func:`exponent_bias`."""
    return torch.exp2(2**exponent - 1 - bias) * (2 - 2.0**-mantissa)


def preshifted_bias(bias: Tensor, exponent: int, rho: Tensor | float | None = None) -> Tensor:
    r"""Returns channel biases that differ from a tensor's bias by whole numbers, which weights can take as exponents.

    :math:`\tilde b_j = \mathrm{clip}(\mathrm{round}(b_j), \mathrm{round}(\rho), \mathrm{round}(\rho)+2^E-1) -
    \mathrm{round}(\rho) + \rho`.

    Args:
        bias: Bias of every channel by its own largest value.
        exponent: Exponent bits E.
        rho: Bias of the tensor; None is the least of ``bias``.

    Source: Liu et al., LLM-FP4, arXiv 2310.16836.
    """
    rho = bias.min() if rho is None else torch.as_tensor(rho, dtype=bias.dtype)
    return bias.round().clamp(rho.round(), rho.round() + 2**exponent - 1) - rho.round() + rho


@register(
    "post_training",
    "llm_fp4",
    family="float format",
    paper="LLM-FP4: 4-Bit Floating-Point Quantized Transformers",
    arxiv="2310.16836",
)
class LLMFP4(PostTrainingMethod):
    """Searches each row's exponent bias, and the mantissa bits of the layer, by the error of its output.

    Works with ``weight="fp_quant"``; with ``activation="fp_quant"`` the bias and mantissa of the input are searched
    too, in turns. Candidates multiply the bias of the largest value, which is among them, so the search never ends
    worse than that. Biases of single input channels (:func:`preshifted_bias`) are not applied.

    Args:
        search_rounds: Turns between weight and input, >= 1.
        gamma_range: Factors of the bias.
        n_grid: Number of factors.
        mantissas: Mantissa bits that are tried; None tries all of the format.
        tokens: Inputs used for the input's search, at most.

    Raises:
        LossplugError: A value out of range.
    """

    name: ClassVar[str] = "llm_fp4"

    def __init__(
        self,
        search_rounds: int = 3,
        gamma_range: tuple[float, float] = (0.01, 1.2),
        n_grid: int = 100,
        mantissas: Sequence[int] | None = None,
        tokens: int = 256,
    ) -> None:
        for name, value in (("search_rounds", search_rounds), ("n_grid", n_grid), ("tokens", tokens)):
            check_range(self.name, name, value, 1)
        if len(tuple(gamma_range)) != 2 or not 0 < gamma_range[0] <= gamma_range[1]:
            raise LossplugError(f"gamma_range is {gamma_range}, allowed is 0 < low <= high", where=self.name)
        self.search_rounds, self.n_grid, self.tokens = search_rounds, n_grid, tokens
        self.gammas = [1.0, *torch.linspace(*gamma_range, n_grid + 1)[:n_grid].tolist()]
        self.mantissas = None if mantissas is None else list(mantissas)

    def solve(self, problem: LayerProblem) -> Tensor:
        """Searches, sets the formats, rounds."""
        quantizer = problem.quantizer
        if not isinstance(quantizer, FPQuant):
            raise LossplugError(
                f"the method needs a minifloat, {quantizer.name} is none",
                where=problem.name,
                remedy="Give weight='fp_quant'",
            )
        inputs = problem.activation if isinstance(problem.activation, FPQuant) else None
        for _ in range(self.search_rounds if inputs is not None else 1):
            self._search_weight(problem, quantizer)
            if inputs is not None:
                self._search_input(problem, quantizer, inputs)
        return problem.rounded()

    def _choices(self, quantizer: FPQuant) -> list[int]:
        # 8 bits: at least two mantissa bits, as the paper's search
        default = range(2, 7) if quantizer.bits == 8 else range(quantizer.bits - 1)
        return list(default) if self.mantissas is None else self.mantissas

    def _tops(self, top: Tensor, exponent: int, mantissa: int) -> list[Tensor]:
        bias = exponent_bias(top.clamp_min(1e-12), exponent, mantissa)
        return [largest_value(gamma * bias, exponent, mantissa).clamp(1e-12, 1e12) for gamma in self.gammas]

    def _search_weight(self, problem: LayerProblem, quantizer: FPQuant) -> None:
        rows, moments = problem.matrix(problem.weight), problem.moments().float()
        parts = rows.reshape(len(moments), -1, rows.shape[1])
        dims = quantizer.layout.dims(problem.weight.ndim)
        least = torch.inf
        for mantissa in self._choices(quantizer):
            e = quantizer.bits - 1 - mantissa
            start = problem.weight.abs().amax(dims, keepdim=True)
            best, top = torch.full((len(rows),), torch.inf, device=rows.device), start
            for candidate in self._tops(start, e, mantissa):
                value = fp_quant(problem.weight, candidate, quantizer.bits, mantissa)
                gap = problem.matrix(value).reshape(parts.shape) - parts
                error = torch.einsum("grc,grc->gr", gap @ moments, gap).flatten()
                if not quantizer.layout.per_channel:
                    error = error.sum().expand_as(error)
                better = error < best
                best = torch.where(better, error, best)
                top = torch.where(_like(better, top, problem), candidate, top)
            if float(best.sum()) < least:
                least = float(best.sum())
                quantizer.mantissa = mantissa
                quantizer.max.data.copy_(top.reshape(quantizer.max.shape))

    @torch.no_grad()
    def _search_input(self, problem: LayerProblem, quantizer: FPQuant, inputs: FPQuant) -> None:
        raw = torch.cat([problem._columns(x.float())[:, : self.tokens] for x in problem.raw_inputs], 1)
        raw = raw[:, torch.linspace(0, raw.shape[1] - 1, min(self.tokens, raw.shape[1])).long()]
        weight = problem.matrix(problem.weight).reshape(len(raw), -1, raw.shape[2])
        rounded = problem.matrix(problem.rounded()).reshape(weight.shape)
        want, least = raw @ weight.mT, torch.inf
        start = torch.stack([x.abs().max() for x in problem.raw_inputs]).max().reshape(1)
        for mantissa in self._choices(inputs):
            for top in self._tops(start, inputs.bits - 1 - mantissa, mantissa):
                error = float((fp_quant(raw, top, inputs.bits, mantissa) @ rounded.mT - want).square().sum())
                if error < least:
                    least, inputs.mantissa = error, mantissa
                    inputs.max.data.copy_(top.reshape(inputs.max.shape))
        problem.inputs = [inputs(x) for x in problem.raw_inputs]


def _like(rows: Tensor, top: Tensor, problem: LayerProblem) -> Tensor:
    if top.numel() == 1:
        return rows[:1].reshape(top.shape)
    shape = [size if i == problem.axis else 1 for i, size in enumerate(problem.weight.shape)]
    return rows.reshape(shape)
