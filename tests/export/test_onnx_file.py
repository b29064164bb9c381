"""ONNX files of sparse models: the outputs of torch, the zeros of the weights, and refusals."""

import pytest
import torch
from torch import nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.export import export_onnx
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import NMSettings, NMTechnique
from lightning_lossplug.surgery import fold

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason=f"needs the package {package} (extra: onnx)")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x, scale):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3))) * scale


def sparse():
    model = Net().eval()
    technique = NMTechnique(NMSettings(n=1, m=4, recipe="nm_ste", include=["conv", "head"]))
    technique.attach(model)
    technique.advance(Progress(0, 1))
    return model


INPUTS = {"x": torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1)), "scale": torch.ones(2, 1)}


def test_the_file_computes_the_same_and_keeps_the_zeros(tmp_path):
    model = fold(sparse())
    check = export_onnx(model, INPUTS, tmp_path / "a.onnx", dynamic={"x": [0], "scale": [0]})
    assert check.max_difference <= check.tolerance == 1e-4
    assert check.zeros >= sum(int((p == 0).sum()) for p in (model.conv.weight, model.head.weight)) > 0
    assert check.bytes == (tmp_path / "a.onnx").stat().st_size
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(5, 4, 6, 6)
    (found,) = session.run(None, {"x": x.numpy(), "scale": torch.full((5, 1), 2.0).numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x, 2.0), rtol=1e-4, atol=1e-5)


def test_refusals_leave_no_file(tmp_path):
    with pytest.raises(LossplugError, match="conv: the layer is still plugged"):
        export_onnx(sparse(), INPUTS, tmp_path / "a.onnx")
    with pytest.raises(LossplugError, match="away from torch's"):
        export_onnx(fold(sparse()), INPUTS, tmp_path / "a.onnx", tolerance=-1.0)

    class Odd(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(LossplugError, match="Odd: torch can't export it as ONNX"):
        export_onnx(Odd(), {"x": torch.ones(2)}, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
