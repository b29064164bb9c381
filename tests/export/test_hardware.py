"""Which layers 2:4 kernels can use: every reason why not, torch's own limits, torch's own packing."""

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.export import hardware_report, to_semi_structured
from lightning_lossplug.export.hardware import MULTIPLES
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import NMSettings, NMTechnique, nm_mask
from lightning_lossplug.surgery import fold


def prune(layer, n, m):
    with torch.no_grad():
        layer.weight.mul_(nm_mask(layer.weight, n, m))
    return layer


def only(layer, **options):
    (row,) = hardware_report(nn.Sequential(layer), **{"dtype": torch.float16, **options}).layers
    return row


def test_the_limits_are_those_of_torch():
    for backend, theirs in (
        ("cusparselt", SparseSemiStructuredTensorCUSPARSELT),
        ("cutlass", SparseSemiStructuredTensorCUTLASS),
    ):
        limits = theirs._DTYPE_SHAPE_CONSTRAINTS
        for dtype, (rows, columns) in MULTIPLES[backend].items():
            assert (rows, columns) == (limits[dtype].sparse_min_rows, limits[dtype].sparse_min_cols)
        assert {d for d in limits if "float8" not in str(d)} == set(MULTIPLES[backend])  # fp8 needs scaled_mm


@pytest.mark.parametrize(
    ("n", "m", "pattern", "compliant"),
    [(2, 4, "2:4", 1.0), (1, 4, "1:4", 1.0), (1, 8, "1:4", 1.0), (1, 32, "1:4", 1.0), (4, 8, "dense", None)],
)
def test_patterns_are_told_group_by_group(n, m, pattern, compliant):
    torch.manual_seed(0)
    row = only(prune(nn.Linear(64, 32), n, m))
    assert row.pattern == pattern
    assert row.sparsity == pytest.approx(1 - n / m)
    assert row.usable == (compliant == 1.0)
    assert row.groups == 32 * 16
    if not row.usable:
        assert row.why == f"{row.groups - row.compliant} of {row.groups} groups hold more than 2 nonzeros"


def test_reasons():
    conv1d = pytest.importorskip("transformers", reason="needs transformers").pytorch_utils.Conv1D
    assert "4 does not divide its reduction axis of 30" in only(nn.Linear(30, 32)).why
    assert "multiples of 16 and 16" in only(prune(nn.Linear(64, 24), 2, 4)).why
    assert "multiples of 32 and 64" in only(prune(nn.Linear(32, 32), 2, 4), backend="cutlass").why
    assert only(prune(nn.Linear(32, 32), 2, 4), backend="cutlass", dtype=torch.float32).usable
    assert "cusparselt has no float32 kernel" in only(prune(nn.Linear(32, 32), 2, 4), dtype=None).why
    assert "Linear only, not for Conv2d (TensorRT has)" in only(prune(nn.Conv2d(16, 16, 3), 2, 4)).why
    assert "stores it [in, out]" in only(conv1d(32, 16)).why
    with pytest.raises(LossplugError, match="unknown backend 'cudnn'"):
        only(nn.Linear(4, 4), backend="cudnn")


def test_attention_and_embeddings():
    model = nn.ModuleDict({"e": nn.Embedding(32, 16), "a": nn.MultiheadAttention(16, 2), "h": nn.Linear(16, 32)})
    model["h"].weight = model["e"].weight
    report = hardware_report(model)
    assert [row.name for row in report.layers] == ["a.in_proj_weight", "a.out_proj"]
    assert "not as a Linear" in report.layers[0].why


def test_a_plugged_model_is_judged_by_what_it_uses():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    technique = NMTechnique(NMSettings(n=2, m=4, recipe="nm_ste", include=["0"]))
    technique.attach(model)
    technique.advance(Progress(0, 1))
    plugged, plain = hardware_report(model, dtype=torch.bfloat16), hardware_report(fold(model), dtype=torch.bfloat16)
    assert plugged == plain
    assert [row.usable for row in plugged.layers] == [True, False]


def test_table_and_dict():
    blocks = nn.ModuleList(nn.Sequential(prune(nn.Linear(32, 32), 2, 4)) for _ in range(3))
    report = hardware_report(nn.ModuleDict({"blocks": blocks, "head": nn.Linear(32, 5)}), dtype=torch.float16)
    assert len(report.rows()) == 4
    (block, head) = report.rows(compact=True)
    assert block == ("blocks.*.0 (3)", "Linear", "32x32", "50.0%", "2:4", "yes", "")
    assert head[5] == "no"
    assert len(report.table().splitlines()) == 5
    assert report.as_dict()["usable"] == 3


@pytest.mark.parametrize("n", [1, 2])
def test_what_is_called_usable_goes_through_the_packing_of_torch(n):
    torch.manual_seed(0)
    layer = prune(nn.Linear(128, 64), n, 4).half()
    assert only(layer, backend="cutlass").usable
    packed, meta = sparse_semi_structured_from_dense_cutlass(layer.weight.detach())
    assert packed.numel() * 2 == layer.weight.numel()
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), layer.weight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_conversion_says_in_one_line_that_it_needs_cuda():
    with pytest.raises(LossplugError, match=r"2:4 kernels need a CUDA device .* there is none here") as error:
        to_semi_structured(nn.Sequential(prune(nn.Linear(64, 64), 2, 4)))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a CUDA device of compute capability 8.0",
)
def test_the_converted_model_computes_the_same_on_cuda():
    torch.manual_seed(0)
    model = nn.Sequential(prune(nn.Linear(256, 128), 2, 4), nn.ReLU(), nn.Linear(128, 8))
    x = torch.randn(64, 256, device="cuda", dtype=torch.float16)
    found = to_semi_structured(model)
    assert isinstance(found[0].weight, torch.sparse.SparseSemiStructuredTensor)
    assert type(model[0].weight) is nn.Parameter
    torch.testing.assert_close(found(x), model.half().cuda()(x), rtol=1e-2, atol=1e-2)
