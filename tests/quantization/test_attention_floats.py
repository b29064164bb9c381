"""Attention in float32 by a function of our own, against the formula in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lossplug.quantization.attention import explicit_attention
from lightning_lossplug.quantization.attention_floats import (
    MANY,
    FloatAttention,
    float_attention_library,
    replace_attentions,
)
from lightning_lossplug.quantization.tape import taped
from lightning_lossplug.surgery.attention import attention_of

needs_function = pytest.mark.skipif(
    isinstance(float_attention_library(), str), reason="this processor has no AVX-512, or there is no compiler"
)


def operands(batch, heads, groups, rows, keys, width, value_width, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, rows, heads * groups, width, generator=g).to(dtype).transpose(1, 2)
    key = torch.randn(batch, keys, heads, width, generator=g).to(dtype).transpose(1, 2)
    value = torch.randn(batch, heads, keys, value_width, generator=g).to(dtype)
    return query, key, value


@needs_function
@given(
    sizes=st.tuples(*(st.integers(1, top) for top in (3, 3, 3, 40, 40, 40, 40))),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3, 3.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_formula(sizes, causal, scale, seed):
    with torch.no_grad():
        batch, heads, groups, rows, keys, *_ = sizes
        given_ = operands(batch, heads, groups, max(rows, keys), keys, *sizes[5:], seed)
        options = {"is_causal": causal, "scale": scale, "enable_gqa": groups > 1}
        with taped(torch.zeros(1)) as tape:
            got = FloatAttention()(*given_, **options)
        assert tape.steps or tape.refused  # it was the function, not torch's
        assert "scaled_dot_product_attention" not in tape.refused
        want = explicit_attention(*(t.double() for t in given_), **options)
        assert (got - want).abs().max() <= 1e-4  # scores reach 60 at a scale of 3
        half = tuple(t.bfloat16() for t in given_)
        got = FloatAttention()(*half, **options)
        want = explicit_attention(*(t.double() for t in half), **options)
        assert got.dtype == torch.bfloat16
        assert (got - want).abs().max() <= 2**-8 * want.abs().max() + 1e-4


@needs_function
def test_long_rows_of_large_scores():
    with torch.no_grad():
        query, key, value = operands(1, 2, 1, 300, 300, 64, 64, 0)
        got = FloatAttention()(30 * query, key, value)
        assert (got - explicit_attention(30 * query.double(), key.double(), value.double())).abs().max() <= 1e-4


@needs_function
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_so(which, bad):
    with torch.no_grad():
        given_ = [t.contiguous() for t in operands(1, 1, 1, 8, 8, 16, 16, 0)]
        given_[which][0, 0, 3, 2] = bad
        got, want = FloatAttention()(*given_), explicit_attention(*given_)  # torch's own gives 0 for a query of NaN
        assert torch.equal(got.isfinite(), want.isfinite())


@pytest.mark.parametrize("case", ["mask", "gradients", "float64", "few queries", "three axes", "autocast"])
def test_other_calls_are_torchs(case):
    query, key, value = operands(2, 2, 1, 9, 9, 8, 8, 0)
    options = {}
    if case == "mask":
        options["attn_mask"] = torch.ones(9, 9, dtype=torch.bool).tril()
    elif case == "gradients":
        query = query.clone().requires_grad_()
    elif case == "float64":
        query, key, value = query.double(), key.double(), value.double()
    elif case == "few queries":
        query = query[:, :, : min(MANY, 9) - 1]
    elif case == "three axes":
        query, key, value = query[0], key[0], value[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"), taped(torch.zeros(1)) as tape:
        got = FloatAttention()(query, key, value, **options)
        want = F.scaled_dot_product_attention(query, key, value, **options)
    assert not tape.steps
    assert torch.equal(got, want)
    assert got.requires_grad == want.requires_grad


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(24, 72)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 12).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


@needs_function
def test_modules_that_attend():
    model = nn.Sequential(Attends(), nn.LayerNorm(24), Attends()).eval()
    x, keys = torch.randn(2, 7, 24), model.state_dict().keys()
    with torch.no_grad():
        want = model(x)
        assert replace_attentions(model) == 2
        assert replace_attentions(model) == 0
        assert model.state_dict().keys() == keys
        assert all(isinstance(attention_of(model[i]), FloatAttention) for i in (0, 2))
        assert (model(x) - want).abs().max() <= 1e-5
        exported = torch.export.export(model, (x,)).module()
        assert (exported(x) - want).abs().max() <= 1e-5
