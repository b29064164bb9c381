"""KIVI: error bounds, bytes, bookkeeping of the residual, generation."""

import pytest
import torch
from families import model_of, tokens
from test_kv_generate import generate, padded, same

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache import KIVICache
from lightning_lossplug.kv_cache.kivi import dequantize_groups, kivi_token_bytes, quantize_groups


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_error_is_at_most_half_a_step(axis, bits):
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) + 5
    packed, ranges = quantize_groups(x, bits, axis)
    back = dequantize_groups(packed, ranges, bits, axis, 96, torch.float32)
    step = ranges[..., 1].float().repeat_interleave(32, axis)
    assert step.shape == x.shape
    assert bool(((back - x).abs() <= step / 2 + 1e-2).all())
    assert packed.numel() == x.numel() * bits // 8
    again = dequantize_groups(*quantize_groups(back, bits, axis), bits, axis, 96, torch.float32)
    torch.testing.assert_close(again, back, rtol=0, atol=2e-2)
    constant = torch.full((1, 1, 32, 32), 1.5)
    assert torch.equal(
        dequantize_groups(*quantize_groups(constant, bits, axis), bits, axis, 32, torch.float32), constant
    )
    with pytest.raises(LossplugError, match="no multiple of the group of 32"):
        quantize_groups(x[:, :, :33, :33], bits, axis)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi"])
def test_residual_and_bytes(family):
    model = model_of(family)
    cache = KIVICache(model, bits=8, residual=32)
    inputs = {"input_ids": tokens(2, 50)}
    dense, shrunk = generate(model, inputs), generate(model, inputs, cache)
    torch.testing.assert_close(dense.logits[0], shrunk.logits[0], rtol=0, atol=0)  # the prompt is exact
    assert (dense.logits[1] - shrunk.logits[1]).abs().max() < 0.3
    layer = cache.layers[2]
    assert layer.get_seq_length() == 70
    assert (len(layer.key_forms[0]), layer.keys.shape[2]) == (64, 6)
    assert (len(layer.value_forms[0]), layer.values.shape[2]) == (38, 32)
    heads, width = layer.keys.shape[1], layer.keys.shape[3]
    ranges = 4 * width / 32
    expected = heads * (64 * (width + ranges) + 38 * (width + 4) + (6 + 32) * width * 4)
    assert layer.nbytes() == 2 * expected
    assert kivi_token_bytes(64, 4) == 2 * 32 + 8 + 8


def test_beams_turns_and_reset():
    model = model_of("llama")
    one, two = (generate(model, padded(), KIVICache(model, 8, 32), num_beams=3) for _ in range(2))
    assert torch.equal(one.sequences, two.sequences)
    cache = KIVICache(model, 4, 32)
    first = generate(model, padded(), cache, max_new_tokens=40)
    cache.reset()
    assert cache.nbytes() == cache.get_seq_length() == 0
    same(first, generate(model, padded(), cache, max_new_tokens=40), tolerance=0)
    stock = generate(model, padded(), max_new_tokens=12)  # nothing is rounded yet but keys of full blocks
    same(stock, generate(model, padded(), KIVICache(model, 2, 32), max_new_tokens=12), tolerance=0)


def test_refusals():
    model = model_of("llama")
    for bad, words in (
        ({"bits": 16}, "rounds nothing"),
        ({"bits": 3}, "bits is 3"),
        ({"residual": 33}, "residual is 33, allowed are multiples"),
    ):
        with pytest.raises(LossplugError, match=words):
            KIVICache(model, **bad)
    with pytest.raises(LossplugError, match="assisted decoding"):
        generate(model, {"input_ids": tokens(1, 11)}, KIVICache(model), prompt_lookup_num_tokens=2)
