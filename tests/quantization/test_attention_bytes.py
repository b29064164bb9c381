"""Attention on bytes: what the fake-quantised attention computes, in every layout; and what stays in floating point."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_models import LLAMA, train
from transformers import AutoModelForCausalLM

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import QAT
from lightning_lossplug.quantization import attention_bytes as source
from lightning_lossplug.quantization import create, integer_attention, integer_model
from lightning_lossplug.quantization.attention import AttentionQuant, Probabilities
from lightning_lossplug.surgery import attention_of

LIBRARY = source.integer_attention_library()
needs_vnni = pytest.mark.skipif(isinstance(LIBRARY, str), reason=str(LIBRARY))
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))


def attention(q, k, v, bits=8, soft=8, kind="lsq", **options):
    """Quantised attention with steps from these operands."""
    given = {} if kind == "mx" else {"bits": bits}
    made = [create(kind, role="activation", **given) for _ in range(3)]
    found = AttentionQuant(*made, Probabilities(soft) if soft > 1 else None).train()
    found(q, k, v, **options)
    return found.eval()


def operands(batch=2, heads=4, key_heads=4, rows=9, keys=9, width=8, value_width=8, dtype=torch.float32, seed=0):
    """Queries, keys and values as a projection leaves them: heads behind tokens in memory."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, width), (keys, key_heads, width), (keys, key_heads, value_width))
    return [torch.randn(batch, *shape, generator=generator).transpose(1, 2).to(dtype) for shape in shapes]


@needs_vnni
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_it_is_the_fake_quantised_attention(data):
    groups, key_heads = data.draw(st.sampled_from([1, 1, 2, 3])), data.draw(st.integers(1, 3))
    causal = data.draw(st.booleans())
    sizes = {
        "batch": data.draw(st.integers(1, 3)),
        "heads": groups * key_heads,
        "key_heads": key_heads,
        "rows": data.draw(st.integers(1, 40)),
        "keys": data.draw(st.integers(1, 140)),
        "width": data.draw(st.integers(1, 70)),
        "value_width": data.draw(st.integers(1, 140)),
        "dtype": data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "seed": data.draw(st.integers(0, 9)),
    }
    q, k, v = operands(**sizes)
    options = {"is_causal": causal, "enable_gqa": groups > 1}
    if data.draw(st.booleans()):
        options["scale"] = 0.3
    if data.draw(st.booleans()):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if data.draw(st.booleans()):
        q = q.abs()  # unsigned codes
    plugged = attention(q, k, v, data.draw(st.integers(2, 8)), data.draw(st.integers(2, 8)), **options)
    made = integer_attention(plugged)
    if min(float(k.min()), float(v.min())) >= 0:  # their codes are unsigned then
        assume(not isinstance(made, str))
    with torch.no_grad():  # in bfloat16 the fake-quantised values would be rounded once more
        want, got = plugged(q.float(), k.float(), v.float(), **options), made(q, k, v, **options)
    assert got.dtype == sizes["dtype"]
    assert got.shape == want.shape
    off = (want - got.float()).abs()
    exact = 1e-5 if sizes["dtype"] == torch.float32 else 0.005  # what comes out is rounded
    # A probability between two codes may go to the other one, which moves an output by a step times a value.
    step = source.step_of(plugged.probabilities) * float(v.abs().max()) * 1.1
    assert off.max() <= exact * max(1.0, float(want.abs().max())) + 2 * step
    assert (off <= exact * max(1.0, float(want.abs().max()))).float().mean() > 0.97


@needs_vnni
def test_rows_are_laid_out_for_the_layer_behind():
    q, k, v = operands()
    with torch.no_grad():
        out = integer_attention(attention(q, k, v))(q, k, v)
    assert out.transpose(1, 2).is_contiguous()


@needs_vnni
@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) > 0.4},
        {"attn_mask": torch.randn(9, 9, generator=torch.Generator().manual_seed(0))},
    ],
    ids=["bool", "added"],
)
def test_calls_with_a_mask_stay_in_floating_point(options):
    q, k, v = operands()
    plugged = attention(q, k, v)
    made = integer_attention(plugged)
    assert torch.equal(made(q, k, v, **options), plugged(q, k, v, **options))
    assert torch.equal(made(q, k, v, options["attn_mask"]), plugged(q, k, v, options["attn_mask"]))


