"""Double Sparsity on a shrunk cache: what labels choose, read from codes."""

import pytest
import torch
from families import model_of, tokens
from test_kv_generate import FULL, HALF, factors_of, generate, padded, same

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache import (
    ChannelShrunkCache,
    DoubleSparsityCache,
    KVShrinkSettings,
    double_sparsity,
)
from lightning_lossplug.kv_cache import pages
from lightning_lossplug.kv_cache.labels import label_scores, sparse_attention

TEXT = [tokens(4, 40, seed) for seed in range(2)]
MEANS = KVShrinkSettings(k_ratio=0.3, v_ratio=0.5, window=4, k_bits=4, v_bits=4, means=True, sinks=0)


def labels_of(model, count, **options):
    return double_sparsity(model, TEXT, channels=4, tokens=count, dense_layers=(0,), **options)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gpt_neox", "glm"])
def test_at_full_rank_it_is_double_sparsity(family):
    model = model_of(family)
    table = labels_of(model, 7)
    cache = ChannelShrunkCache(model, factors_of(model), sparse=table)
    same(generate(model, padded(), DoubleSparsityCache(model, table)), generate(model, padded(), cache))
    assert cache.nbytes() == cache.expected_bytes()


@pytest.mark.parametrize("settings", [HALF, MEANS])
def test_enough_tokens_are_the_shrunk_cache(settings):
    model = model_of("llama")
    factors = factors_of(model, settings)
    sparse = ChannelShrunkCache(model, factors, sparse=labels_of(model, 64))
    same(generate(model, padded(), ChannelShrunkCache(model, factors)), generate(model, padded(), sparse))


@torch.no_grad()
@pytest.mark.parametrize("settings", [HALF, MEANS])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_chosen_codes_are_those_of_everything_rebuilt(family, settings, monkeypatch):
    monkeypatch.setattr(pages, "PAGE", 8)
    model, ids = model_of(family), tokens(2, 31, seed=3)
    cache = ChannelShrunkCache(model, factors_of(model, settings), sparse=labels_of(model, 9, label_bits=4))
    model(input_ids=ids[:, :30], past_key_values=cache)
    model(input_ids=ids[:, 30:], past_key_values=cache)
    layer = cache.layers[1]
    keys, values = layer._all()
    heads = keys.shape[1]
    query = torch.randn(2, heads, 3, keys.shape[-1], generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 1, 31)
    mask[1, ..., :12] = torch.finfo(torch.float32).min
    scores = label_scores(query, layer.labels, layer.channels, 4, mask)
    expected = sparse_attention(query, keys, values, scores, 9, 0.3, mask)
    pending = layer._pending()[0].pending
    torch.testing.assert_close(pending.attend(query, 0.3, mask), expected, rtol=0, atol=2e-5)


def test_beams_reset_and_bytes():
    model = model_of("llama")
    cache = ChannelShrunkCache(model, factors_of(model, HALF), sparse=labels_of(model, 6))
    first = generate(model, padded(), cache, num_beams=3)
    cache.reset()
    assert cache.nbytes() == 0
    assert torch.equal(first.sequences, generate(model, padded(), cache, num_beams=3).sequences)
    assert cache.layers[1].labels.shape == (6, 2, 31, 4)
    assert cache.nbytes() == cache.expected_bytes()


def test_padding_is_never_chosen():
    model = model_of("llama")
    factors, table = factors_of(model, FULL), labels_of(model, 5)
    both = generate(model, padded(), ChannelShrunkCache(model, factors, sparse=table))
    alone = {"input_ids": padded()["input_ids"][:1, 4:]}
    single = generate(model, alone, ChannelShrunkCache(model, factors, sparse=table))
    assert torch.equal(both.sequences[0, 11:], single.sequences[0, 7:])


def test_labels_of_another_model():
    model = model_of("llama")
    with pytest.raises(LossplugError, match="of another model"):
        ChannelShrunkCache(model, factors_of(model), sparse=labels_of(model_of("qwen2"), 5))
