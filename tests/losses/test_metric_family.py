"""Behaviour every metric and contrastive loss shares, driven by one table."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import create
from lightning_lossplug.registry import registry

D, CLASSES = 3, 3
SIGNATURES = {"embeddings_labels", "embeddings_labels_head", "paired_embeddings", "scores_sets"}
Inputs = tuple[Tensor, ...]


def labelled(batch: int, kind: str, dtype: torch.dtype) -> Inputs:
    return points(batch, kind, dtype, 0), torch.arange(batch) % CLASSES


def paired(batch: int, kind: str, dtype: torch.dtype) -> Inputs:
    return points(batch, kind, dtype, 0), points(batch, kind, dtype, 1)


def scored(batch: int, kind: str, dtype: torch.dtype) -> Inputs:
    scores = points(batch, kind, dtype, 0, 7)
    positive = (torch.arange(7) + torch.arange(batch)[:, None]) % 3 == 0
    return scores, positive


def points(batch: int, kind: str, dtype: torch.dtype, seed: int, width: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    x = {
        "random": x,
        "equal": torch.ones_like(x),
        "zero": torch.zeros_like(x),
        "huge": x * 1e4,
        "tiny": x * 1e-6,
    }[kind]
    return x.to(dtype).requires_grad_()


@dataclass
class Case:
    """How a loss is made and called.

    Args:
        inputs: Makes the arguments.
        parameters: Of the constructor.
        bad: Constructor arguments that have to be refused, each on its own.
        smooth: Whether the gradient is that of the value (not so where a factor is detached on purpose).
        reductions: Whether ``reduction`` can be chosen.
        multiple: The batch has to be a multiple of it.
    """

    inputs: Callable[[int, str, torch.dtype], Inputs]
    parameters: dict[str, Any] = field(default_factory=dict)
    bad: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    smooth: bool = True
    reductions: bool = True
    multiple: int = 1


HEAD = {"num_classes": CLASSES, "embedding_size": D}
HEAD_BAD = {"num_classes": (0,), "embedding_size": (0,), "s": (0.0, -1.0)}
NT = {"scale": (0.0, -1.0), "margin": (-0.1, 1.0)}
NCE = {"logit_scale": (4.7,), "row_tile": (0,), "col_tile": (0,)}
CASES = {
    "circle": Case(labelled, bad={"margin": (0.0, 1.0, -1.0), "gamma": (0.0, -1.0)}, smooth=False),
    "supcon": Case(labelled, bad={"temperature": (0.0, -1.0), "base_temperature": (0.0,), "contrast_mode": ("some",)}),
    "nt_xent": Case(paired, bad=NT),
    "nt_xent_am": Case(paired, bad=NT),
    "adaface": Case(labelled, HEAD, {**HEAD_BAD, "m": (-0.1, 1.1), "h": (-1.0,), "t_alpha": (0.0, 1.1)}, smooth=False),
    "arcface": Case(labelled, HEAD, {**HEAD_BAD, "m": (-0.1, 1.6)}),
    "cosface": Case(labelled, HEAD, {**HEAD_BAD, "m": (-0.1, 2.1)}),
    "tcm": Case(
        labelled,
        bad={"margin_pos": (0.5, 1.1), "margin_neg": (-1.1, 0.9), "lambda_pos": (-1.0,), "lambda_neg": (-1.0,)},
        reductions=False,
    ),
    "proto_triplet": Case(labelled, bad={"margin": (-0.1,)}),
    "icnn": Case(labelled, bad={"k": (0,), "ipc": (3,)}, reductions=False),
    "info_nce": Case(paired, bad={**NCE, "backend": ("sparse",)}),
    "tiled_contrastive": Case(paired, {"row_tile": 7, "col_tile": 5}, NCE),
    "siglip": Case(paired, bad={"row_tile": (0,)}),
    "decoupled_softmax": Case(scored, bad={"tau": (0.0, -1.0)}),
    "soft_topk": Case(scored, bad={"k": (0,), "alpha": (0.0,), "tau": (0.0,)}),
    "ccl": Case(scored, bad={"margin": (-1.1, 1.0), "negative_weight": (0, -1.0)}),
    "barlow_twins": Case(paired, bad={"lambd": (0.0, -1.0)}, reductions=False),
    "w_mse": Case(
        paired,
        {"w_size": 12, "eps": 1e-3},
        {"w_size": (1,), "w_iter": (0,), "eps": (-0.1, 1.0)},
        reductions=False,
        multiple=12,
    ),
    "align_uniform": Case(paired, bad={"alpha": (0.0,), "t": (0.0,), "lam": (-1.0,)}, reductions=False),
    "amcl": Case(
        paired,
        {"embedding_size": D, "n_heads": 2, "projection_size": 5},
        {"embedding_size": (0,), "n_heads": (0,), "projection_size": (0,), "base": ("mae",), "temperature": (0.0,)},
    ),
    "pytorch_metric_learning": Case(
        labelled,
        {"loss": "TripletMarginLoss"},
        {"loss": ("TripletMarginLos",), "parameters": ({"marginn": 1},)},
        reductions=False,
    ),
}
if find_spec("pytorch_metric_learning") is None:  # the adapter is registered only where the package is installed
    del CASES["pytorch_metric_learning"]

every = pytest.mark.parametrize("name", CASES)
pml_case = {"pytorch_metric_learning"}


def build(name: str, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return create(name, **{**CASES[name].parameters, **changes})


def evaluate(loss: torch.nn.Module, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Returns the value and the gradients of the inputs and parameters."""
    value = loss(*inputs)
    leaves = [x for x in (*inputs, *loss.parameters()) if x.requires_grad]
    return value, list(torch.autograd.grad(value.sum(), leaves, allow_unused=True))


