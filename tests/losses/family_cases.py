"""The table of losses outside classification and metric learning, for the common tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FAMILIES = ("language", "regression", "detection", "segmentation", "distribution", "robustness", "speech")
NOT_LOSSES = ("moe_bias_balancing",)  # a router's state, has tests of its own
ROWS = 4
Inputs = Callable[[int, torch.Generator], tuple[Tensor, tuple[Any, ...]]]


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def regression(n, g):
    return 0.3 * randn(g, n, 3), (0.3 * randn(g, n, 3),)


def boxes(n, g):
    def some():
        corner = torch.rand(n, 2, generator=g, dtype=torch.float64)
        return torch.cat([corner, corner + 0.3 + torch.rand(n, 2, generator=g, dtype=torch.float64)], 1)

    return some(), (some(),)


def masks(n, g):
    return randn(g, n, 3, 4, 5), (torch.randint(3, (n, 4, 5), generator=g),)


def table(size=12):
    values = torch.full((size,), float("nan"), dtype=torch.float64)
    values[1:11] = torch.arange(10.0)
    return values


def tokens(n, g):
    return randn(g, n, 5, 12), (torch.randint(1, 11, (n, 5), generator=g), table())


def sequences(n, g):
    return randn(g, n, 6, 12), (torch.randint(12, (n, 5), generator=g),)


def clouds(n, g):
    return randn(g, n, 2), (randn(g, n + (n > 0), 2) + 0.5,)


def bottleneck(n, g):
    # The prediction comes first here: it is what the common tests differentiate.
    return randn(g, n, 1), (randn(g, n, 3), randn(g, n, 2), randn(g, n, 1))


def margins(n, g):
    point = randn(g, n, 4)
    return point - torch.rand(n, 4, generator=g, dtype=torch.float64), (point,)


def speech(n, g):
    z = randn(g, 7, n, 6).log_softmax(2)
    return z, (torch.randint(1, 6, (n, 3), generator=g), torch.full((n,), 7), torch.full((n,), 3))


@dataclass(frozen=True)
class Case:
    """A loss.

    Args:
        inputs: Makes (what is differentiated, the rest of the call) for a number of rows.
        parameters: Settings to run; the defaults are always run.
        bad: Parameters that have to be refused.
        rows: Shape of ``reduction="none"`` for ROWS rows; None where the loss has no reduction.
        weighted: Whether it takes sample weights.
        required: Parameters that make all reductions legal.
        differentiable: Whether gradcheck applies.
        scale: Factor of the extreme inputs.
    """

    inputs: Inputs
    parameters: tuple[dict[str, Any], ...] = ()
    bad: tuple[dict[str, Any], ...] = ()
    rows: tuple[int, ...] | None = (ROWS,)
    weighted: bool = True
    required: dict[str, Any] = field(default_factory=dict)
    differentiable: bool = True
    scale: float = 1e4

    def settings(self):
        return [{**self.required, **p} for p in ({}, *self.parameters)]


def call(name, loss, x, rest, **options):
    """Calls a loss with what is differentiated in its place."""
    if name == "cauchy_schwarz_ib":
        return loss(rest[0], rest[1], rest[2], x, **options)
    return loss(x, *rest, **options)


EXPRESSIVE_BAD = ({"alpha": -0.1}, {"alpha": 1.1}, {"l1": -1.0}, {"eps": -0.1}, {"steps": 0}, {"step_size": 0.0})
MARGIN = {"alpha": 0.3}

CASES: dict[str, Case] = {
    "pseudo_huber": Case(
        regression,
        ({"c": 1.0, "scale": 2},),
        ({"c": 0.0}, {"c_min": 0.0}, {"c_min": 1.1}, {"schedule": "linear"}, {"scale": 3}, {"num_timesteps": 0}),
        (ROWS, 3),
    ),
    "lmse": Case(
        regression, ({"eps": 1e-6},), ({"eps": 0.0}, {"outside": "nan"}), (ROWS, 3), required={"outside": "clamp"}
    ),
    "madl": Case(regression, rows=(ROWS, 3), differentiable=False),
    "gmadl": Case(regression, ({"a": 3.0, "b": 2.0},), ({"a": 0.0}, {"b": -1.0}, {"a": float("nan")}), (ROWS, 3)),
    "diou": Case(boxes, bad=({"eps": 0.0},), scale=1e3),
    "ciou": Case(boxes, bad=({"eps": 0.0},), differentiable=False, scale=1e3),  # alpha is a constant in backward
    "jaccard_metric": Case(
        masks,
        ({"mIoUI": 1.0, "mIoUC": 0.5}, {"form": "jml2", "gamma": 2.0}, {"log_loss": True}, {"alpha": 0.5, "beta": 0.5}),
        (
            *({key: -1.0} for key in ("mIoUD", "mIoUI", "mIoUC", "alpha", "beta", "smooth", "threshold")),
            {"mIoUD": 0.0},
            {"gamma": 0.5},
            {"form": "jml3"},
            {"class_weights": [-1.0, 1.0, 1.0]},
        ),
        None,
        False,
    ),
    "dice": Case(masks, ({"average": "micro", "squared": True},), ({"smooth": -1.0}, {"average": "weighted"})),
    "number_token": Case(
        tokens,
        ({"variant": "mse"}, {"reweigh": True}, {"squash": 3.0, "reweigh": True}, {"variant": "mse", "reweigh": True}),
        ({"weight": -1.0}, {"variant": "cdf"}, {"squash": 1.0}, {"variant": "mse", "squash": 2.0}),
        (ROWS, 5),
    ),
    "dist2": Case(
        tokens,
        ({"distance": "abs", "tau": 4.0}, {"restrict": False}),
        ({"alpha": -0.1}, {"tau": 0.0}, {"distance": "l3"}),
        (ROWS, 5),
    ),
    "eisl": Case(
        sequences,
        ({"ngrams": [0, -1]}, {"ngrams": [1, 5]}),
        ({"ngrams": []}, {"ngrams": [1.5]}, {"weights": (0.0, 0.0)}, {"weights": (-1.0, 2.0)}),
        required={"gumbel": False},
    ),
    "sinkhorn": Case(
        clouds,
        ({"p": 1}, {"reach": 0.7}, {"debias": False}),
        (
            *({"p": v} for v in (0.5, float("nan"))),
            {"blur": 0.0},
            {"scaling": 1.0},
            {"scaling": 0.0},
            {"reach": 0.0},
            {"iterations": 0},
            {"backend": "pot"},
        ),
        (),
        False,
        required={"blur": 0.5, "iterations": 300},
        scale=1e2,
    ),
    "cs_divergence": Case(clouds, ({"sigma": 0.5},), ({"sigma": 0.0},), None, False, scale=1e3),
    "cauchy_schwarz_ib": Case(
        bottleneck, ({"sigma": "median", "beta": 1.0},), ({"sigma": 0.0}, {"beta": -1.0}), None, False, scale=1e3
    ),
    "ibp": Case(margins, ({"kappa": 0.0},), ({"kappa": -0.1}, {"kappa": 1.1}, {"eps": -1.0})),
    "cc_ibp": Case(margins, (MARGIN,), EXPRESSIVE_BAD),
    "mtl_ibp": Case(margins, (MARGIN,), EXPRESSIVE_BAD),
    "exp_ibp": Case(margins, (MARGIN,), EXPRESSIVE_BAD, required={"per_sample": True}),
    "ctc": Case(speech, differentiable=False),  # torch's gradient is that of log-probabilities of a softmax
}

NEEDS_TORCHAUDIO = ("rnnt",)
