"""torchao tensors: the trained values to the last bit, the same outputs, what stays."""

import pytest
import torch
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.integrations import torchao_model
from lightning_lossplug.quantization import QATSettings, QATTechnique
from lightning_lossplug.surgery import fold

pytest.importorskip("torchao", reason="needs the package torchao (extra: torchao)")


def trained(bits, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    QATTechnique(QATSettings(bits, None, first_last_bits=None, include=["0", "2"], **settings)).attach(model)
    return model.eval()


@pytest.mark.parametrize(
    ("bits", "settings"),
    [(8, {}), (4, {"granularity": "group", "group_size": 32}), (3, {"granularity": "tensor"})],
)
def test_values_are_those_of_training(bits, settings):
    model = trained(bits, **settings)
    made, left = torchao_model(model)
    assert left == {}
    want, x = fold(model), torch.randn(5, 64)
    for i in (0, 2):
        assert torch.equal(made[i].weight.dequantize(), want[i].weight)
        assert made[i].weight.target_dtype == getattr(torch, f"int{bits}")
    torch.testing.assert_close(made(x), want(x))


def test_what_has_no_form_says_so():
    with pytest.raises(LossplugError, match="no weight can be a torchao tensor: it has no quantised layer"):
        torchao_model(nn.Linear(2, 2))
    with pytest.raises(LossplugError, match="0: no weight can be a torchao tensor: binarydm has no integer codes"):
        torchao_model(trained(2, weight="binarydm"))