@needs_vnni
def test_gradients_autocast_and_odd_shapes_too():
    q, k, v = operands()
    plugged = attention(q, k, v)
    made = integer_attention(plugged)
    wanted = q.clone().requires_grad_()
    made(wanted, k, v).sum().backward()
    assert wanted.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(made(q[0], k[0], v[0]), plugged(q[0], k[0], v[0]))
        assert torch.equal(made(q.double(), k.double(), v.double()), plugged(q.double(), k.double(), v.double()))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(made(q, k, v), plugged(q, k, v))


@needs_vnni
def test_a_vision_transformer_in_integers():
    torch.manual_seed(0)
    options = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
    model = train(
        timm.create_model("vit_tiny_patch16_224", **options), IMAGES, QAT(8, 8, attention_bits=8), lr=1e-3
    ).model.eval()
    made, left = integer_model(model)
    assert not left
    assert all(isinstance(attention_of(block.attn), source.IntegerAttention) for block in made.blocks)
    assert type(attention_of(model.blocks[0].attn)) is AttentionQuant  # the model given stays as it was
    with torch.no_grad():
        want, got, half = model(IMAGES), made(IMAGES), made.bfloat16()(IMAGES.bfloat16())
    assert (want - got).abs().max() <= 0.02 * (want.max() - want.min())
    assert (want - half.float()).abs().max() <= 0.1 * (want.max() - want.min())


@needs_vnni
def test_a_causal_language_model_in_integers():
    torch.manual_seed(0)
    model = train(
        AutoModelForCausalLM.from_config(LLAMA, attn_implementation="sdpa"),
        TOKENS,
        QAT(8, 8, attention_bits=8),
        lr=1e-3,
    ).model.eval()
    made, _ = integer_model(model)
    found = attention_of(made.model.layers[0].self_attn)
    assert isinstance(found, source.IntegerAttention)
    calls = []
    found._on_bytes = lambda *given, own=found._on_bytes: calls.append(given[3]) or own(*given)
    with torch.no_grad():
        want, got = model(TOKENS).logits, made(TOKENS).logits
        padded = torch.ones_like(TOKENS)
        padded[0, :3] = 0
        masked = [m(TOKENS, attention_mask=padded).logits[:, 3:] for m in (model, made)]
    assert calls == [True]  # the padded text has a mask
    assert (want - got).abs().max() <= 0.02 * (want.max() - want.min())
    assert (masked[0] - masked[1]).abs().max() <= 0.02 * (want.max() - want.min())


@needs_vnni
def test_loaded_steps_count():
    q, k, v = operands()
    first, second = attention(q, k, v), attention(3 * q, 2 * k, v / 2)
    made = integer_attention(first)
    made.load_state_dict(second.state_dict())
    with torch.no_grad():
        want = second(q, k, v)
        assert (made(q, k, v) - want).abs().max() <= 1e-2 * want.abs().max()
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(twin(q, k, v), made(q, k, v))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda q, k, v: attention(q, k, v, soft=1), "binary"),
        (lambda q, k, v: attention(q, k, v, kind="lsq_plus"), "more than one step, or a zero-point"),
        (lambda q, k, v: attention(q, k, v, kind="dynamic"), "a step per token"),
        (lambda q, k, v: attention(q, k, v, kind="mx"), "no integer codes"),
        (lambda q, k, v: attention(q, k.abs(), v), "its key are wider than a byte"),
    ],
    ids=["binary", "affine", "dynamic", "mx", "unsigned_keys"],
)
def test_what_stays_in_floating_point(build, reason):
    assert reason in integer_attention(build(*operands()))


def test_without_the_instruction(monkeypatch):
    monkeypatch.setattr(source, "integer_attention_library", lambda: "this processor has no int8 products")
    torch.manual_seed(0)
    options = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 4}
    model = train(
        timm.create_model("vit_tiny_patch16_224", **options), IMAGES, QAT(8, 8, attention_bits=8), lr=1e-3
    ).model.eval()
    made, left = integer_model(model)
    assert left == {"blocks.0.attn (attention)": "this processor has no int8 products"}
    with torch.no_grad():
        assert (model(IMAGES) - made(IMAGES)).abs().max() <= 0.02 * float(model(IMAGES).std()) * 10


def test_steps_that_were_never_set():
    plugged = AttentionQuant(*[create("lsq", bits=8, role="activation") for _ in range(3)], Probabilities(8))
    with pytest.raises(LossplugError, match="no training batch has set its scales"):
        integer_attention(plugged)


@needs_vnni
def test_an_empty_batch_goes_through_floating_point():
    q, k, v = operands()
    made = integer_attention(attention(q, k, v))
    with torch.no_grad():
        assert made(q[:0], k[:0], v[:0]).shape == F.scaled_dot_product_attention(q, k, v)[:0].shape
