"""SLoRB: its closed forms, and a fit beside a sparse recipe."""

import copy

import pytest
import torch
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import NMSettings, NMTechnique, add_slorb, merge_slorb, nm_mask, slorb_output
from lightning_lossplug.sparsity.slorb import slorb_start
from lightning_lossplug.surgery import fold, latent


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).double()


def test_the_output_is_that_of_a_block_matrix_and_zero_adds_nothing():
    x, s = torch.randn(3, 5, 12).double(), torch.randn(7, 3).double()
    p = torch.kron(torch.eye(3), torch.ones(1, 4)).double()
    assert torch.allclose(slorb_output(x, s), x @ (s @ p).t())
    assert not slorb_output(x, torch.zeros_like(s)).any()


def test_the_start_is_the_least_squares_fit_of_what_is_pruned():
    weight = torch.randn(6, 16).double()
    mask = nm_mask(weight, 2, 4)
    p = torch.kron(torch.eye(2), torch.ones(1, 8)).double()
    pruned = (weight * ~mask).t()
    best = torch.linalg.lstsq(p.t(), pruned).solution.t()
    assert torch.allclose(slorb_start(weight, mask, 8), best)


def test_trained_beside_a_recipe_the_weight_ends_sparse_and_the_boost_trains():
    model, x = net(), torch.randn(8, 16).double()
    add_slorb(model, 2, 4, k=8, include=["0"])
    start = model[0].slorb.s.detach().clone()
    technique = NMTechnique(NMSettings(2, 4, "nm_srste", include=["0"]))
    technique.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    technique.advance(Progress(0, 5))
    for step in range(5):
        model(x).square().mean().backward()
        technique.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        technique.after_step(optimizer)
        technique.advance(Progress(step + 1, 5))
    layer = model[0]
    assert not torch.equal(layer.slorb.s, start)
    mask = layer.weight_transforms["sparsity"].mask
    effective = latent(layer) * mask + layer.slorb.s.repeat_interleave(8, 1)
    assert torch.allclose(layer(x), nn.functional.linear(x, effective, layer.bias))
    plain = fold(model)
    assert int((plain[0].weight == 0).sum()) == 256
    assert torch.allclose(plain(x), model(x))
    with pytest.raises(LossplugError, match="still plugged"):
        merge_slorb(model)
    merged = merge_slorb(copy.deepcopy(plain))
    assert torch.allclose(merged(x), model(x))
    assert set(merged.state_dict()) == set(net().state_dict())
    assert merged[0].weight.all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add_slorb(net(), k=5, include=["0"]), "0: blocks of k=5 don't divide the 16 inputs"),
        (lambda: add_slorb(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), include=["0"]), "is no linear layer"),
    ],
)
def test_bad_layers(call, message):
    with pytest.raises(LossplugError, match=message):
        call()
