"""SCALLION and SCAFCOM on quadratics of several clients, against their equations in float64."""

import pytest
import torch

from lightning_lossplug.communication import Draw, Scafcom, Scallion, create, create_rule, topk
from lightning_lossplug.errors import LossplugError

CLIENTS, SIZE = 4, 12


def problem():
    generator = torch.Generator().manual_seed(0)
    curvature = 0.5 + torch.rand(CLIENTS, SIZE, generator=generator, dtype=torch.float64)
    goals = 4 * torch.randn(CLIENTS, SIZE, generator=generator, dtype=torch.float64)
    return curvature, goals, (curvature * goals).sum(0) / curvature.sum(0)


def train(rule, compressor, rounds, local_steps, lr=0.02, lr_global=1.0):
    """The rule as the callback drives it: steps with corrected gradients, mean gradients read off the weights."""
    curvature, goals, _ = problem()
    x, states = torch.zeros(SIZE, dtype=torch.float64), [None] * CLIENTS
    for round_ in range(rounds):
        means = []
        for i in range(CLIENTS):
            y, correction = x, rule.correction(states[i])
            for _ in range(local_steps):
                y = y - lr * (curvature[i] * (y - goals[i]) + correction)
            means.append((x - y) / (lr * local_steps) - correction)
        out, states = rule.step(states, means, compressor, Draw(step=round_, name="w"))
        x = x - lr_global * lr * local_steps * out
    return x, states


def by_definition(rounds, local_steps, sampled, compress=None, alpha=None, beta=None, lr=0.02, lr_global=1.0):
    """The equations of the method card."""
    curvature, goals, _ = problem()
    x = c = torch.zeros(SIZE, dtype=torch.float64)
    ci, vi = [c] * CLIENTS, [c] * CLIENTS
    for round_ in range(rounds):
        sent = []
        for i in sampled(round_):
            y = x
            for _ in range(local_steps):
                y = y - lr * (curvature[i] * (y - goals[i]) - ci[i] + c)
            slope = (x - y) / (lr * local_steps)
            if beta is None:
                q = compress(alpha * (slope - c))
            else:
                vi[i] = (1 - beta) * vi[i] + beta * (slope + ci[i] - c)
                q = compress(vi[i] - ci[i])
            ci[i] = ci[i] + q
            sent.append(q)
        mean = sum(sent) / len(sent)
        x = x - lr_global * lr * local_steps * (mean + c)
        c = c + len(sent) / CLIENTS * mean
    return x, c, ci


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["scallion", "scafcom"])
def test_rounds_follow_the_equations(kind, participation):
    identity = kind == "scallion"  # a random compressor would have to draw alike; Top-k is a function
    rule = Scallion(0.4, participation) if identity else Scafcom(0.3, participation)

    def sampled(round_):
        return [i for i, w in enumerate(rule.weights(CLIENTS, round_)) if w > 0]

    x, states = train(rule, create("identity") if identity else create("topk", ratio=0.25), 15, 5, lr_global=0.8)
    if identity:
        expected = by_definition(15, 5, sampled, lambda v: v, alpha=0.4, lr_global=0.8)
    else:
        expected = by_definition(15, 5, sampled, lambda v: topk(v, 3), beta=0.3, lr_global=0.8)
    torch.testing.assert_close(x, expected[0], rtol=1e-10, atol=1e-10)
    for state, control in zip(states, expected[2], strict=True):
        torch.testing.assert_close(state["control"], control, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state["average"], expected[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(expected[1], sum(expected[2]) / CLIENTS, rtol=1e-9, atol=1e-9)


def test_who_reports_is_drawn_anew_and_counted():
    rule = Scafcom(participation=0.5)
    drawn = [tuple(rule.weights(CLIENTS, round_)) for round_ in range(200)]
    assert all(sorted(weights) == [0.0, 0.0, 0.5, 0.5] for weights in drawn)
    assert len(set(drawn)) == 6
    assert drawn == [tuple(Scafcom(participation=0.5).weights(CLIENTS, round_)) for round_ in range(200)]
    assert sorted(Scafcom(participation=0.01).weights(CLIENTS, 0)) == [0.0, 0.0, 0.0, 1.0]


def test_one_local_step_and_all_clients_is_ef21_sgdm():
    x, _ = train(Scafcom(beta=0.3), create("topk", ratio=0.25), 30, 1)
    curvature, goals, _ = problem()
    y, states = torch.zeros(SIZE, dtype=torch.float64), [None] * CLIENTS
    rule = create_rule("ef21_sgdm", beta=0.3)
    for _ in range(30):
        grads = [h * (y - goal) for h, goal in zip(curvature, goals, strict=True)]
        out, states = rule.step(states, grads, create("topk", ratio=0.25))
        y = y - 0.02 * out
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_one_step_without_compression_is_gradient_descent():
    x, _ = train(Scallion(alpha=1.0), create("identity"), 30, 1)
    curvature, goals, _ = problem()
    y = torch.zeros(SIZE, dtype=torch.float64)
    for _ in range(30):
        y = y - 0.02 * (curvature * (y - goals)).mean(0)
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("rule", "compressor"),
    [
        (Scallion(alpha=0.2), create("randk", ratio=0.25, unbiased=True)),
        (Scafcom(beta=0.3), create("topk", ratio=0.2)),
        (Scafcom(beta=0.3, participation=0.5), create("topk", ratio=0.2)),
    ],
)
def test_they_reach_the_common_solution_although_clients_disagree(rule, compressor):
    _, _, best = problem()
    x, _ = train(rule, compressor, 600, 5, lr=0.02)
    assert float((x - best).norm() / best.norm()) < 1e-3


def test_bad_options_of_local_updates():
    with pytest.raises(LossplugError, match="alpha"):
        Scallion(alpha=0.0)
    with pytest.raises(LossplugError, match="beta"):
        Scafcom(beta=1.5)
    with pytest.raises(LossplugError, match="participation"):
        Scafcom(participation=0.0)
    with pytest.raises(LossplugError, match="biased"):
        Scallion().check(create("topk"))
    with pytest.raises(LossplugError, match="unbiased=False"):
        Scafcom().check(create("qsgd", unbiased=True))