def test_table_holds_every_loss_of_the_family():
    assert set(CASES) == {entry.name for entry in registry if entry.kind == "loss" and entry.family == "metric"}


@every
def test_entry_says_what_it_is(name):
    entry = registry.get("loss", name)
    assert entry.signature in SIGNATURES
    assert entry.paper
    assert entry.arxiv
    assert isinstance(entry.facts["gather"], bool)
    if entry.facts["gather"]:
        assert "gather" in {parameter.name for parameter in entry.parameters()}
    documented = inspect.getdoc(entry.load())
    for parameter in entry.parameters():
        assert f"{parameter.name}:" in documented or "As :class:" in documented, parameter.name


@every
def test_value_and_gradients_are_float64_and_finite(name):
    value, grads = evaluate(build(name).double(), CASES[name].inputs(12, "random", torch.float64))
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert value.isfinite()
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert any(grad.abs().sum() > 0 for grad in grads)


@every
def test_gradient_is_that_of_the_value(name):
    if not CASES[name].smooth:
        pytest.skip("a factor is detached by definition; its own test has the closed form")
    loss = build(name).double().eval()
    inputs = CASES[name].inputs(12, "random", torch.float64)
    leaves = [x for x in (*inputs, *loss.parameters()) if x.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: loss(*inputs), leaves, fast_mode=True)


@every
def test_order_of_the_batch_does_not_matter(name):
    loss = build(name).double().eval()
    inputs = CASES[name].inputs(12, "random", torch.float64)
    order = torch.randperm(12)
    torch.testing.assert_close(loss(*(x[order] for x in inputs)), loss(*inputs), rtol=1e-12, atol=1e-12)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "huge", "equal"])
def test_half_precision_is_computed_in_float32(name, dtype, kind):
    inputs = CASES[name].inputs(12, kind, dtype)
    value, grads = evaluate(build(name).eval(), inputs)
    assert value.dtype == torch.float32
    assert value.isfinite()
    floating = [x for x in inputs if x.requires_grad]
    assert [grad.dtype for grad in grads[: len(floating)]] == [dtype] * len(floating)
    assert all(grad.isfinite().all() for grad in grads if grad is not None)
    exact = build(name).eval()(*(x.float() if x.is_floating_point() else x for x in inputs))
    torch.testing.assert_close(value, exact)


@every
def test_autocast_does_not_reach_inside(name):
    if name == "amcl":
        pytest.skip("its heads are layers and follow autocast; the loss behind them is nt_xent, tested here")
    inputs = CASES[name].inputs(12, "random", torch.float32)
    loss = build(name).eval()
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)  # w_mse draws a partition
        inside = loss(*inputs)
    assert inside.dtype == torch.float32
    torch.manual_seed(1)
    torch.testing.assert_close(inside, loss(*inputs), rtol=0, atol=0)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["equal", "zero", "huge", "tiny"])
