"""The identities of the Bi-Mask card in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lossplug import LossplugError
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import (
    NMBiMask,
    NMSettings,
    NMTechnique,
    backward_mask,
    best_order,
    bimask_linear,
    masked_ste,
    nm_mask,
)
from lightning_lossplug.surgery import fold, latent


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), pattern=st.sampled_from([(2, 4), (1, 4), (2, 8)]))
def test_the_backward_mask(seed, pattern):
    n, m = pattern
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 32, generator=generator, dtype=torch.float64)
    mask, order = nm_mask(weight, n, m), torch.randperm(16, generator=generator)
    back = backward_mask(weight, mask, n, m, order)
    assert not bool((back & ~mask).any())
    assert int(back[order].reshape(16 // m, m, 32).sum(1).max()) <= n
    assert torch.equal(backward_mask(weight.t(), mask.t(), n, m, order, output_axis=1), back.t())
    start = torch.arange(16)
    found = best_order(weight, mask, n, m, start, 10, generator=generator)
    assert int(backward_mask(weight, mask, n, m, found).sum()) >= int(backward_mask(weight, mask, n, m, start).sum())


def test_random_weights_lose_what_the_card_measured():
    torch.manual_seed(0)
    lost = []
    for _ in range(20):
        weight = torch.randn(16, 32)
        mask = nm_mask(weight, 2, 4)
        lost.append(1 - float(backward_mask(weight, mask, 2, 4).sum() / mask.sum()))
    assert 0.12 < sum(lost) / 20 < 0.2


def test_gradients_of_the_linear_function():
    torch.manual_seed(0)
    weight = torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    mask = nm_mask(weight, 2, 4)
    back = backward_mask(weight, mask, 2, 4)
    above = torch.randn(5, 8, dtype=torch.float64)
    into, grad = torch.autograd.grad(bimask_linear(x, weight, mask, back), (x, weight), above)
    assert torch.allclose(into, above @ (weight * back), rtol=1e-14)
    assert torch.allclose(grad, above.t() @ x, rtol=1e-14)
    same, ste = bimask_linear(x, weight, mask, mask), F.linear(x, masked_ste(weight, mask))
    assert torch.equal(same, ste)
    for a, b in zip(
        torch.autograd.grad(same, (x, weight), above), torch.autograd.grad(ste, (x, weight), above), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-14)


LAYERS = {
    "linear": (lambda: nn.Linear(16, 8), (3, 16), 0),
    "conv1d_of_transformers": (lambda: Conv1D(8, 16), (3, 5, 16), 1),
    "conv2d": (lambda: nn.Conv2d(8, 4, 3, stride=2, padding=1), (2, 8, 7, 7), 0),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_send_the_gradient_through_the_backward_mask(kind):
    build, shape, axis = LAYERS[kind]
    torch.manual_seed(0)
    layer = build().double()
    plain = copy.deepcopy(layer)
    technique = NMTechnique(NMSettings(2, 4, "nm_bimask", [""], num_candidates=3))
    technique.attach(layer)
    technique.advance(Progress(0, 10))
    transform = technique.layers[""].transform
    mask = transform.mask
    assert torch.equal(transform.back, backward_mask(latent(layer), mask, 2, 4, transform.order, axis))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        plain.weight.mul_(mask)
    output, want = layer(x), plain(x)
    assert torch.equal(output, want)
    above = torch.randn_like(output)
    into, grad = torch.autograd.grad(output, (x, latent(layer)), above)
    (dense,) = torch.autograd.grad(want, plain.weight, above)
    assert torch.allclose(grad, dense, rtol=1e-12)
    with torch.no_grad():
        plain.weight.copy_(latent(layer) * transform.back)
    (want,) = torch.autograd.grad(plain(x), x, above)
    assert torch.allclose(into, want, rtol=1e-12)
    folded = fold(layer)
    assert not folded._forward_hooks
    assert not folded._forward_pre_hooks
    assert torch.equal(folded(x), layer(x))


def test_an_inplace_activation_may_follow():
    layer = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    technique = NMTechnique(NMSettings(2, 4, "nm_bimask", ["1"]))
    technique.attach(layer)
    technique.advance(Progress(0, 10))
    layer(torch.randn(3, 8)).sum().backward()
    assert latent(layer[1]).grad is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NMBiMask(lambda_w=-1.0), "lambda_w is -1.0"),
        (lambda: NMBiMask(permute_every=0), "permute_every is 0"),
        (lambda: NMTechnique(NMSettings(2, 4, "nm_bimask", [""])).attach(nn.Linear(8, 6)), "the output axis of 6"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(LossplugError, match=message):
        call()


def test_layers_that_it_cannot_take_say_why():
    selection = NMTechnique(NMSettings(2, 4, "nm_bimask")).attach(
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 1), nn.Linear(8, 4))
    )
    notes = {choice.candidate.name: choice.note for choice in selection.choices}
    assert "padding 'same'" in notes["1"]
    assert [c.name for c in selection.taken] == ["2"]
