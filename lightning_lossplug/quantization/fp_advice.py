"""Which floating format to train in, by a fitted scaling law of language-model pre-training."""

from __future__ import annotations

import math

from lightning_lossplug.quantization.grid import check_bits, check_range
from lightning_lossplug.registry import register

# Fitted constants of the paper: loss = n/N^a + d/D^b + eps + (D^b/N^a) log2(B) / (gam (E + 1/2)^del (M + 1/2)^nu).
N_FACTOR, N_POWER = 69.2343, 0.2368
D_FACTOR, D_POWER = 68973.0621, 0.5162
FLOOR = 1.9061
GAMMA, E_POWER, M_POWER = 11334.5197, 3.1926, 2.9543


def fp_training_loss(parameters: float, tokens: float, exponent: int, mantissa: int, block: float) -> float:
    """Returns the predicted loss of a language model trained with such operands.

    Args:
        parameters: N, > 0.
        tokens: D, > 0.
        exponent: Exponent bits E >= 0.
        mantissa: Mantissa bits M >= 0.
        block: Values that share a scale, >= 1; at 1 the format costs nothing.

    Raises:
        LossplugError: A value out of range.
    """
    _check(parameters, exponent, mantissa, block)
    check_range("fp_scaling_law", "tokens", tokens, 1e-12)
    precision = tokens**D_POWER / parameters**N_POWER * math.log2(block)
    return (
        N_FACTOR / parameters**N_POWER
        + D_FACTOR / tokens**D_POWER
        + FLOOR
        + precision / (GAMMA * (exponent + 0.5) ** E_POWER * (mantissa + 0.5) ** M_POWER)
    )


def critical_tokens(parameters: float, exponent: int, mantissa: int, block: float) -> float:
    """Returns the number of tokens beyond which more data makes the predicted loss larger.

    Raises:
        LossplugError: A value out of range, or a block of 1, which has no such number.
    """
    _check(parameters, exponent, mantissa, block)
    check_range("fp_scaling_law", "block", block, 1 + 1e-9)
    top = D_FACTOR * GAMMA * parameters**N_POWER * (exponent + 0.5) ** E_POWER * (mantissa + 0.5) ** M_POWER
    return (top / math.log2(block)) ** (1 / (2 * D_POWER))


@register(
    "function",
    "fp_scaling_law",
    family="float format",
    paper="Scaling Laws for Floating Point Quantization Training",
    arxiv="2501.02423",
)
def advise_fp_format(bits: int) -> tuple[int, int]:
    r"""Returns the exponent and mantissa bits with the least predicted loss: (2, 1) of 4, (4, 3) of 8.

    The law's optimum :math:`M^* = \nu P/(\delta + \nu) - 1/2` with P = ``bits`` splits what the sign leaves; of the
    whole numbers around it the one with the larger penalty term's denominator is taken. Fitted on pre-training of
    language models up to 679M parameters: no advice for other training.

    Args:
        bits: 3 to 16, sign included.

    Raises:
        LossplugError: Bits out of range.
    """
    bits = check_bits("fp_scaling_law", bits, 3, 16)
    splits = [(bits - 1 - m, m) for m in range(bits - 1)]
    return max(splits, key=lambda em: (em[0] + 0.5) ** E_POWER * (em[1] + 0.5) ** M_POWER)


def _check(parameters: float, exponent: int, mantissa: int, block: float) -> None:
    where = "fp_scaling_law"
    check_range(where, "parameters", parameters, 1e-12)
    check_range(where, "exponent", exponent, 0)
    check_range(where, "mantissa", mantissa, 0)
    check_range(where, "block", block, 1)
