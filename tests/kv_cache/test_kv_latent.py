"""Attention over codes gives what attention over rebuilt keys and values gives."""

import pytest
import torch
from families import FAMILIES, model_of, tokens
from test_kv_generate import FULL, HALF, factors_of, generate, padded, same

from lightning_lossplug import native as compiled
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache import ChannelShrunkCache, KVShrinkSettings
from lightning_lossplug.integrations.kv_cache.states import ShrunkStates
from lightning_lossplug.kv_cache import native, pages

WAYS = ["native", "latent"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(pages, "PAGE", 8)  # several pages in a short text
    return request.param


def uses(cache):
    """Which way every shrunk layer went."""
    return {
        "native" if layer.native is not None else "latent" if layer.latent is not None else "rebuild"
        for layer in cache.shrunk_layers().values()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_as_with_rebuilt_states(family, way):
    model = model_of(family)
    for settings in (HALF, KVShrinkSettings(k_ratio=0.3, v_ratio=0.5, window=4, k_bits=4, v_bits=2, means=True)):
        factors = factors_of(model, settings)
        slow = generate(model, padded(), ChannelShrunkCache(model, factors, attention="rebuild"))
        cache = ChannelShrunkCache(model, factors, attention=way)
        # a code at the edge between two levels may fall to either side
        same(slow, generate(model, padded(), cache), tolerance=1e-4 if settings is HALF else 1e-2)
        assert uses(cache) == {way}


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}])
def test_beams_and_samples(options, way):
    model = model_of("llama")
    factors = factors_of(model, HALF)
    found = []
    for attention in ("rebuild", way):
        torch.manual_seed(1)
        found.append(generate(model, padded(), ChannelShrunkCache(model, factors, attention=attention), **options))
    assert torch.equal(found[0].sequences, found[1].sequences)


@torch.no_grad()
def test_several_new_tokens_and_rows_at_positions_of_their_own(way):
    model = model_of("qwen2")
    factors = factors_of(model, HALF)
    ids, positions = tokens(2, 30), torch.arange(30) + torch.tensor([[0], [5]])
    found = []
    for attention in ("rebuild", way):
        cache = ChannelShrunkCache(model, factors, attention=attention)
        logits = []
        for start, stop in ((0, 15), (15, 18), (18, 19), (19, 30)):  # three at once, one, more than the window
            part = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
            logits.append(model(**part, past_key_values=cache).logits)
        found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


@torch.no_grad()
def test_half_precision(way):
    model = model_of("llama")
    low = type(model)(model.config)
    low.load_state_dict(model.state_dict())
    low = low.to(torch.bfloat16).eval()
    ids, found = tokens(1, 30), []
    for attention in ("rebuild", way):
        cache = ChannelShrunkCache(low, factors_of(model, HALF), attention=attention)
        low(input_ids=ids[:, :20], past_key_values=cache)
        rows = [low(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 30)]
        found.append(torch.cat(rows, dim=1).float())
    assert (found[0] - found[1]).abs().mean() < 0.03 * found[0].abs().mean()


def test_sinks_that_are_also_recent_or_too_many(way):
    model = model_of("llama")
    for settings, length in ((KVShrinkSettings(k_ratio=0.5, v_ratio=0.5, window=9, sinks=4), 10), (HALF, 2)):
        inputs = {"input_ids": tokens(2, length)}
        factors = factors_of(model, settings)
        slow = generate(model, inputs, ChannelShrunkCache(model, factors, attention="rebuild"))
        same(slow, generate(model, inputs, ChannelShrunkCache(model, factors, attention=way)))


def test_other_attention_gets_rebuilt_states(monkeypatch):
    model = model_of("llama", "eager")
    factors = factors_of(model, HALF)
    slow = generate(model, padded(), ChannelShrunkCache(model, factors, attention="rebuild"))
    same(slow, generate(model, padded(), ChannelShrunkCache(model, factors)), tolerance=1e-5)


@torch.no_grad()
def test_stand_ins_are_tensors_to_everybody_else():
    model = model_of("llama")
    cache = ChannelShrunkCache(model, factors_of(model, HALF), attention="latent")
    model(input_ids=tokens(1, 20), past_key_values=cache)
    layer = cache.shrunk_layers()[0]
    for index in range(3):
        cache.announce(index, torch.ones(1, 1, 8), torch.full((1, 1, 8), 0.5), None, 1)
    keys, values = layer.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
    assert isinstance(keys, ShrunkStates)
    assert keys.shape == (1, 2, 21, 8)
    assert keys.dtype is torch.float32
    rebuilt = layer._all()
    assert torch.equal(keys + 0, rebuilt[0])
    assert torch.equal(values[:, :, ::2], rebuilt[1][:, :, ::2])
    query, mask = torch.randn(1, 4, 3, 8), torch.rand(1, 4, 3, 21) > 0.3
    for more in ({}, {"attn_mask": mask}, {"scale": 0.1}, {"attn_mask": mask[:, :1, :1], "scale": 2.0}):
        found, expected = (
            torch.nn.functional.scaled_dot_product_attention(query, *pair, enable_gqa=True, **more)
            for pair in ((keys, values), rebuilt)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    for function in (compiled.load, native.native_library, native.native_or_warn):
        function.cache_clear()
    model = model_of("llama")
    factors = factors_of(model, FULL)
    with pytest.raises(LossplugError, match=r"the C\+\+ attention can't be used: .*attention='latent'"):
        ChannelShrunkCache(model, factors, attention="native")
    with pytest.warns(UserWarning, match=r"runs in PyTorch, since its C\+\+ function can't be used: .*nowhere"):
        generate(model, padded(), cache := ChannelShrunkCache(model, factors))
    assert uses(cache) == {"latent"}
    for function in (compiled.load, native.native_library, native.native_or_warn):
        function.cache_clear()


def test_bad_attention():
    model = model_of("llama")
    with pytest.raises(LossplugError, match="attention is 'fast'"):
        ChannelShrunkCache(model, factors_of(model, HALF), attention="fast")
