"""4-bit linear layers: nearest codes, the kernel and the unpacked weights agree, QAT's codes are kept, refusals."""

import copy
import pickle

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.quantization import Int4Linear, QATSettings, QATTechnique, int4_model, int4_weight
from lightning_lossplug.surgery import fold


def dequantised(q, group_size):
    repeat = [t.float().repeat_interleave(group_size, 1) for t in (q.scale, q.zero)]
    return q.codes.float() * repeat[0] + repeat[1]


@settings(max_examples=20, deadline=None)
@given(group=st.sampled_from([32, 64, 128]), groups=st.integers(1, 3), seed=st.integers(0, 9), offset=st.floats(-2, 2))
def test_codes_are_the_nearest(group, groups, seed, offset):
    w = torch.randn(6, group * groups, generator=torch.Generator().manual_seed(seed)) + offset
    q = int4_weight(w, group)
    assert q.codes.min() >= -8
    assert q.codes.max() <= 7
    step = q.scale.float().repeat_interleave(group, 1)
    inside = (q.codes > -8) & (q.codes < 7)
    error = (dequantised(q, group) - w).abs()
    assert (error <= step / 2 * 1.0001)[inside].all()
    assert (error <= step * 0.75 + 2**-8 * (w.abs().max() + 1)).all()  # the ends move with the rounded offset


@pytest.mark.parametrize("bias", [True, False])
def test_kernel_and_unpacked_weights_agree(bias):
    torch.manual_seed(0)
    plain = nn.Linear(128, 48, bias=bias)
    layer = Int4Linear(int4_weight(plain.weight, 32), plain.bias)
    q = int4_weight(plain.weight, 32)
    assert torch.equal(layer.codes, q.codes)
    torch.testing.assert_close(layer.weight.float(), dequantised(q, 32), rtol=2**-8, atol=1e-6)
    x = torch.randn(16, 128)
    many, few = layer(x), torch.cat([layer(part) for part in x.split(4)])
    assert (many - few).abs().max() <= 0.02 * many.abs().max()
    assert (many - plain(x)).abs().max() <= 0.25 * many.abs().max()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).half().double()):
        assert torch.equal(twin(x[:4]), layer(x[:4]))
    bits = 8 * sum(b.numel() * b.element_size() for b in (layer.packed, layer.scale, layer.zero))
    assert bits == (4 + 32 / 32) * plain.weight.numel()


def language_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_a_language_model_generates():
    model = language_model()
    made, left = int4_model(model, 32)
    assert set(left) == {"lm_head"}
    assert left["lm_head"].startswith("tied to the embedding; include it by its full name")
    assert sum(isinstance(m, Int4Linear) for m in made.modules()) == 14
    tokens = torch.arange(10)[None]
    out = made.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 14)
    with_head, left = int4_model(model, 32, include=["*", "lm_head"])
    assert left == {}
    assert isinstance(with_head.lm_head, Int4Linear)
    assert with_head.model.embed_tokens.weight.dtype == torch.bfloat16
    want, got = model(tokens).logits, with_head(tokens).logits
    assert nn.functional.cosine_similarity(want.flatten(), got.float().flatten(), dim=0) > 0.97


@pytest.mark.parametrize("options", [{"granularity": "group", "group_size": 32}, {"granularity": "channel"}])
def test_trained_codes_are_kept(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    technique = QATTechnique(QATSettings(bits_w=4, bits_a=None, first_last_bits=None, include=["0"], **options))
    technique.attach(model)
    made, left = int4_model(model, 32, include=["0"])
    assert left == {"1": "not in include"}
    want = fold(model)[0].weight
    torch.testing.assert_close(made[0].weight.float(), want, rtol=2**-7, atol=0)


def test_what_does_not_fit_says_so():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(40, 32), nn.Linear(32, 4))
    _, left = int4_model(model, 64)
    assert left["1"] == "groups of 64 don't divide its 40 inputs"
    with pytest.raises(LossplugError, match=r"1: groups of 64 don't divide its 40 inputs\. Exclude the layer"):
        int4_model(model, include=["1"])
    with pytest.raises(LossplugError, match="group_size is 48, allowed is 32, 64, 128 or 256"):
        int4_weight(torch.zeros(2, 96), 48)
    with pytest.raises(LossplugError, match=r"don't divide its 96 inputs\. Use a group_size of 32"):
        int4_weight(torch.zeros(2, 96), 64)
    with pytest.raises(LossplugError, match="1 of 128 entries of the weight are NaN"):
        int4_weight(torch.full((2, 64), 1.0).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float("nan"))))
    with pytest.raises(LossplugError, match="no layer can have 4-bit weights: it has no linear layer"):
        int4_model(nn.Conv2d(1, 1, 1))
    technique = QATTechnique(QATSettings(bits_w=4, bits_a=8, include=["0"], first_last_bits=None))
    technique.attach(model)
    with pytest.raises(LossplugError, match="0: no layer can have 4-bit weights: its input is quantised too"):
        int4_model(model, exclude=["2"])
