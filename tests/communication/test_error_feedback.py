"""Rules of error feedback against their equations, written out again in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.communication import EF21, EF21W, Draw, EControl, create, create_rule, ef21_step_size, topk
from lightning_lossplug.errors import LossplugError

RANKS, SIZE, STEPS = 3, 24, 40
RULES = {
    "ef14": {},
    "econtrol": {"eta": 0.1},
    "ef21": {},
    "ef21_w": {"weights": [0.5, 0.3, 0.2]},
    "ef21_sgdm": {"beta": 0.2},
}


def gradients(steps=STEPS, seed=0):
    """What every rank sees at every step: far apart, and noisy."""
    generator = torch.Generator().manual_seed(seed)
    base = 3 * torch.randn(RANKS, SIZE, generator=generator, dtype=torch.float64)
    noise = torch.randn(steps, RANKS, SIZE, generator=generator, dtype=torch.float64)
    return [list(base + n) for n in noise]


def run(rule, compressor, seen):
    states, given_out, history = [None] * RANKS, [], []
    for step, grads in enumerate(seen):
        out, states = rule.step(states, grads, compressor, Draw(step=step, name="w"))
        given_out.append(out)
        history.append(states)
    return torch.stack(given_out), history


def by_definition(name, seen, compress, w):
    """The update equations; returns what the optimizer gets."""
    zero = torch.zeros(SIZE, dtype=torch.float64)
    e, h, v, average = [zero] * RANKS, [zero] * RANKS, [zero] * RANKS, zero
    out = []
    for grads in seen:
        if name == "ef14":
            p = [e[i] + grads[i] for i in range(RANKS)]
            d = [compress(x) for x in p]
            e = [p[i] - d[i] for i in range(RANKS)]
            average = sum(d) / RANKS
        elif name == "econtrol":
            d = [compress(0.1 * e[i] + grads[i] - h[i]) for i in range(RANKS)]
            e = [e[i] + grads[i] - h[i] - d[i] for i in range(RANKS)]
            h = [h[i] + d[i] for i in range(RANKS)]
            average = sum(h) / RANKS
        elif name == "ef21_sgdm":
            v = [0.8 * v[i] + 0.2 * grads[i] for i in range(RANKS)]
            h = [h[i] + compress(v[i] - h[i]) for i in range(RANKS)]
            average = sum(h) / RANKS
        else:
            h = [h[i] + compress(grads[i] / (RANKS * w[i]) - h[i]) for i in range(RANKS)]
            average = sum(w[i] * h[i] for i in range(RANKS))
        out.append(average)
    return torch.stack(out)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("compressor", "compress"), [("topk", lambda x: topk(x, 3)), ("identity", lambda x: x)])
def test_steps_follow_the_equations(name, compressor, compress):
    options = {"ratio": 3 / SIZE} if compressor == "topk" else {}
    found, _ = run(create_rule(name, **RULES[name]), create(compressor, **options), gradients())
    weights = RULES[name].get("weights", [1 / RANKS] * RANKS)
    expected = by_definition(name, gradients(), compress, weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ef14", "econtrol", "ef21", "ef21_w", "none"])
def test_without_compression_the_mean_comes_out(name):
    seen = gradients()
    found, history = run(create_rule(name, **RULES.get(name, {})), create("identity"), seen)
    torch.testing.assert_close(found, torch.stack([sum(g) / RANKS for g in seen]), rtol=1e-12, atol=1e-12)
    for state in history[-1]:
        assert float(state.get("error", torch.zeros(1)).abs().max()) < 1e-12


def test_momentum_without_compression_is_the_running_mean():
    seen, mean = gradients(), torch.zeros(SIZE, dtype=torch.float64)
    found, _ = run(create_rule("ef21_sgdm", beta=0.3), create("identity"), seen)
    for out, grads in zip(found, seen, strict=True):
        mean = 0.7 * mean + 0.3 * sum(grads) / RANKS
        torch.testing.assert_close(out, mean, rtol=1e-12, atol=1e-12)


def test_special_cases_are_the_same_algorithm():
    seen, compressor = gradients(), create("topk", ratio=0.1)
    expected, _ = run(EF21(), compressor, seen)
    for rule in (EControl(eta=0.0), create_rule("ef21_sgdm", beta=1.0), EF21W([0.7, 0.2, 0.1])):
        found, _ = run(rule, compressor, seen)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    rounding = create("natural")  # not homogeneous: there the weights do something
    a, b = run(EF21(), rounding, seen)[0], run(EF21W([0.7, 0.2, 0.1]), rounding, seen)[0]
    assert not torch.allclose(a, b, rtol=1e-3)


def test_ef14_sends_everything_in_the_end():
    seen = gradients()
    found, history = run(create_rule("ef14"), create("scaled_sign"), seen)
    left = sum(state["error"] for state in history[-1]) / RANKS
    total = sum(sum(grads) for grads in seen) / RANKS
    torch.testing.assert_close(found.sum(0) + left, total, rtol=1e-11, atol=1e-11)


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(["econtrol", "ef21", "ef21_w", "ef21_sgdm"]),
    compressor=st.sampled_from(["topk", "randk", "scaled_sign", "natural", "qsgd", "block_topk", "lowrank"]),
    init=st.sampled_from(["zero", "dense"]),
    seed=st.integers(0, 100),
)
def test_the_average_is_that_of_the_estimates(name, compressor, init, seed):
    rule = create_rule(name, **RULES[name], init=init)
    _, history = run(rule, create(compressor), gradients(12, seed))
    for states in history:
        mean = sum(w * s["estimate"] for w, s in zip(rule.weights(RANKS, 0), states, strict=True))
        torch.testing.assert_close(states[0]["average"], mean, rtol=1e-11, atol=1e-11)


def test_econtrol_error_is_the_sum_of_what_the_estimates_missed():
    seen = gradients()
    _, history = run(EControl(eta=0.1), create("topk", ratio=0.1), seen)
    for rank in range(RANKS):
        missed = sum(g[rank] - s[rank]["estimate"] for g, s in zip(seen, history, strict=True))
        torch.testing.assert_close(history[-1][rank]["error"], missed, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_scaled_gradients_scale_everything(name):
    seen = gradients()
    a, _ = run(create_rule(name, **RULES[name]), create("topk", ratio=0.1), seen)
    b, _ = run(create_rule(name, **RULES[name]), create("topk", ratio=0.1), [[8 * g for g in gs] for gs in seen])
    torch.testing.assert_close(b, 8 * a)


@pytest.mark.parametrize("name", ["econtrol", "ef21", "ef21_w", "ef21_sgdm"])
def test_a_dense_start_is_exact_at_the_first_step(name):
    seen = gradients(3)
    found, history = run(create_rule(name, **RULES[name], init="dense"), create("topk", ratio=0.05), seen)
    torch.testing.assert_close(found[0], sum(seen[0]) / RANKS, rtol=1e-12, atol=1e-12)
    if name == "ef21_sgdm":
        torch.testing.assert_close(history[0][1]["momentum"], seen[0][1])


@pytest.mark.parametrize("name", ["econtrol", "ef21", "ef21_w", "ef21_sgdm"])
def test_another_number_of_ranks_keeps_the_average(name):
    rule = create_rule(name, **{**RULES[name], **({"weights": None} if name == "ef21_w" else {})})
    _, history = run(rule, create("topk", ratio=0.1), gradients())
    shared = {key: history[-1][0][key] for key in rule.shared}
    fresh = rule.restart(shared)
    assert set(fresh) == {*rule.local, *rule.shared}
    assert torch.equal(fresh["estimate"], shared["average"])
    if name == "ef21_sgdm":
        assert torch.equal(fresh["momentum"], shared["average"])
    if name == "econtrol":
        assert not fresh["error"].any()


def test_error_feedback_converges_where_compression_alone_does_not():
    """Quadratics of three ranks that pull in different directions; Top-1 of 24."""
    generator = torch.Generator().manual_seed(3)
    goals = 5 * torch.randn(RANKS, SIZE, generator=generator, dtype=torch.float64)
    best, left = goals.mean(0), {}
    for name in ("none", "econtrol", "ef21"):
        rule, compressor = create_rule(name), create("topk", ratio=1 / SIZE)
        x, states = torch.zeros(SIZE, dtype=torch.float64), [None] * RANKS
        for _ in range(1200):
            out, states = rule.step(states, [x - goal for goal in goals], compressor)
            x = x - 0.015 * out
        left[name] = float((x - best).norm() / best.norm())
    assert left["ef21"] < 1e-4
    assert left["econtrol"] < 1e-2
    assert left["none"] > 0.1


def test_step_sizes():
    first, later = ef21_step_size([1.0, 1.0, 10.0], 4.0, 0.1)
    assert first < later < 1 / 4.0
    assert ef21_step_size([2.0, 2.0], 2.0, 0.1)[0] == pytest.approx(ef21_step_size([2.0, 2.0], 2.0, 0.1)[1])
    assert ef21_step_size([1.0, 3.0], 2.0, 1.0) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("econtrol", {"eta": 1.0}),
        ("econtrol", {"eta": -0.1}),
        ("ef21", {"init": "warm"}),
        ("ef21_w", {"weights": [0.5, 0.4]}),
        ("ef21_w", {"weights": [1.5, -0.5]}),
        ("ef21_sgdm", {"beta": 0.0}),
        ("ef21", {"beta": 0.1}),
    ],
)
def test_bad_options_of_rules(name, options):
    with pytest.raises(LossplugError):
        create_rule(name, **options)


def test_unsuitable_pairs():
    with pytest.raises(LossplugError, match="unbiased=False"):
        EF21().check(create("qsgd", unbiased=True))
    create_rule("none").check(create("qsgd", unbiased=True))
    with pytest.raises(LossplugError, match="2 weights for 3 ranks"):
        EF21W([0.5, 0.5]).weights(3, 0)
    assert "above the compressor's contraction" in EControl(eta=0.5).notes(create("topk", ratio=0.1), 1000)[0]
    assert EControl().notes(create("topk", ratio=0.1), 1000) == []
