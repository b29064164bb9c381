"""The adapter to timm's losses."""

import pytest
import timm.loss
import torch

from lightning_lossplug import LossplugError
from lightning_lossplug.losses import create

torch.manual_seed(0)
LOGITS, INDEX = torch.randn(8, 5), torch.randint(0, 5, (8,))
MULTI = torch.randint(0, 2, (8, 5)).float()
CASES = {
    "LabelSmoothingCrossEntropy": ({"smoothing": 0.2}, INDEX),
    "SoftTargetCrossEntropy": ({}, MULTI / MULTI.sum(1, keepdim=True).clamp_min(1)),
    "BinaryCrossEntropy": ({}, INDEX),
    "AsymmetricLossMultiLabel": ({"gamma_neg": 2}, MULTI),
    "AsymmetricLossSingleLabel": ({}, INDEX),
    "JsdCrossEntropy": ({"num_splits": 2}, INDEX),
    "PolyCrossEntropy": ({}, INDEX),
    "TwoWayLoss": ({}, MULTI),
    "ZlprLoss": ({}, MULTI),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_timms(name):
    parameters, target = CASES[name]
    own, theirs = create("timm", loss=name, parameters=parameters), getattr(timm.loss, name)(**parameters)
    torch.testing.assert_close(own(LOGITS, target), theirs(LOGITS, target))
    assert own(LOGITS.bfloat16(), target).dtype == torch.float32


def test_ignored_rows_are_left_out():
    loss, target = create("timm", loss="PolyCrossEntropy"), INDEX.clone()
    target[:3] = -100
    torch.testing.assert_close(loss(LOGITS, target), loss(LOGITS[3:], INDEX[3:]))
    z = LOGITS.clone().requires_grad_()
    loss(z, torch.full_like(INDEX, -100)).backward()
    assert not z.grad.any()


def test_bad_input():
    for call, said in (
        (lambda: create("timm"), "needs the parameter 'loss'"),
        (lambda: create("timm", loss="PolyCrossEntropie"), "PolyCrossEntropy"),
        (lambda: create("timm", loss="PolyCrossEntropy", parameters={"wrong": 1}), "wrong"),
        (lambda: create("timm", loss="PolyCrossEntropy")(LOGITS, INDEX[:3]), "don't fit"),
        (lambda: create("timm", loss="PolyCrossEntropy")(LOGITS, INDEX, reduction="sum"), "means"),
    ):
        with pytest.raises(LossplugError, match=said):
            call()
