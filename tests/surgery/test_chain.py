"""Method chains: order, one patch, nothing left."""

import copy
import inspect

import pytest
import torch
from torch import nn

from lightning_lossplug.surgery import unwrap_method, wrap_method, wrapped_methods


class Model(nn.Module):
    def step(self, batch, scale=1):
        """The step."""
        return [f"step{batch * scale}"]


def tag(name):
    return lambda inner, *args, **kwargs: [name, *inner(*args, **kwargs)]


def test_lower_orders_are_further_out_whatever_came_first():
    model = Model()
    wrap_method(model, "step", "b", tag("b"), order=2)
    wrap_method(model, "step", "a", tag("a"), order=1)
    wrap_method(model, "step", "b2", tag("b2"), order=2)
    assert model.step(3, scale=2) == ["a", "b", "b2", "step6"]


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_removal_in_any_order_leaves_nothing(order):
    model = Model()
    before = dict(vars(model))
    for key in ("a", "b"):
        wrap_method(model, "step", key, tag(key))
    assert wrapped_methods(model) == ("step",)
    for key in order:
        unwrap_method(model, "step", key)
        unwrap_method(model, "step", key)
    assert vars(model) == before
    assert wrapped_methods(model) == ()
    assert model.step(1) == ["step1"]


def test_the_same_key_replaces_its_wrapper():
    model = Model()
    wrap_method(model, "step", "a", tag("old"))
    wrap_method(model, "step", "a", tag("new"))
    assert model.step(1) == ["new", "step1"]


def test_an_instance_attribute_is_put_back():
    model = Model()
    model.step = mine = lambda batch: ["mine"]
    wrap_method(model, "step", "a", tag("a"))
    assert model.step(1) == ["a", "mine"]
    unwrap_method(model, "step", "a")
    assert model.step is mine


def test_signature_is_visible_unless_asked_otherwise():
    model = Model()
    wrap_method(model, "step", "a", tag("a"))
    assert list(inspect.signature(model.step).parameters) == ["batch", "scale"]
    unwrap_method(model, "step", "a")
    wrap_method(model, "step", "a", tag("a"), look_through=False)
    assert not hasattr(model.step, "__wrapped__")


def test_a_deep_copy_does_not_copy_the_keys():
    class Callback:
        def __deepcopy__(self, memo):
            raise AssertionError("a callback was copied with the module")

    model, key = nn.Sequential(nn.Linear(2, 2)), Callback()
    wrap_method(model, "forward", key, lambda inner, x: inner(x) + 1)
    copy.deepcopy(model)
    unwrap_method(model, "forward", key)
    assert torch.equal(model(torch.zeros(1, 2)), model[0].bias[None])
