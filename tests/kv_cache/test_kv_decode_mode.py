"""One masked pass gives what decoding token by token gives; the perplexity counts what is decoded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import model_of, tokens
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import Metric

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache import (
    ChannelShrunkCache,
    KVShrinkSettings,
    decode_logits,
    decode_mode,
    exact_prefix,
    shrink_kv,
)
from lightning_lossplug.kv_cache import exact_tokens
from lightning_lossplug.metrics import DecodePerplexity
from lightning_lossplug.registry import registry

LENGTH, PREFILL, WINDOW = 30, 14, 5


def factors_of(model, **options):
    settings = KVShrinkSettings(**{"k_ratio": 0.6, "v_ratio": 0.4, "window": WINDOW, **options})
    return shrink_kv(model, [tokens(4, 40, seed) for seed in range(3)], settings)


@torch.no_grad()
def step_by_step(model, factors, ids):
    cache = ChannelShrunkCache(model, factors)
    logits = [model(input_ids=ids[:, :PREFILL], past_key_values=cache).logits]
    for t in range(PREFILL, ids.shape[1]):
        logits.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(("bits", "sinks"), [(16, 4), (4, 0)])
@pytest.mark.parametrize("family", ["llama_yarn", "qwen3", "gemma2", "gemma3", "phi", "gpt_neox", "glm"])
def test_one_pass_equals_decoding(family, bits, sinks):
    model, ids = model_of(family), tokens(2, LENGTH, seed=9)
    factors = factors_of(model, k_bits=bits, v_bits=bits, sinks=sinks)
    decoded = step_by_step(model, factors, ids)
    once = decode_logits(model, factors, ids, PREFILL)
    # a code at the edge between two levels may fall to either side
    torch.testing.assert_close(once, decoded, rtol=0, atol=5e-4 if bits == 16 else 5e-2)
    dense = decode_logits(model, None, ids, PREFILL)
    torch.testing.assert_close(once[:, :PREFILL], dense[:, :PREFILL], rtol=0, atol=1e-4)
    assert (once[:, PREFILL:] - dense[:, PREFILL:]).abs().max() > 1e-2


@pytest.mark.parametrize("residual", ["block", "block_lagged"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_windows_of_blocks(family, residual):
    model, ids = model_of(family), tokens(2, LENGTH, seed=9)
    factors = factors_of(model, residual=residual)
    once = decode_logits(model, factors, ids, PREFILL)
    torch.testing.assert_close(once, step_by_step(model, factors, ids), rtol=0, atol=5e-4)
    sliding = decode_logits(model, factors_of(model), ids, PREFILL)
    assert (once - sliding)[:, PREFILL + 1 :].abs().amax((0, 2)).min() > 1e-3  # row PREFILL ends a block of 5


@given(st.integers(1, 60), st.integers(1, 9))
def test_exact_tokens_are_those_of_a_loop(count, window):
    spans = {"sliding": 0, "block": 0, "block_lagged": 0}
    for _ in range(count):
        spans = {name: span + 1 for name, span in spans.items()}
        spans["sliding"] = min(spans["sliding"], window)
        spans["block"] = 1 if spans["block"] > window else spans["block"]
        spans["block_lagged"] -= window if spans["block_lagged"] == 2 * window else 0
    for name, span in spans.items():
        assert min(exact_tokens(count, window, name), count) == span
        assert torch.equal(exact_tokens(torch.tensor([count]), window, name).clamp(max=count), torch.tensor([span]))


@pytest.mark.parametrize("residual", ["sliding", "block", "block_lagged"])
@pytest.mark.parametrize("attention", ["auto", "latent", "rebuild"])
def test_bytes_and_ways_agree_with_any_residual(residual, attention):
    model, ids = model_of("llama"), tokens(2, LENGTH, seed=9)
    cache = ChannelShrunkCache(model, factors_of(model, residual=residual), attention=attention)
    once = decode_logits(model, cache.factors, ids, PREFILL)
    with torch.no_grad():
        model(input_ids=ids[:, :PREFILL], past_key_values=cache)
        for t in range(PREFILL, LENGTH):
            found = model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
            torch.testing.assert_close(once[:, t : t + 1], found, rtol=0, atol=5e-4)
            assert cache.nbytes() == cache.expected_bytes()
    keys = cache.shrunk_layers()[0].keys.shape[2]
    assert keys == {"sliding": WINDOW, "block": WINDOW, "block_lagged": WINDOW}[residual]  # 30 is a multiple of 5


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama_yarn", "gemma2", "gemma3", "phi"])
def test_a_prompt_is_processed_once_for_many_factors(family):
    model, ids = model_of(family), tokens(2, LENGTH, seed=9)
    cache, tables = exact_prefix(model, ids[:, :PREFILL])
    for options in ({}, {"sinks": 0, "residual": "block", "k_bits": 4}):
        factors = factors_of(model, **options)
        with decode_mode(model, factors, PREFILL, past=tables):
            rest = model(input_ids=ids[:, PREFILL:], past_key_values=copy.deepcopy(cache)).logits
        once = decode_logits(model, factors, ids, PREFILL)[:, PREFILL:]
        torch.testing.assert_close(rest, once, rtol=0, atol=1e-4 if not options else 5e-2)


def test_limits():
    model, ids = model_of("llama"), tokens(2, LENGTH, seed=9)
    dense = decode_logits(model, None, ids, PREFILL)
    exact = factors_of(model, k_ratio=0.0, v_ratio=0.0)
    torch.testing.assert_close(decode_logits(model, exact, ids, PREFILL), dense, rtol=0, atol=1e-4)
    shrunk = factors_of(model)
    for prefill, window in ((LENGTH, 1), (1, LENGTH)):  # nothing decoded; nothing old
        torch.testing.assert_close(decode_logits(model, shrunk, ids, prefill, window), dense, rtol=0, atol=1e-4)
    # a window counts the current token: one more exact token is another result
    off = decode_logits(model, shrunk, ids, PREFILL, WINDOW + 1) - decode_logits(model, shrunk, ids, PREFILL)
    assert off[:, PREFILL:].abs().max() > 1e-3
    assert not any(m._forward_pre_hooks for m in model.modules() if "hook.<locals>" in str(m._forward_pre_hooks))


def test_bad_prefill():
    model = model_of("llama")
    with pytest.raises(LossplugError, match="prefill is 31 in a text of 30 tokens"):
        decode_logits(model, None, tokens(1, 30), 31)


def test_perplexity_counts_the_decoded_tokens():
    logits = torch.randn(3, 10, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 7, (3, 10), generator=torch.Generator().manual_seed(1))
    metric = DecodePerplexity(prefill=4)
    metric.update(logits[:2], ids[:2])
    metric.update(logits[2:], ids[2:])
    expected = F.cross_entropy(logits[:, 3:-1].reshape(-1, 7), ids[:, 4:].reshape(-1)).exp()
    torch.testing.assert_close(metric.compute(), expected)
    assert int(metric.count) == 18
    ignored = ids.clone()
    ignored[:, 6:] = -100
    metric.reset()
    metric.update(logits, ignored)
    torch.testing.assert_close(
        metric.compute(), F.cross_entropy(logits[:, 3:5].reshape(-1, 7), ids[:, 4:6].reshape(-1)).exp()
    )


def test_perplexity_refuses():
    with pytest.raises(LossplugError, match="prefill is 0"):
        DecodePerplexity(prefill=0)
    with pytest.raises(LossplugError, match="nothing is decoded"):
        DecodePerplexity(prefill=4).update(torch.zeros(1, 4, 3), torch.zeros(1, 4, dtype=torch.long))
    assert isinstance(registry.create("metric", "DecodePerplexity", prefill=3), Metric)
