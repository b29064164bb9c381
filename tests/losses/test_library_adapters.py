"""The adapters to the losses of torch.nn and torchvision.ops."""

import pytest
import torch
import torchvision
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.losses import create

torch.manual_seed(0)
X, Y = torch.randn(6, 4), torch.randn(6, 4)
CASES = {
    "HuberLoss": ({"delta": 0.5}, (X, Y)),
    "TripletMarginLoss": ({"margin": 0.3}, (X, Y, X.flip(0))),
    "CosineEmbeddingLoss": ({}, (X, Y, torch.tensor([1, -1, 1, 1, -1, 1]))),
    "GaussianNLLLoss": ({"reduction": "sum"}, (X, Y, Y.exp())),
    "BCEWithLogitsLoss": ({"reduction": "none"}, (X, Y.sigmoid())),
    "MultiMarginLoss": ({}, (X, torch.tensor([0, 1, 2, 3, 0, 1]))),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_torchs_in_float32(name):
    parameters, inputs = CASES[name]
    own, theirs = create("torch", loss=name, parameters=parameters), getattr(nn, name)(**parameters)
    torch.testing.assert_close(own(*inputs), theirs(*inputs))
    half = [x.bfloat16().requires_grad_() if x.is_floating_point() else x for x in inputs]
    value = own(*half)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, theirs(*(x.float() if x.is_floating_point() else x for x in half)))
    assert torch.autograd.grad(value.sum(), half[0])[0].dtype == torch.bfloat16


def test_an_empty_batch_is_zero_and_mistakes_take_one_line():
    empty = X[:0].clone().requires_grad_()
    value = create("torch", loss="HuberLoss")(empty, Y[:0])
    value.backward()
    assert value == 0
    for make, words in (
        (lambda: create("torch", loss="HuberLos"), "Did you mean 'HuberLoss'"),
        (lambda: create("torch", loss="HuberLoss", parameters={"beta": 1}), "parameters of HuberLoss"),
        (lambda: create("torch", loss="HuberLoss")(X, "y"), "takes tensors"),
        (lambda: create("torch", loss="MultiMarginLoss")(X, Y), "MultiMarginLoss"),
    ):
        with pytest.raises(LossplugError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_boxes_by_torchvision():
    a = torch.rand(5, 2)
    boxes = torch.cat([a, a + 0.5], 1)
    target = boxes.roll(1, 0)
    loss = create("torchvision")
    rows = torchvision.ops.generalized_box_iou_loss(boxes, target)
    torch.testing.assert_close(loss(boxes, target), rows)
    torch.testing.assert_close(loss(boxes, target, reduction="mean"), rows.mean())
    half = boxes.bfloat16().requires_grad_()
    assert loss(half, target, reduction="sum").dtype == torch.float32
    empty = boxes[:0].clone().requires_grad_()
    value = loss(empty, target[:0], reduction="mean")
    value.backward()
    assert value == 0
    for call in (
        lambda: loss(boxes, target[:2]),
        lambda: loss(boxes[:, :3], target[:, :3]),
        lambda: loss(boxes.long(), target),
        lambda: create("torchvision", loss="giou_loss"),
        lambda: create("torchvision", parameters={"epsilon": 1}),
    ):
        with pytest.raises(LossplugError):
            call()


@pytest.mark.parametrize("adapter", ["liger", "cut_cross_entropy"])
def test_engines_are_listed_only_where_they_are_installed(adapter):
    from importlib.util import find_spec

    from lightning_lossplug.registry import registry

    found = find_spec({"liger": "liger_kernel"}.get(adapter, adapter)) is not None
    assert found == any(e.name == adapter and e.signature == "hidden_classifier" for e in registry)
