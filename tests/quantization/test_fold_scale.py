"""Layer scales that disappear into the integer layer before them."""

import pytest
import torch
from timm.layers import LayerScale
from torch import nn

from lightning_lossplug.quantization import IntegerLayer
from lightning_lossplug.quantization.fold_scale import fold_layer_scales


def layer(dynamic=False, bias=True):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (6, 8), generator=g, dtype=torch.int8)
    step = torch.tensor(1.0 if dynamic else 0.02)
    added = torch.randn(6, generator=g) if bias else None
    made = IntegerLayer(codes, torch.rand(6, generator=g), added, (-127, 127), step, dynamic=dynamic)
    assert made.use("auto")
    return made.eval()


def scaled(gamma=None):
    made = LayerScale(6)
    with torch.no_grad():
        made.gamma.copy_(torch.tensor([0.5, -2.0, 0.0, 1e-5, 3.0, 1.0]) if gamma is None else gamma)
    return made


class TimesTwo(LayerScale):
    def forward(self, x):
        return x * self.gamma * 2


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_numbers_stay(dynamic, bias):
    model, x = nn.Sequential(layer(dynamic, bias), nn.Dropout(0.5), scaled()).eval(), torch.randn(5, 8)
    with torch.no_grad():
        want = model(x)
        assert fold_layer_scales(model) == 1
        assert isinstance(model[2], nn.Identity)
        assert torch.allclose(model(x), want, rtol=1e-6, atol=1e-6)
    assert fold_layer_scales(model) == 0


@pytest.mark.parametrize("case", ["read twice", "hooked", "something else", "after an activation", "scaled twice"])
def test_what_stays(case):
    first, scale = layer(), TimesTwo(6) if case == "something else" else scaled()
    if case == "hooked":
        scale.register_forward_hook(lambda module, args, out: out + 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.scale = first, scale

        def forward(self, x):
            y = self.first(x)
            if case == "after an activation":
                y = torch.nn.functional.gelu(y)
            z = self.scale(y)
            return z + y if case == "read twice" else self.scale(z) if case == "scaled twice" else z

    net, x = Net().eval(), torch.randn(5, 8)
    with torch.no_grad():
        want = net(x)
        assert fold_layer_scales(net) == 0
        assert torch.equal(net(x), want)
