"""What every classification loss has in common, driven by the table in ``classification_cases``."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from classification_cases import BINARY_CASES, INDEX_CASES, OTHER, batch, build, index_settings

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import FusableLoss, LabelError, create
from lightning_lossplug.losses.stats import logit_stats
from lightning_lossplug.registry import registry

ENTRIES = {e.name: e for e in registry if e.kind == "loss" and e.family == "classification"}
SETTINGS = pytest.mark.parametrize(
    ("name", "parameters"), index_settings(), ids=lambda v: v if isinstance(v, str) else str(v)
)
SIGNATURES = {"logits_index", "logits_pair", "binary_logits", "embeddings_labels_head", "model_inputs_index"}


def value_and_grad(loss, z, y, **options):
    z = z.detach().clone().requires_grad_()
    value = loss(z, y, **options)
    value.sum().backward()
    return value.detach(), z.grad


def test_every_classification_loss_is_in_the_table():
    assert set(ENTRIES) == {*INDEX_CASES, *BINARY_CASES, *OTHER}
    here = Path(__file__).parent
    assert all(f'"{name}"' in (here / file).read_text() for name, file in OTHER.items())


@pytest.mark.parametrize("name", ENTRIES)
def test_registry_facts_describe_the_loss(name):
    entry = ENTRIES[name]
    cls = entry.load()
    assert entry.signature in SIGNATURES
    assert entry.arxiv
    assert entry.paper
    assert len(cls.__doc__) > 100
    assert bool(entry.facts.get("fusable")) == issubclass(cls, FusableLoss)
    assert bool(entry.facts.get("soft")) == getattr(cls, "accepts_soft", False)


@SETTINGS
def test_reduction_weight_ignore_and_denominator(name, parameters):
    case, (z, y) = INDEX_CASES[name], batch(name)
    inputs = case.inputs(y)
    loss = build(name, parameters)
    ignored = y.clone()
    ignored[[1, 4]] = -100
    keep = ignored != -100
    weight = torch.linspace(0.5, 2.0, case.classes, dtype=torch.float64)
    scale = torch.linspace(0.1, 3.0, len(y), dtype=torch.float64)

    def run(*args, **options):
        return copy.deepcopy(loss)(*args, **options)

    rows = run(z, ignored, reduction="none", **inputs)
    assert rows.shape == y.shape
    assert rows[~keep].eq(0).all()
    # Ignoring rows is the same as leaving them out.
    kept_inputs = {k: v[keep] for k, v in inputs.items()}
    left = run(z[keep], y[keep], reduction="none", **kept_inputs)
    torch.testing.assert_close(rows[keep], left)
    torch.testing.assert_close(run(z, ignored, **inputs), left.mean())
    torch.testing.assert_close(run(z, ignored, reduction="sum", **inputs), left.sum())
    torch.testing.assert_close(run(z, ignored, denominator=11.0, **inputs), left.sum() / 11)
    # Weights multiply the rows; the mean divides by the summed weights of what is kept.
    if parameters.get("label_smoothing", 0) == 0 or name != "cross_entropy":
        w = weight[y[keep]]
        torch.testing.assert_close(run(z, ignored, weight=weight, **inputs), (w * left).sum() / w.sum())
        ws = w * scale[keep]
        weighted = run(z, ignored, weight=weight, sample_weight=scale, **inputs)
        torch.testing.assert_close(weighted, (ws * left).sum() / ws.sum())
    in_module = build(name, parameters, weight=weight.tolist(), ignore_index=2, reduction="sum")
    by_call = run(z, y, weight=weight, ignore_index=2, reduction="sum", **inputs)
    torch.testing.assert_close(in_module(z, y, **inputs), by_call)


@SETTINGS
def test_dense_targets_equal_flat_ones(name, parameters):
    case = INDEX_CASES[name]
    if not case.dense:
        z, y = batch(name, 6)
        with pytest.raises(LossplugError):
            build(name, parameters)(z.view(2, 3, -1), y.view(2, 3), **case.inputs(y))
        return
    z, y = batch(name, 24)
    y[3] = -100
    flat = build(name, parameters)(z, y, reduction="none", **case.inputs(y))
    last = build(name, parameters)(
        z.view(2, 12, -1), y.view(2, 12), reduction="none", **{k: v.view(2, 12) for k, v in case.inputs(y).items()}
    )
    torch.testing.assert_close(last, flat.view(2, 12))
    image = z.view(2, 3, 4, -1).movedim(-1, 1)
    spatial = build(name, parameters)(
        image, y.view(2, 3, 4), reduction="none", **{k: v.view(2, 3, 4) for k, v in case.inputs(y).items()}
    )
    torch.testing.assert_close(spatial, flat.view(2, 3, 4))


@SETTINGS
def test_without_a_kept_row_the_loss_is_a_connected_zero(name, parameters):
    z, y = batch(name)
    for rows, target in ((z, torch.full_like(y, -100)), (z[:0], y[:0])):
        value, grad = value_and_grad(build(name, parameters), rows, target, **INDEX_CASES[name].inputs(target))
        assert value == 0
        assert grad.eq(0).all()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [(n, p) for n, p in index_settings() if INDEX_CASES[n].true_gradient and not p.get("detach_modulator")],
    ids=str,
)
def test_gradcheck(name, parameters):
    z, y = batch(name, 4)
    loss, inputs = build(name, parameters), INDEX_CASES[name].inputs(y)
    loss(z, y, **inputs)  # data-dependent initialisation, if any, is over

    def function(z):
        return copy.deepcopy(loss)(z, y, reduction="none", **inputs)

    torch.autograd.gradcheck(function, z.requires_grad_())


# phi'(n) of the losses that are functions phi of the cross-entropy n, at p = p_y.
DERIVATIVES = {
    ("cross_entropy", ()): lambda p: torch.ones_like(p),
    ("focal", (("gamma", 1.5),)): lambda p: (1 - p) ** 1.5 - 1.5 * (1 - p) ** 0.5 * p * p.log(),
    ("poly_loss", (("epsilon", -0.7),)): lambda p: 1 - 0.7 * p,
    ("comp_sum", (("tau", 0.4),)): lambda p: p**-0.6,
    ("gce", (("q", 0.6),)): lambda p: p**0.6,
    ("mae", ()): lambda p: p,
    ("rce", (("A", -3.0),)): lambda p: 3 * p,
    ("symmetric_ce", (("A", -3.0), ("alpha", 0.5), ("beta", 2.0))): lambda p: 0.5 + 6 * p,
}


@pytest.mark.parametrize(("name", "parameters"), DERIVATIVES, ids=str)
def test_functions_of_the_cross_entropy_have_their_closed_gradient(name, parameters):
    z, y = batch(name)
    p, e = z.softmax(1), torch.nn.functional.one_hot(y, z.shape[1]).double()
    slope = DERIVATIVES[name, parameters](p.gather(1, y[:, None]))
    _, grad = value_and_grad(build(name, dict(parameters)), z, y, reduction="sum")
    torch.testing.assert_close(grad, slope * (p - e))


NOT_SHIFT_INVARIANT = ("lse_penalty", "spherical_softmax", "taylor_softmax")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [(n, p) for n, p in index_settings() if n not in NOT_SHIFT_INVARIANT and p.get("normalize", "none") == "none"],
    ids=str,
)
def test_shifting_all_logits_changes_nothing(name, parameters):
    (z, y), loss = batch(name), build(name, parameters)
    inputs = INDEX_CASES[name].inputs(y)
    value, grad = value_and_grad(copy.deepcopy(loss), z, y, reduction="none", **inputs)
    torch.testing.assert_close(copy.deepcopy(loss)(z + 5, y, reduction="none", **inputs), value)
    torch.testing.assert_close(grad.sum(1), torch.zeros(len(y), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@SETTINGS
@pytest.mark.filterwarnings("ignore:comp_sum")
def test_extreme_logits_give_finite_values_and_gradients(name, parameters, dtype):
    case = INDEX_CASES[name]
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(9) % case.classes
    z = 1e4 * (2 * torch.randint(2, (9, case.classes), generator=generator) - 1).to(torch.float64)
    z[0], z[0, y[0]] = -1e4, 1e4  # certain and right
    z[1], z[1, y[1]] = 1e4, -1e4  # certain and wrong
    z[2] = torch.randn(case.classes, generator=generator, dtype=torch.float64)
    z[3] = torch.linspace(-30, 30, case.classes)
    value, grad = value_and_grad(build(name, parameters).to(torch.float32), z.to(dtype), y, **case.inputs(y))
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.isfinite()
    assert grad.dtype == dtype
    huge = parameters.get("tau", 1) < 1 and dtype == torch.float16  # e^((1-tau) n) is beyond float16 by definition
    assert huge or grad.isfinite().all()


@SETTINGS
def test_autocast_changes_nothing(name, parameters):
    z, y = batch(name)
    z = z.float()
    inputs = INDEX_CASES[name].inputs(y)
    plain = value_and_grad(build(name, parameters).float(), z, y, **inputs)
    z = z.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = build(name, parameters).float()(z, y, **inputs)
    value.backward()
    torch.testing.assert_close((value.detach(), z.grad), plain, rtol=0, atol=0)


@SETTINGS
def test_soft_targets_only_where_the_registry_says_so(name, parameters):
    (z, y), case, loss = batch(name), INDEX_CASES[name], build(name, parameters)
    one_hot = torch.nn.functional.one_hot(y, case.classes).double()
    if ENTRIES[name].facts.get("soft"):
        torch.testing.assert_close(loss(z, one_hot, reduction="none"), loss(z, y, reduction="none"))
        torch.testing.assert_close(loss(z, one_hot), loss(z, y))
        q = torch.rand_like(z).softmax(1)
        torch.autograd.gradcheck(lambda z: loss(z, q, reduction="none"), z.requires_grad_())
        image, maps = z.detach().T[None], q.T[None]
        torch.testing.assert_close(loss(image, maps, reduction="none")[0], loss(z, q, reduction="none"))
        weight = torch.linspace(0.5, 2.0, case.classes, dtype=torch.float64)
        torch.testing.assert_close(
            loss(z, one_hot, weight=weight, reduction="none"), loss(z, y, weight=weight, reduction="none")
        )
    else:
        with pytest.raises(LossplugError, match="class indices"):
            loss(z, one_hot, **case.inputs(y))


@pytest.mark.parametrize(
    ("name", "parameters"), [(n, p) for n, p in index_settings() if ENTRIES[n].facts.get("fusable")], ids=str
)
def test_statistics_form_equals_materialised_form(name, parameters):
    loss = build(name, parameters)
    z, y = batch(name)
    z = z.requires_grad_()
    u = torch.randn(len(y), dtype=torch.float64)
    stats = logit_stats(z, y, loss.needs)
    if parameters.get("active") in ("nfl", "ngce"):
        with pytest.raises(LossplugError, match="needs all logits"):
            loss.from_stats(stats)
        return
    a, b = loss.from_stats(stats), loss.rows(z, y)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad((u * x).sum(), z)[0] for x in (a, b)))
    if loss.spherical:
        blind = loss.from_stats(stats._replace(lse=torch.full_like(stats.lse, math.nan)))
        torch.testing.assert_close(blind, a)


@SETTINGS
def test_bad_inputs_are_refused_in_one_line(name, parameters):
    (z, y), loss = batch(name), build(name, parameters)
    inputs = INDEX_CASES[name].inputs(y)
    wrong = [(z, y[:-1]), (z, y.double()), (z.long(), y), (z[None, None], y), (z.sum(), y)]
    for logits, target in wrong:
        with pytest.raises(LossplugError) as caught:
            loss(logits, target, **inputs)
        assert "\n" not in str(caught.value)
    for label in (-1, INDEX_CASES[name].classes):
        with pytest.raises(LabelError, match=f"label {label} is outside") as caught:
            loss(z, y.clone().index_fill(0, torch.tensor([2]), label), **inputs)
        assert isinstance(caught.value, IndexError | ValueError)
    with pytest.raises(LossplugError, match="reduction"):
        loss(z, y, reduction="avg", **inputs)
    with pytest.raises(LossplugError, match="weight"):
        loss(z, y, weight=torch.ones(3 if INDEX_CASES[name].classes == 2 else 2), **inputs)
    with pytest.raises(LossplugError, match="sample_weight"):
        loss(z, y, sample_weight=torch.ones(3), **inputs)
    with pytest.raises(TypeError, match="unexpected keyword"):
        loss(z, y, temperature=z, **inputs)


@pytest.mark.parametrize(
    ("name", "bad"), [(n, p) for n, c in {**INDEX_CASES, **BINARY_CASES}.items() for p in c.bad], ids=str
)
def test_parameters_out_of_range_are_refused(name, bad):
    with pytest.raises(LossplugError, match=next(iter(bad))):
        create(name, **{**{**INDEX_CASES, **BINARY_CASES}[name].required, **bad})


def test_stateless_losses_compile_without_graph_breaks():
    losses = {
        n: (build(n, case.required).float(), case)
        for n, case in INDEX_CASES.items()
        if not (ENTRIES[n].facts.get("stateful") or case.inputs(torch.zeros(1, dtype=torch.long)))
    }
    batches = {n: batch(n) for n in losses}
    targets = {n: b[1] for n, b in batches.items()}
    z = {n: b[0].float() for n, b in batches.items()}
    for n, case in BINARY_CASES.items():
        if not ENTRIES[n].facts.get("stateful"):
            losses[n], targets[n], z[n] = (build(n, {}).float(), case), torch.tensor([0, 1, 1]), torch.randn(3)

    def total(z):
        return {n: loss(z[n], targets[n]) for n, (loss, _) in losses.items()}

    torch._dynamo.reset()
    compiled, eager = torch.compile(total, fullgraph=True, backend="aot_eager")(z), total(z)
    assert compiled.keys() == eager.keys()
    torch.testing.assert_close(compiled, eager)


def binary_settings():
    return [(n, p) for n, c in BINARY_CASES.items() for p in c.settings()]


@pytest.mark.parametrize(("name", "parameters"), binary_settings(), ids=str)
def test_binary_losses_reduce_ignore_and_weigh(name, parameters):
    generator = torch.Generator().manual_seed(0)
    s = 3 * torch.randn(9, generator=generator, dtype=torch.float64)
    t = torch.randint(2, (9,), generator=generator)
    loss = build(name, parameters).eval()
    rows = loss(s, t, reduction="none")
    for other in (t.double(), t.bool()):
        torch.testing.assert_close(loss(s, other, reduction="none"), rows)
    ignored = t.clone()
    ignored[2] = -100
    keep = ignored != -100
    torch.testing.assert_close(loss(s, ignored, reduction="none"), torch.where(keep, rows, 0))
    torch.testing.assert_close(loss(s, ignored), rows[keep].mean())
    torch.testing.assert_close(loss(s, ignored, denominator=3), rows[keep].sum() / 3)
    scale = torch.linspace(0.5, 2, 9, dtype=torch.float64)
    torch.testing.assert_close(loss(s, t, sample_weight=scale), (scale * rows).sum() / scale.sum())
    torch.autograd.gradcheck(lambda s: loss(s, t, reduction="none"), s.clone().requires_grad_())
    assert loss(s, torch.full_like(t, -100)) == 0
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        extreme = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0, 25.0, -25.0], dtype=dtype)
        value, grad = value_and_grad(loss, extreme, torch.tensor([1, 1, 0, 0, 1, 1, 0]))
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert grad.isfinite().all()
        assert grad.dtype == dtype
    with pytest.raises(LossplugError, match="sample_weight"):
        loss(s, t, sample_weight=scale[:4])
    for bad_s, bad_t in ((s, t[:-1]), (s.long(), t), (s, t + 1), (torch.randn(9, 3), t)):
        with pytest.raises(LossplugError):
            loss(bad_s, bad_t)
