"""Outliers moved from inputs into weights: closed forms, the function that stays, and better quantised layers."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lossplug import LossplugError, registry
from lightning_lossplug.quantization import migrate_outliers, quantize_post_training
from lightning_lossplug.quantization.post import awq, os_plus, os_plus_scale, os_plus_shift, smoothquant
from lightning_lossplug.quantization.post.migrate import find_groups

DOUBLE = torch.float64
METHODS = {"smoothquant": {}, "awq": {"group_size": 8}, "os_plus": {"bits_a": 6, "bits_w": 6}}


def outliers(n=200, channels=16, seed=0, dtype=DOUBLE):
    x = torch.randn(n, channels, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    x[:, 3] = x[:, 3] * 0.5 + 25
    x[:, 7] *= 10
    return x


class Block(nn.Module):
    """A norm that feeds two layers, and one that feeds one."""

    def __init__(self, norm=nn.LayerNorm, bias=True):
        super().__init__()
        self.norm1, self.norm2 = norm(16), norm(16)
        self.q, self.v = nn.Linear(16, 16, bias=bias), nn.Linear(16, 16, bias=bias)
        self.up, self.down = nn.Linear(16, 24, bias=bias), nn.Linear(24, 16, bias=bias)

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.q(h).tanh() * self.v(h)
        return x + self.down(self.up(self.norm2(x)).relu())


class Residual(Block):
    """Reads a norm's output past the linear layers."""

    def forward(self, x):
        h = self.norm1(x)
        return h + self.q(h)


def block(kind=Block, dtype=torch.float32, **options):
    torch.manual_seed(0)
    made = kind(**options).to(dtype).eval()
    with torch.no_grad():
        made.norm1.weight[5] = 30.0
        if getattr(made.norm1, "bias", None) is not None:
            made.norm1.bias[2] = 12.0
    return made


def test_the_table_is_complete():
    entries = [e for e in registry if e.kind == "post_training" and e.family == "migration"]
    assert {e.name for e in entries} == set(METHODS)


@settings(max_examples=10, deadline=None)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 99))
def test_smoothquant_scales(alpha, seed):
    x, w = outliers(seed=seed), torch.randn(5, 16, dtype=DOUBLE)
    tops, heavy = x.abs().amax(0), w.abs().amax(0)
    s = smoothquant(tops, heavy, alpha)
    torch.testing.assert_close(s, tops**alpha / heavy ** (1 - alpha))
    torch.testing.assert_close((w * smoothquant(tops, heavy, 0.0)).abs().amax(0), torch.ones(16, dtype=DOUBLE))
    torch.testing.assert_close((x / smoothquant(tops, heavy, 1.0)).abs().amax(0), torch.ones(16, dtype=DOUBLE))
    # at a half both have the same range
    half = smoothquant(tops, heavy, 0.5)
    torch.testing.assert_close((x / half).abs().amax(0), (w * half).abs().amax(0))


def test_os_plus_pieces():
    x = outliers()
    z = os_plus_shift(x.amin(0), x.amax(0))
    shifted = x - z
    torch.testing.assert_close(shifted.amax(0), -shifted.amin(0))
    high, low = shifted.amax(0), shifted.amin(0)
    assert (os_plus_scale(high, low, float(shifted.abs().max())) == 1).all()
    s = os_plus_scale(high, low, 2.0)
    assert ((shifted / s).abs().amax(0) <= 2 + 1e-12).all()
    assert (s >= 1).all()
    scale, t = os_plus(shifted / 100, [torch.randn(4, 16, dtype=DOUBLE)], t_min=5.0)
    assert (scale == 1).all()
    assert t < 5


def layer_error(x, w, s, bits):
    """Inputs per tensor, weights per row."""

    def q(a, dims):
        step = a.abs().amax(dims, keepdim=True) / (2 ** (bits - 1) - 1)
        return (a / step).round() * step

    return float((q(x / s, (0, 1)) @ q(w * s, (1,)).T - x @ w.T).norm() / (x @ w.T).norm())


