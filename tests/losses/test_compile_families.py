"""Losses outside classification compile without a graph break, all but those whose control flow needs numbers."""

from __future__ import annotations

import copy

import family_cases
import test_metric_family as metric
import torch

from lightning_lossplug.losses import create

# Each has a reason of its own: a number of iterations that follows from the data (sinkhorn), an operator of torch whose
# output size does (ctc), code of another library.
BREAKS = {"sinkhorn", "ctc", "pytorch_metric_learning"}


def single(x):
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.detach().float().requires_grad_(x.requires_grad)
    return x


def calls():
    for name, case in family_cases.CASES.items():
        loss = create(name, **case.required)
        x, rest = case.inputs(family_cases.ROWS, torch.Generator().manual_seed(0))
        if hasattr(loss, "set_values"):  # in the call, the number of tokens with a value would follow from the data
            loss.set_values(rest[-1])
            rest = rest[:-1]
        yield name, loss, (x, rest)
    for name, case in metric.CASES.items():
        yield name, metric.build(name).eval(), case.inputs(12, "random", torch.float32)


def test_one_graph_each():
    losses, inputs = {}, {}
    for name, loss, given in calls():
        if name not in BREAKS:
            losses[name] = loss.float()
            inputs[name] = torch.utils._pytree.tree_map(single, given)

    def values(inputs):
        found = {}
        for name, loss in losses.items():
            if name in family_cases.CASES:
                x, rest = inputs[name]
                found[name] = family_cases.call(name, loss, x, rest)
            else:
                found[name] = loss(*inputs[name])
        return found

    torch._dynamo.reset()
    expected = copy.deepcopy(values)(inputs)
    compiled = torch.compile(values, fullgraph=True, backend="eager")(inputs)
    torch.testing.assert_close(compiled, expected)
    assert len(compiled) > 30
