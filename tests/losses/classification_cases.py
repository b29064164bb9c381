"""The table of all classification losses that the common tests run over: one line of parameters per loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_lossplug.losses import create

CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A loss of logits and class indices.

    Args:
        parameters: Settings to run, each a dict of card parameters; the defaults are always run.
        required: Parameters the loss cannot be built without.
        inputs: Extra keyword arguments of forward for targets ``y``, made from a seed and one value per row.
        classes: Number of classes the loss works with.
        dense: Whether targets may have more than one dimension.
        true_gradient: Whether backward is the derivative of the value; False where the loss detaches a part of it
            (lambda, a modulator), which its own tests then check in closed form.
        bad: Parameters, each of which has to be refused.
    """

    parameters: tuple[dict[str, Any], ...] = ()
    required: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[Tensor], dict[str, Tensor]] = lambda y: {}
    classes: int = CLASSES
    dense: bool = True
    true_gradient: bool = True
    bad: tuple[dict[str, Any], ...] = ()

    def settings(self) -> list[dict[str, Any]]:
        return [{**self.required, **p} for p in ({}, *self.parameters)]


INDEX_CASES: dict[str, Case] = {
    "cross_entropy": Case(({"label_smoothing": 0.1},), bad=({"label_smoothing": 1.1}, {"label_smoothing": -0.1})),
    "focal": Case(({"gamma": 0.5}, {"detach_modulator": True}), bad=({"gamma": -1.0},)),
    "poly_loss": Case(
        ({"epsilon": [1.0, -0.4, 0.3]}, {"gamma": 2.0, "epsilon": -1.0}, {"gamma": 0.5}, {"label_smoothing": 0.2}),
        bad=({"gamma": -0.1}, {"epsilon": []}, {"label_smoothing": 2.0}),
    ),
    "comp_sum": Case(({"tau": 0.5}, {"tau": 1.5}, {"tau": 2.0}), bad=({"tau": -0.1}, {"tau": float("nan")})),
    "gce": Case(({"q": 1.0}, {"q": 0.5, "k": 0.1}), bad=({"q": 0.0}, {"q": 1.1}, {"k": 1.0}, {"k": -0.1})),
    "mae": Case(),
    "ldr_kl": Case(
        ({"lambda": 2.5, "margin": 0.0}, {"normalize": "softplus_l1"}, {"normalize": "l1"}),
        bad=({"lambda": 0.0}, {"margin": -1.0}, {"normalize": "l2"}),
    ),
    "aldr_kl": Case(
        ({"normalize": "l1", "margin_in_kl": False, "floor": 1e-5}, {"lambda_0": 0.5, "alpha": 1.5, "iterations": 3}),
        true_gradient=False,
        bad=(
            {"lambda_0": 0.0},
            {"alpha": 1.0},
            {"margin": -1.0},
            {"dataset_size": 0},
            {"normalize": "x"},
            {"floor": 1.0},
        )
        + ({"iterations": 0},),
    ),
    "z_loss": Case(({"a": 0.3, "b": 1.0},), bad=({"a": 0.0}, {"a": -1.0}, {"eps": 0.0})),
    "nce": Case(),
    "rce": Case(({"A": -4.0},), bad=({"A": 0.0},)),
    "nfl": Case(({"gamma": 0.0}, {"gamma": 2.0}, {"detach_modulator": True}), bad=({"gamma": -0.5},)),
    "ngce": Case(({"q": 1.0},), bad=({"q": 0.0}, {"q": 1.5})),
    "nmae": Case(({"legacy": True},)),
    "nrce": Case(({"legacy": True},), bad=({"A": 1.0},)),
    "active_passive": Case(
        tuple({"active": a, "passive": p, "beta": 0.3} for a in ("nce", "nfl", "ngce", "gce") for p in ("rce", "mae")),
        bad=({"active": "rce"}, {"passive": "nce"}, {"alpha": -1.0}, {"beta": -1.0}, {"A": 1.0}, {"q": 2.0}),
    ),
    "symmetric_ce": Case(({"alpha": 6.0, "beta": 0.1},), bad=({"alpha": -1.0}, {"beta": -1.0}, {"A": 0.0})),
    "lse_penalty": Case(({"lambda": 0.1},), bad=({"lambda": -1.0},)),
    "spherical_softmax": Case(({"eps": 1.0},), bad=({"eps": 0.0},)),
    "taylor_softmax": Case(),
    "legendretron": Case(
        ({"n_blocks": 1, "hidden": 2, "depth": 1}, {"l2": 0.0, "depth": 2}),
        required={"num_classes": CLASSES},
        bad=({"num_classes": 1}, {"n_blocks": 0}, {"hidden": 3}, {"depth": 0}, {"l2": -1.0}),
    ),
    "bias_loss": Case(
        ({"normalisation": "global"}, {"normalisation": "global", "legacy": True}, {"alpha": 1.0, "beta": 0.0}),
        inputs=lambda y: {"features": feature_maps(y)},
        dense=False,
        bad=({"beta": 1.0}, {"beta": -0.1}, {"normalisation": "batch"}),
    ),
    "correctness_aware": Case(({"balance": False},)),
    "cape": Case(
        ({"mode": "kde"},),
        classes=2,
        bad=({"mode": "hist"}, {"n_bins": 0}, {"sigma": 0.0}, {"window": 0}, {"k": -1}, {"dataset_size": 0}),
    ),
}

BINARY_CASES: dict[str, Case] = {
    "sigmoid_focal": Case(
        ({"alpha": -1.0}, {"gamma": 0.5}, {"gamma": 0.0, "alpha": 0.5}), bad=({"alpha": 1.5}, {"gamma": -1.0})
    ),
    "ensloss": Case(({"lambda": 0.5},), bad=({"period": 0}, {"clip": 0.0}, {"lambda_range": (1.0, -1.0)})),
}

# Losses that are called in their own way, with the file of their tests.
OTHER: dict[str, str] = {
    "symmetric_consistency": "test_noisy_label_losses.py",
    "spherical_output_layer": "test_spherical.py",
    "smooth_adversarial_comp_sum": "test_smooth_adversarial.py",
}


def feature_maps(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    spread = torch.linspace(0.5, 2.0, len(y), dtype=torch.float64)
    return spread[:, None, None] * torch.randn(len(y), 3, 4, generator=generator, dtype=torch.float64)


def index_settings() -> list[tuple[str, dict[str, Any]]]:
    return [(name, parameters) for name, case in INDEX_CASES.items() for parameters in case.settings()]


def build(name: str, parameters: dict[str, Any], **options: Any) -> torch.nn.Module:
    """Builds a loss in float64, learnable parts of it with fixed random numbers."""
    torch.manual_seed(0)
    loss = create(name, **parameters, **options).double()
    if name == "legendretron":
        loss(*batch(name, 30, seed=1))  # the first batch sets its normalisation
    return loss


def batch(name: str, rows: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns logits and labels that fit the loss."""
    generator = torch.Generator().manual_seed(seed)
    classes = INDEX_CASES[name].classes
    z = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return z, torch.randint(classes, (rows,), generator=generator)
