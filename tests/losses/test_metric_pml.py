"""Parity with pytorch-metric-learning, and the adapter to it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import create

pml = pytest.importorskip(
    "pytorch_metric_learning.losses",
    reason="parity needs pytorch-metric-learning (pip install lightning_lossplug[dev])",
)
from pytorch_metric_learning.miners import MultiSimilarityMiner  # noqa: E402
from pytorch_metric_learning.reducers import MeanReducer  # noqa: E402

EXACT = {"rtol": 1e-9, "atol": 1e-9}
Y = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])


def sample(seed: int = 0, batch: int = 8, width: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, width, generator=generator, dtype=torch.float64)


def agree(ours, theirs, x, *arguments) -> None:
    found = []
    for loss in (ours, theirs):
        leaf = x.clone().requires_grad_()
        value = loss(leaf, *arguments)
        value.backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_circle(seed):
    # its softplus is cut off at 20; a gamma that stays below compares exactly
    ours = create("circle", margin=0.3, gamma=3.0)
    agree(ours, pml.CircleLoss(m=0.3, gamma=3.0), sample(seed), Y)


@pytest.mark.parametrize("seed", range(3))
def test_supcon(seed):
    ours = create("supcon", temperature=0.1, base_temperature=0.1, skip_empty=True)
    agree(ours, pml.SupConLoss(temperature=0.1), sample(seed), Y)


@pytest.mark.parametrize("seed", range(3))
def test_tcm(seed):
    agree(create("tcm"), pml.ThresholdConsistentMarginLoss(), sample(seed), Y)


def test_nt_xent():
    a, b = sample(0), sample(1)
    theirs = pml.SelfSupervisedLoss(pml.NTXentLoss(temperature=0.2))
    torch.testing.assert_close(create("nt_xent", scale=5.0)(a, b), theirs(a, b), **EXACT)


@pytest.mark.parametrize("name", ["arcface", "cosface"])
def test_heads(name):
    ours = create(name, num_classes=3, embedding_size=4, m=0.4, s=8.0).double()
    if name == "arcface":
        theirs = pml.ArcFaceLoss(3, 4, margin=math.degrees(0.4), scale=8, reducer=MeanReducer()).double()
    else:
        theirs = pml.CosFaceLoss(3, 4, margin=0.4, scale=8, reducer=MeanReducer()).double()
    theirs.W.data = ours.weight.detach().T.clone()
    agree(ours, theirs, sample(), Y)
    torch.testing.assert_close(ours.weight.grad.T, theirs.W.grad, **EXACT)


def test_circle_with_a_miner_and_a_reference_set():
    x, ref = sample(), sample(1, 5)
    labels = torch.tensor([0, 1, 2, 0, 1])
    pairs = MultiSimilarityMiner()(x, Y, ref, labels)
    theirs = pml.CircleLoss(m=0.3, gamma=3.0)(x, Y, indices_tuple=pairs, ref_emb=ref, ref_labels=labels)
    torch.testing.assert_close(create("circle", margin=0.3, gamma=3.0)(x, Y, ref, labels, pairs), theirs, **EXACT)


class TestAdapter:
    def adapter(self, loss: str, **parameters):
        return create("pytorch_metric_learning", loss=loss, parameters=parameters)

    @pytest.mark.parametrize("loss", ["TripletMarginLoss", "MultiSimilarityLoss", "ContrastiveLoss", "NCALoss"])
    def test_is_the_package_loss(self, loss):
        agree(self.adapter(loss), getattr(pml, loss)(), sample(), Y)

    def test_parameters_are_passed(self):
        x = sample()
        wide, narrow = self.adapter("TripletMarginLoss", margin=1.0), self.adapter("TripletMarginLoss", margin=0.1)
        assert wide(x, Y) > narrow(x, Y)

    def test_owned_weights_are_parameters(self):
        loss = self.adapter("ProxyAnchorLoss", num_classes=3, embedding_size=4)
        assert [p.shape for p in loss.parameters()] == [(3, 4)]

    def test_references_and_pairs(self):
        x, ref, labels = sample(), sample(1, 5), torch.tensor([0, 1, 2, 0, 1])
        loss = self.adapter("ContrastiveLoss")
        expected = pml.ContrastiveLoss()(x, Y, ref_emb=ref, ref_labels=labels)
        torch.testing.assert_close(loss(x, Y, ref, labels), expected)
        pairs = tuple(torch.tensor(i) for i in ([0, 1], [1, 6], [0, 2], [2, 4]))
        torch.testing.assert_close(loss(x, Y, indices_tuple=pairs), pml.ContrastiveLoss()(x, Y, indices_tuple=pairs))

    def test_unknown_names_are_suggested(self):
        with pytest.raises(LossplugError, match="TripletMarginLoss"):
            self.adapter("TripletMargin")
        with pytest.raises(LossplugError, match="SelfSupervised"):
            self.adapter("SelfSupervisedLoss")  # a wrapper around a loss object
        with pytest.raises(LossplugError, match="marginn"):
            self.adapter("TripletMarginLoss", marginn=1)

    def test_half_precision(self):
        x = F.normalize(sample()).half().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = self.adapter("MultiSimilarityLoss")(x, Y)
        value.backward()
        assert value.dtype == torch.float32
        assert x.grad.dtype == torch.float16
