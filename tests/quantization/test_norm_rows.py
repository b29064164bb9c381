"""Norms in one pass: against their definitions, and which modules of real models become one."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.quantization.norm_rows import NormRows, _library, replace_norms

needs_compiler = pytest.mark.skipif(_library() is None, reason="there is no C++ compiler")


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    width=st.integers(1, 300),
    centred=st.booleans(),
    bias=st.booleans(),
    offset=st.sampled_from([0.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_norm(shape, width, centred, bias, offset, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(*shape, width, generator=g) + offset).to(dtype)
    weight, added = torch.randn(width, generator=g), torch.randn(width, generator=g) if bias else None
    norm = NormRows(weight, added, 1e-5, centred)
    exact = x.double()
    exact = exact - exact.mean(-1, keepdim=True) if centred else exact
    want = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    want = want if added is None else want + added.double()
    # Float32 knows a difference from a mean of 1000 to 1e-4 or so; a row of one value has none.
    loose = 1e-5 + (0.1 if offset and centred else 0) + (0.01 if dtype == torch.bfloat16 else 0)
    got = norm(x)
    assert got.dtype == dtype and got.shape == x.shape
    if not (offset and centred and width < 8):
        assert (got.double() - want).abs().max() <= loose * want.abs().max().clamp_min(1.0)
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.allclose(norm(strided).double(), got.double(), atol=float(loose * want.abs().max().clamp_min(1.0)))


def test_an_empty_batch():
    assert NormRows(torch.ones(4), None, 1e-5, True)(torch.ones(0, 4)).shape == (0, 4)


class TwoInputs(nn.Module):
    """A norm that wants a second input, and one that does more than it says."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x, gate):
        return x * gate


class OddRMSNorm(TwoInputs):
    def forward(self, x, gate=None):
        return 2 * x


class GatedRMSNorm(TwoInputs):
    pass


@needs_compiler
def test_which_modules_become_one():
    torch.manual_seed(0)
    hooked = nn.LayerNorm(8)
    hooked.register_forward_hook(lambda m, a, out: out + 1)
    gemma, llama = Gemma3RMSNorm(8), LlamaRMSNorm(8)
    rows = nn.LayerNorm(8, bias=False), nn.RMSNorm(8), nn.RMSNorm(8, eps=1e-3), gemma, llama
    others = (
        nn.LayerNorm((2, 8)),
        nn.GroupNorm(2, 8),
        hooked,
        OddRMSNorm(),
        GatedRMSNorm(),
        nn.RMSNorm(8, device="meta"),
    )
    with torch.no_grad():
        for p in (p for m in rows for p in m.parameters()):
            p.normal_()
    net = nn.ModuleList([*copy.deepcopy(rows), *others])
    assert replace_norms(net) == len(rows)
    x = torch.randn(3, 8)
    with torch.no_grad():
        for made, plain in zip(net, rows, strict=False):
            assert isinstance(made, NormRows)
            assert list(made.state_dict()) == list(plain.state_dict())
            torch.testing.assert_close(made(x), plain(x), rtol=1e-5, atol=1e-6)
    assert [type(m) for m in net[len(rows) :]] == [type(m) for m in others]


@needs_compiler
def test_a_vision_transformer():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=4).eval()
    made = copy.deepcopy(model)
    assert replace_norms(made) == 5
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(made(x), want, rtol=1e-4, atol=1e-5)
        half = made.bfloat16()
        assert half.norm.weight.dtype == torch.float32
        assert (half(x.bfloat16()) - want).abs().max() <= 0.1 * want.abs().max()
        exported = torch.export.export(made.float(), (x,)).module()(x)
        torch.testing.assert_close(exported, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("width", [1, 7, 9, 4096])
def test_another_width_is_refused(width):
    norm = NormRows(torch.ones(8), None, 1e-6, True)
    with pytest.raises(LossplugError, match=rf"shape \(3, {width}\) for a norm of 8 channels"):
        norm(torch.randn(3, width))