def test_scaled_layers_are_quantised_better():
    x, w = outliers(), torch.randn(8, 16, dtype=DOUBLE)
    x = x - os_plus_shift(x.amin(0), x.amax(0))
    one = torch.ones(16, dtype=DOUBLE)
    scale, _ = os_plus(x, [w], 6, 6)
    assert layer_error(x, w, scale, 6) < 0.8 * layer_error(x, w, one, 6)
    half = smoothquant(x.abs().amax(0), w.abs().amax(0))
    assert layer_error(x, w, half, 6) < 0.8 * layer_error(x, w, one, 6)


def test_awq_without_outliers_of_inputs_is_no_worse_than_rounding():
    x, w = outliers(), torch.randn(8, 16, dtype=DOUBLE)
    s, ratio = awq(x, [w], bits=3, group_size=8)
    assert 0 < ratio < 1
    assert float(s.max() * s.min()) == pytest.approx(1.0)
    same, ratio = awq(x, [w], bits=3, group_size=8, n_grid=1)
    assert ratio == 0
    assert (same == 1).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_the_function_stays(method, dtype, norm):
    model = block(dtype=dtype, norm=getattr(nn, norm), bias=norm == "LayerNorm")
    batches = [torch.randn(2, 9, 16, dtype=dtype) for _ in range(3)]
    with torch.no_grad():
        before = model(batches[0])
        scales = migrate_outliers(model, batches, method, **METHODS[method])
        after = model(batches[0])
    assert set(scales) == {"norm1", "norm2"}
    bound = 1e-5 if dtype == torch.float32 else 1e-6  # scales are found in float32
    torch.testing.assert_close(after, before, rtol=bound, atol=bound * float(before.abs().max()))
    assert any((s != 1).any() for s in scales.values())


def test_groups_are_found_in_language_and_vision_models():
    transformers = pytest.importorskip("transformers")
    timm = pytest.importorskip("timm")
    fields = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields, tie_word_embeddings=False)).eval()
    batch = {"input_ids": torch.arange(12)[None], "use_cache": False}
    groups = find_groups(llama, [batch], lambda m, b: m(**b))
    # the output of the last norm is cut before the head reads it
    assert [len(group.linears) for group in groups] == [3, 2, 3, 2]
    before = llama(**batch).logits
    migrate_outliers(llama, [batch], "smoothquant")
    torch.testing.assert_close(llama(**batch).logits, before, rtol=1e-4, atol=1e-4)
    fields = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).eval()
    before = gpt(**batch).logits
    assert set(migrate_outliers(gpt, [batch], "os_plus")) == {"transformer.h.0.ln_1", "transformer.h.0.ln_2"}
    torch.testing.assert_close(gpt(**batch).logits, before, rtol=1e-4, atol=1e-4)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4).eval()
    assert len(migrate_outliers(vit, [torch.randn(2, 3, 32, 32)], "smoothquant")) >= 4


def test_outliers_moved_make_w8a8_better():
    batches = [torch.randn(8, 9, 16) for _ in range(4)]
    errors = []
    for moved in (False, True):
        model, plain = block(), block()
        if moved:
            migrate_outliers(model, batches, "smoothquant")
        quantize_post_training(model, batches, "rtn", 6, 6, first_last_bits=None, include=["q", "v", "up", "down"])
        with torch.no_grad():
            errors.append(float((model(batches[0]) - plain(batches[0])).norm()))
    assert errors[1] < 0.8 * errors[0]


def test_mistakes():
    batches = [torch.randn(2, 9, 16)]
    model = block(Residual)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LossplugError, match="would compute something else"):
        migrate_outliers(model, batches)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(LossplugError, match="no norm feeds linear layers"):
        migrate_outliers(nn.Sequential(nn.Linear(16, 4)), batches)
    with pytest.raises(LossplugError, match=r"norm1: .* NaN or infinite"):
        migrate_outliers(block(), [torch.full((1, 2, 16), torch.nan)])
    with pytest.raises(LossplugError, match="there are no calibration batches"):
        migrate_outliers(block(), [])
    with pytest.raises(LossplugError, match="moves no outliers"):
        migrate_outliers(block(), batches, "rtn")
    with pytest.raises(LossplugError, match="alpha is 2"):
        migrate_outliers(block(), batches, alpha=2)
    with pytest.raises(LossplugError, match="does not divide"):
        migrate_outliers(block(), batches, "awq", group_size=5)
    model = block()
    quantize_post_training(model, None, "rtn", 8)
    with pytest.raises(LossplugError, match="is quantised already"):
        migrate_outliers(model, batches)
