"""QDQ files: integer codes inside, the fake-quantised model's outputs in ONNX Runtime, refusals."""

import pytest
import torch
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.integrations.onnx_qdq import export_onnx_qdq
from lightning_lossplug.quantization import QATSettings, QATTechnique

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason=f"needs the package {package} (extra: onnx)")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def trained(bits_w, bits_a, **settings):
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 4, 6, 6)
    technique = QATTechnique(QATSettings(bits_w, bits_a, **settings))
    technique.attach(model)
    model(x)
    return model.eval(), x


@pytest.mark.parametrize(("bits_w", "bits_a"), [(8, 8), (4, 4)])
def test_the_file_holds_codes_and_computes_the_same(bits_w, bits_a, tmp_path):
    import onnx
    import onnxruntime

    model, x = trained(bits_w, bits_a, first_last_bits=bits_w)
    check = export_onnx_qdq(model, {"x": x}, tmp_path / "a.onnx", dynamic={"x": [0]})
    assert check.max_difference <= 0.02
    graph = onnx.load(str(tmp_path / "a.onnx")).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == 2
    assert kinds.count("DequantizeLinear") == 4
    codes = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8]
    weights = [c for c in codes if c.ndim >= 2]
    assert len(weights) == 2
    assert all(-(2 ** (bits_w - 1)) <= w.min() and w.max() < 2 ** (bits_w - 1) for w in weights)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    more = 3 * torch.randn(7, 4, 6, 6)  # beyond the range of the codes
    (found,) = session.run(None, {"x": more.numpy()})
    with torch.no_grad():
        want = model(more)
    close = (torch.from_numpy(found) - want).abs() <= 1e-5 * (want.max() - want.min())
    assert close.float().mean() > 0.9  # a value between two codes may go either way


def test_what_has_no_integer_form_is_refused(tmp_path):
    with pytest.raises(LossplugError, match="the model has no quantised layer"):
        export_onnx_qdq(Net(), {"x": torch.zeros(1, 4, 6, 6)}, tmp_path / "a.onnx")
    model, x = trained(4, None, first_last_bits=4, include=["conv", "head"])
    with pytest.raises(LossplugError, match="conv: its weight or input is not quantised"):
        export_onnx_qdq(model, {"x": x}, tmp_path / "a.onnx")
