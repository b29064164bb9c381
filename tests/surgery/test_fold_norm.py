"""Batch norms folded into the products before them: the same outputs, and reasons for those that stay."""

import pytest
import timm
import torch
from torch import nn

from lightning_lossplug.quantization import QATSettings, QATTechnique
from lightning_lossplug.surgery import fold_batch_norm


def settle(model):
    """Running statistics and affine parameters that are not those of a new norm."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(-0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "efficientnet_lite0"])
def test_timm_models_compute_the_same(name):
    torch.manual_seed(0)
    model = settle(timm.create_model(name, num_classes=10)).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    folded, left = fold_batch_norm(model)
    assert left == {}
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(folded(x), want, rtol=1e-10, atol=1e-12)
        single = folded.float()(x.float())
    assert (single - want).abs().max() <= 1e-5 * want.abs().max()
    assert any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())  # a copy was folded


class Mixed(nn.Module):
    """What must stay: a norm first, one after a sum, one whose input has another reader, tied weights."""

    def __init__(self):
        super().__init__()
        self.first, self.good, self.norm = nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)
        self.shared, self.after_shared = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.tied, self.after_tied = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.tied.weight
        self.sum, self.batch = nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False)
        self.last = nn.Linear(8, 8)

    def forward(self, x, mask=None):
        if mask is not None:
            x = x * mask
        x = self.norm(self.good(self.first(x)))
        y = self.shared(x)
        x = y + self.after_shared(y)
        x = self.sum(x + self.twin(self.after_tied(self.tied(x))))
        return self.batch(self.last(x))


def test_norms_that_stay_say_why():
    torch.manual_seed(0)
    model = settle(Mixed())
    folded, left = fold_batch_norm(model)
    nothing = "nothing it could be folded into comes before it"
    assert left == {
        "first": nothing,
        "after_shared": nothing,
        "sum": nothing,
        "after_tied": "the weight of tied is tied to another layer",
        "batch": "it has no running statistics",
    }
    x = torch.randn(5, 8)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    assert isinstance(folded.norm, nn.Identity)


def test_parts_of_what_cannot_be_traced_and_plugged_layers():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

        def forward(self, x):
            x = self.block(x).mean((2, 3))
            return self.head(x) if float(x.detach().sum()) > -1e9 else x

    torch.manual_seed(0)
    model, x = settle(Outer()), torch.randn(2, 3, 6, 6)
    want = model(x)
    technique = QATTechnique(QATSettings(include=["head.0"]))
    technique.attach(model)
    same, left = fold_batch_norm(model, inplace=True)
    assert same is model
    assert left == {"head.1": "the weight of head.0 passes through a technique: fold that first"}
    technique.detach(model)
    assert fold_batch_norm(model, inplace=True)[1] == {}
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


def test_tracing_leaves_nothing_behind():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.product, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), None

        def forward(self, x):
            self.last = self.norm(self.product(x))
            return self.last

    model = Remembers().eval()
    folded, left = fold_batch_norm(model, inplace=True)
    assert left == {}
    assert folded.last is None
    assert isinstance(folded.norm, nn.Identity)
