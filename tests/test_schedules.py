"""Schedules against closed forms, in every unit."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lossplug import LossplugError, registry
from lightning_lossplug.schedules import Constant, Cosine, Cubic, Exponential, Linear, Progress, Step, as_schedule

CURVES = [Linear, Cosine, Cubic, Exponential]


@pytest.mark.parametrize("curve", CURVES)
@given(step=st.integers(0, 120))
def test_starts_ends_and_stays_between(curve, step):
    schedule = curve(2.0, -1.0, 0.25, 0.75)
    value = schedule(Progress(step, 100))
    assert -1 <= value <= 2
    if step <= 25:
        assert value == 2
    if step >= 75:
        assert value == -1
    assert value >= schedule(Progress(step + 1, 100))


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (Linear, 0.7),
        (Cosine, 1 - (1 - math.cos(0.3 * math.pi)) / 2),
        (Cubic, 0.7**3),
        (Exponential, 1e-3**0.3),
    ],
)
def test_closed_forms(curve, expected):
    assert curve(1.0, 0.0)(Progress(30, 100)) == pytest.approx(expected, rel=1e-12)


def test_units_agree():
    progress = Progress(30, 100, steps_per_epoch=10)
    values = [
        Linear(0, 1, 0.0, 0.5)(progress),
        Linear(0, 1, 0, 50, unit="steps")(progress),
        Linear(0, 1, 0, 5, unit="epochs")(progress),
    ]
    assert values == pytest.approx([0.6] * 3)


def test_step_and_constant():
    step = Step({0: 0.0, 0.5: 1.0})
    assert [step(Progress(s, 10)) for s in (0, 4, 5, 10)] == [0, 0, 1, 1]
    assert as_schedule(0.3)(Progress(7)) == Constant(0.3)(Progress(0)) == 0.3
    assert as_schedule(step) is step


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Linear(0, 1, 0.5, 0.5), "before finish"),
        (lambda: Linear(0, 1, 0, 5), "a fraction ends at 1"),
        (lambda: Linear(0, 1, unit="hours"), "unit is 'hours'"),
        (lambda: Linear(float("nan"), 1), "finite"),
        (lambda: Exponential(1, 0, floor=0), "floor is 0"),
        (lambda: Step({0.5: 1.0}), "first point"),
        (lambda: Step({0: 0, 10: 1}), "a fraction ends at 1"),
        (lambda: Linear(0, 1)(Progress(3)), "training length is unknown.*max_steps"),
        (lambda: Linear(0, 1, 0, 2, unit="epochs")(Progress(3)), "length of an epoch is unknown"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(LossplugError, match=message):
        build()


def test_registered():
    names = {e.name for e in registry if e.kind == "schedule"}
    assert {"constant", "linear", "cosine", "cubic", "exponential", "step"} <= names
    assert registry.create("schedule", "cosine", start=1.0, end=0.0)(Progress(50, 100)) == pytest.approx(0.5)
