"""Fused integer layers: bytes between layers, activations inside, the outputs of the layers one by one."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from lightning_lossplug.quantization import IntegerLayer, QATSettings, QATTechnique, fuse_layers, integer_model


def calibrated(model, x, **settings):
    technique = QATTechnique(QATSettings(**settings))
    technique.attach(model)
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def layers(model):
    return [m for m in model.modules() if isinstance(m, IntegerLayer)]


def blocks(act):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        act,
        nn.Dropout(0.1),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        copy.deepcopy(act),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 8),
    )


ACTS = [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.GELU("tanh"), nn.Identity()]


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_fused_layers_compute_what_the_layers_do(act):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = calibrated(blocks(act), x)
    made, left = integer_model(model)
    apart, _ = integer_model(model, fuse=False)
    assert left == {}
    first, second, last = layers(made)
    if first.backend != "onednn":
        assert first.emission == second.emission == last.emission
        return
    assert second.emission.scale is None
    if not isinstance(act, nn.GELU):  # which oneDNN computes behind linear layers alone
        assert first.emission.scale == pytest.approx(float(second.input_scale))
        assert (second.emission.act == "none") == isinstance(act, nn.Identity)
        assert made[:4](x).dtype == torch.uint8
    with torch.no_grad():
        want, got = apart(x), made(x)
        assert (got - want).abs().max() <= 5e-3 * (want.max() - want.min())  # a code of 255 may differ
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(twin(x), got)
        half = copy.deepcopy(made).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - want).abs().max() <= 0.05 * (want.max() - want.min())


def test_narrow_codes_end_where_the_relu_is_cut():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    made, _ = integer_model(calibrated(blocks(nn.ReLU()), x, bits_w=4, bits_a=4, first_last_bits=4))
    first, _, _ = layers(made)
    if first.backend == "onednn":
        assert first.emission.act == "hardtanh"
        assert int(made[:4](3 * x).max()) == 15
    made, _ = integer_model(calibrated(blocks(nn.SiLU()), x, bits_w=4, bits_a=4, first_last_bits=4))
    assert layers(made)[0].emission.scale is None  # signed codes of 4 bits can't be cut by the kernel


@pytest.mark.parametrize("kind", ["none", "tanh"])
def test_feed_forward_layers(kind):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(kind), nn.Dropout(0.1), nn.Linear(32, 8))
    model = calibrated(net, x)
    made, _ = integer_model(model)
    with torch.no_grad():
        want = model(x)
        assert (made(x) - want).abs().max() <= 1e-2 * (want.max() - want.min())
    assert made(x).shape == (2, 5, 8)


class Forked(nn.Module):
    """Two readers with steps of their own, and one module that is called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Linear(8, 8), nn.ReLU()
        self.left, self.right, self.again = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.act(self.stem(x))
        return self.again(self.left(x)) + self.again(self.right(x * 2))


def test_forks_and_shared_layers_get_no_bytes():
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    model = calibrated(Forked(), x, first_last_bits=8)
    made, _ = integer_model(model)
    assert all(layer.emission.scale is None for layer in layers(made))
    assert made.stem.emission.act in ("relu", "none")
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-4)
    assert fuse_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == 0


def test_a_residual_network():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model = calibrated(timm.create_model("resnet10t", num_classes=10), x)
    made, left = integer_model(model)
    assert left == {}
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in made.modules())
    with torch.no_grad():
        want = model(x)
        assert (made(x) - want).abs().max() <= 0.02 * (want.max() - want.min())
    if layers(made)[0].backend == "onednn":
        assert sum(layer.emission.scale is not None for layer in layers(made)) >= 6
