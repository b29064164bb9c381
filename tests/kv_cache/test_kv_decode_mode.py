"""One masked pass gives what decoding token by token gives; the perplexity counts what is decoded."""

import pytest
import torch
import torch.nn.functional as F
from families import model_of, tokens
from torchmetrics import Metric

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache import ChannelShrunkCache, KVShrinkSettings, decode_logits, shrink_kv
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
