"""Stateless fake quantisation as a Precision plugin."""

import pytest
import torch
import torch.nn.functional as F
from callback_runs import Plain, assert_equal, data, make_trainer, state_of

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import FakeQuantPrecision, SwapLoss


def rounded(x, largest, bits):
    scale = largest / (2 ** (bits - 1) - 1)
    return (x / scale).round() * scale


def by_hand(net, x, bits_w, bits_a):
    for layer in net:
        if isinstance(layer, torch.nn.Linear):
            weight = rounded(layer.weight, layer.weight.abs().amax(1, keepdim=True), bits_w)
            x = rounded(x, x.abs().max(), bits_a) @ weight.T + layer.bias
        else:
            x = layer(x)
    return x


@torch.no_grad()
def test_products_are_those_of_rounded_operands():
    torch.manual_seed(0)
    net, x = Plain().net, torch.randn(8, 16)
    with FakeQuantPrecision(4, 6).forward_context():
        found = net(x)
        keywords = F.linear(input=x, weight=net[0].weight, bias=net[0].bias)
        assert torch.equal(keywords, net[0](x))
    torch.testing.assert_close(found, by_hand(net, x, 4, 6), rtol=1e-4, atol=1e-5)
    assert not torch.equal(found, net(x))
    with FakeQuantPrecision(None, None).forward_context():
        assert torch.equal(net(x), net(x))


def test_convolutions_have_a_scale_per_channel_and_zeros_stay():
    conv, x = torch.nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    conv.weight.data[1] = 0
    with FakeQuantPrecision(3, None).forward_context():
        found = conv(x)
    weight = conv.weight.detach()
    largest = weight.abs().flatten(1).amax(1).clamp_min(1e-30)[:, None, None, None]
    torch.testing.assert_close(found, F.conv2d(x, rounded(weight, largest, 3), conv.bias), rtol=1e-4, atol=1e-5)


def test_the_gradient_passes_straight_through():
    x, w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, dtype=torch.float64)
    w.requires_grad_()
    with FakeQuantPrecision(4, 4).forward_context():
        y = F.linear(x, w)
    y.sum().backward()
    plugin = FakeQuantPrecision(4, 4)
    torch.testing.assert_close(w.grad, plugin.round_input(x).detach().sum(0).expand_as(w))
    torch.testing.assert_close(x.grad, plugin.round_weight(w).detach().sum(0).expand_as(x))


def test_a_fit_sees_it_and_leaves_nothing():
    states = []
    for plugins in ([], [FakeQuantPrecision(3, 3)], [FakeQuantPrecision(3, 3)]):
        torch.manual_seed(0)
        module = Plain()
        trainer = make_trainer(max_epochs=2, plugins=plugins, callbacks=[SwapLoss("focal")])
        trainer.fit(module, data())
        assert set(module.state_dict()) == set(Plain().state_dict())
        assert all(value.isfinite().all() for value in module.state_dict().values())
        states.append(state_of(module))
    assert_equal(states[1], states[2])
    assert not torch.equal(states[0]["net.0.weight"], states[1]["net.0.weight"])


@pytest.mark.parametrize("bits", [1, 17, 2.5, True, "8"])
def test_other_bits_are_refused(bits):
    with pytest.raises(LossplugError, match="from 2 to 16"):
        FakeQuantPrecision(bits)