def test_degenerate_embeddings_stay_finite(name, kind, dtype):
    value, grads = evaluate(build(name).to(dtype), CASES[name].inputs(12, kind, dtype))
    assert value.isfinite()
    assert all(grad is None or grad.isfinite().all() for grad in grads)


@every
@pytest.mark.parametrize("batch", [1, 2])
def test_smallest_batches(name, batch):
    inputs = CASES[name].inputs(batch, "random", torch.float64)
    loss = build(name).double()
    if batch % CASES[name].multiple:
        with pytest.raises(LossplugError, match="divide"):
            loss(*inputs)
        return
    value, grads = evaluate(loss, inputs)
    assert value.isfinite()
    assert all(grad is None or grad.isfinite().all() for grad in grads)


@every
def test_empty_batch_is_a_zero_on_the_graph(name):
    if name in pml_case:
        pytest.skip("empty batches are the package's own business")
    loss = build(name).double()
    inputs = CASES[name].inputs(0, "random", torch.float64)
    value = loss(*inputs)
    assert value.shape == ()
    assert value == 0
    assert value.requires_grad
    value.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in loss.parameters())


@every
def test_one_class_or_no_positive_is_finite(name):
    if CASES[name].inputs is paired:
        pytest.skip("has no labels")
    loss = build(name).double()
    x, y = CASES[name].inputs(6, "random", torch.float64)
    alternatives = [torch.zeros_like(y), torch.ones_like(y)]
    if CASES[name].inputs is labelled and "num_classes" not in CASES[name].parameters:
        alternatives.append(torch.arange(6))
    for labels in alternatives:
        value, grads = evaluate(loss, (x, labels))
        assert value.isfinite()
        assert all(grad is None or grad.isfinite().all() for grad in grads)


@every
def test_compiles(name):
    if name in pml_case:
        pytest.skip("whether its own code compiles is the package's business")
    torch._dynamo.reset()
    inputs = CASES[name].inputs(12, "random", torch.float32)
    # Two builds: some losses have state that moves. fullgraph: no break, so a whole training step can be compiled.
    expected, wanted = evaluate(build(name), inputs)
    compiled = torch.compile(build(name), backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value, grads = evaluate(compiled, inputs)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grads, wanted)


@every
def test_reductions_agree(name):
    if not CASES[name].reductions:
        with pytest.raises(LossplugError, match="reduction"):
            build(name, reduction="none")
        return
    inputs = CASES[name].inputs(12, "random", torch.float64)
    rows, total, mean = (
        build(name, reduction=reduction).double().eval()(*inputs) for reduction in ("none", "sum", "mean")
    )
    if name == "amcl":
        torch.testing.assert_close(rows.sum(), total)
        torch.testing.assert_close(rows.mean(dim=1).sum(), mean)
        return
    assert rows.ndim == 1
    torch.testing.assert_close(rows.sum(), total)
    torch.testing.assert_close(rows.mean(), mean)  # in this batch every row counts
    with pytest.raises(LossplugError, match="reduction"):
        build(name, reduction="average")


@every
def test_bad_parameters_are_refused(name):
    for parameter, values in CASES[name].bad.items():
        for value in values:
            with pytest.raises(LossplugError):
                build(name, **{parameter: value})
    with pytest.raises(LossplugError):
        build(name, no_such_parameter=1)


@every
def test_bad_inputs_are_refused(name):
    loss = build(name)
    first, second = CASES[name].inputs(12, "random", torch.float32)
    bad = [(first[:, None, None], second), (first.long(), second), (first, second[:-1]), (first[:, :0], second)]
    if CASES[name].inputs is labelled:
        bad += [(first, second.float()), (first, second[:, None])]
    if CASES[name].inputs is paired:
        bad += [(first, second[:, :-1]), (first, second.long())]
    for arguments in bad:
        with pytest.raises(LossplugError):
            loss(*arguments)


@every
def test_copies_and_state_dict_round_trip(name):
    inputs = CASES[name].inputs(12, "random", torch.float64)
    loss = build(name).double()
    loss(*inputs)  # moves the running statistics of those that have some
    other = build(name).double()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    other.load_state_dict(loss.state_dict())
    expected = loss.eval()(*inputs)
    torch.testing.assert_close(other.eval()(*inputs), expected)
    torch.testing.assert_close(copy.deepcopy(loss)(*inputs), expected)
