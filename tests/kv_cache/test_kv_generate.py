"""The shrunk cache in ``generate``: full rank is the stock cache, for every family and every way of decoding."""

import pytest
import torch
from families import FAMILIES, model_of, tokens

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache import (
    ChannelShrunkCache,
    KVShrinkSettings,
    remove_cache_hooks,
    shrink_kv,
)

NEW = 21
FULL = KVShrinkSettings(k_ratio=0.0, v_ratio=0.0, window=4)
HALF = KVShrinkSettings(k_ratio=0.5, v_ratio=0.5, window=4)


NO_SINKS = KVShrinkSettings(k_ratio=0.5, v_ratio=0.5, window=4, sinks=0)


def factors_of(model, settings=FULL):
    return shrink_kv(model, [tokens(4, 40, seed) for seed in range(3)], settings)


def padded(batch=2, length=11):
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, cache=None, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    more = {} if cache is None else {"past_key_values": cache}
    return model.generate(**inputs, **more, **options, output_logits=True, return_dict_in_generate=True)


def same(one, two, tolerance=1e-4):
    assert torch.equal(one.sequences, two.sequences)
    for a, b in zip(one.logits, two.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_equals_the_stock_cache(family):
    model = model_of(family)
    dense = generate(model, padded())
    cache = ChannelShrunkCache(model, factors_of(model))
    same(dense, generate(model, padded(), cache))
    assert all(len(layer.key_codes) == 11 + NEW - 1 - 4 for layer in cache.shrunk_layers().values())


@pytest.mark.parametrize("family", FAMILIES)
def test_half_rank_first_token_bytes_and_rows(family):
    model = model_of(family)
    factors = factors_of(model, HALF)
    dense = generate(model, padded())
    cache = ChannelShrunkCache(model, factors)
    shrunk = generate(model, padded(), cache)
    torch.testing.assert_close(dense.logits[0], shrunk.logits[0], rtol=0, atol=0)  # the prompt is exact
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(dense.logits[1:], shrunk.logits[1:], strict=True))
    assert cache.nbytes() == cache.expected_bytes()
    inputs = padded()
    for row, start in ((0, 4), (1, 0)):  # alone and without padding: the same as in the batch
        alone = {"input_ids": inputs["input_ids"][row : row + 1, start:]}
        single = generate(model, alone, ChannelShrunkCache(model, factors))
        assert torch.equal(single.sequences[0, -NEW:], shrunk.sequences[row, -NEW:])
        for a, b in zip(single.logits, shrunk.logits, strict=True):
            torch.testing.assert_close(a[0], b[row], rtol=0, atol=2e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(implementation):
    model = model_of("llama", implementation)
    same(generate(model, padded()), generate(model, padded(), ChannelShrunkCache(model, factors_of(model))))


WAYS = {
    "beams": {"num_beams": 3},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 2},
    "chunked_prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_ways_of_decoding(way, family):
    model = model_of(family)
    dense = generate(model, padded(), **WAYS[way])
    shrunk = generate(model, padded(), ChannelShrunkCache(model, factors_of(model)), **WAYS[way])
    assert torch.equal(dense.sequences, shrunk.sequences)


def test_sampling_several_sequences():
    model = model_of("qwen3")
    options = {"do_sample": True, "temperature": 0.8, "num_return_sequences": 3}
    torch.manual_seed(1)
    dense = generate(model, padded(), **options)
    torch.manual_seed(1)
    same(dense, generate(model, padded(), ChannelShrunkCache(model, factors_of(model)), **options))


def test_second_turn_on_the_same_cache():
    model, more = model_of("llama"), tokens(2, 7, seed=5)
    from transformers import DynamicCache

    found = []
    for cache in (DynamicCache(config=model.config), ChannelShrunkCache(model, factors_of(model))):
        first = generate(model, padded(), cache).sequences
        ids = torch.cat([first, more], dim=1)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        found.append(generate(model, {"input_ids": ids, "attention_mask": mask}, cache))
    same(*found)


def test_reset_then_reuse():
    model = model_of("llama")
    cache = ChannelShrunkCache(model, factors_of(model, HALF))
    first = generate(model, padded(), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0
    same(first, generate(model, padded(), cache), tolerance=0)
    cache.reset()  # and with another batch
    fresh = generate(model, {"input_ids": tokens(3, 6)}, ChannelShrunkCache(model, factors_of(model, HALF)))
    same(fresh, generate(model, {"input_ids": tokens(3, 6)}, cache), tolerance=0)


def test_rows_are_selected_and_repeated():
    model, factors = model_of("llama"), factors_of(model_of("llama"), HALF)

    def step(cache, ids, positions):
        return model(input_ids=ids, past_key_values=cache, position_ids=positions).logits

    ids = tokens(3, 20)
    # rows at positions of their own, so that the tables differ
    positions = torch.arange(20) + torch.tensor([[0], [3], [7]])
    with torch.no_grad():
        one, two = ChannelShrunkCache(model, factors), ChannelShrunkCache(model, factors)
        for cache in (one, two):
            step(cache, ids[:, :15], positions[:, :15])
            step(cache, ids[:, 15:16], positions[:, 15:16])
        whole = step(one, ids[:, 16:17], positions[:, 16:17])
        two.batch_select_indices(torch.tensor([2, 0]))
        rows = step(two, ids[[2, 0], 16:17], positions[[2, 0], 16:17])
        torch.testing.assert_close(whole[[2, 0]], rows, rtol=0, atol=1e-5)
        two.batch_repeat_interleave(2)
        pair = step(two, ids[[2, 2, 0, 0], 17:18], positions[[2, 2, 0, 0], 17:18])
    torch.testing.assert_close(pair[0], pair[1], rtol=0, atol=1e-5)
    assert one.nbytes() == one.expected_bytes()
    assert two.nbytes() == two.expected_bytes()


def test_sinks_are_exact_in_every_row():
    model = model_of("llama")
    inputs = padded()
    caches = [ChannelShrunkCache(model, factors_of(model, settings)) for settings in (HALF, NO_SINKS)]
    for cache in caches:
        generate(model, inputs, cache, max_new_tokens=12)
        assert cache.nbytes() == cache.expected_bytes()
    assert torch.equal(caches[0].sink_columns, torch.tensor([[4, 5, 6, 7], [0, 1, 2, 3]]))
    layer = caches[0].shrunk_layers()[0]  # of the first layer, whose inputs no cache has touched
    stock = generate(model, inputs, max_new_tokens=1).past_key_values.layers[0]
    for row, start in ((0, 4), (1, 0)):
        for found, exact in zip(layer._all(), (stock.keys, stock.values), strict=True):
            torch.testing.assert_close(found[row, :, start : start + 4], exact[row, :, start : start + 4])
            assert (found[row, :, start + 4 : 11] - exact[row, :, start + 4 : 11]).abs().max() > 1e-3
    assert caches[1].sink_columns is None


def test_a_window_of_the_whole_text_is_dense():
    model = model_of("phi3")
    cache = ChannelShrunkCache(model, factors_of(model, HALF), window=64)
    same(generate(model, padded()), generate(model, padded(), cache), tolerance=0)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_few_bits(bits):
    model = model_of("llama")
    settings = KVShrinkSettings(k_ratio=0.0, v_ratio=0.0, window=4, k_bits=bits, v_bits=bits)
    cache = ChannelShrunkCache(model, factors_of(model, settings))
    dense, shrunk = generate(model, padded()), generate(model, padded(), cache)
    assert cache.nbytes() == cache.expected_bytes()
    torch.testing.assert_close(dense.logits[0], shrunk.logits[0], rtol=0, atol=0)
    if bits == 8:
        assert (dense.logits[1] - shrunk.logits[1]).abs().max() < 0.1


def test_half_precision_stays_close():
    model = model_of("llama")
    factors = factors_of(model)
    low = type(model)(model.config)
    low.load_state_dict(model.state_dict())
    low = low.to(torch.bfloat16).eval()
    cache = ChannelShrunkCache(low, factors)  # the fingerprint survives the cast
    ids = tokens(1, 30)
    with torch.no_grad():
        dense = low(input_ids=ids).logits
        low(input_ids=ids[:, :20], past_key_values=cache)
        rows = [low(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 30)]
    assert cache.nbytes() == cache.expected_bytes()
    assert (torch.cat(rows, dim=1) - dense[:, 20:]).abs().mean() < 0.05 * dense.abs().mean()


def test_crop_takes_back_exact_tokens_only():
    model, ids = model_of("llama"), tokens(1, 20)
    factors = factors_of(model, HALF)
    with torch.no_grad():
        one, two = ChannelShrunkCache(model, factors), ChannelShrunkCache(model, factors)
        for cache, extra in ((one, 0), (two, 2)):
            model(input_ids=ids[:, :10], past_key_values=cache)
            for t in range(10, 12 + extra):
                model(input_ids=ids[:, t : t + 1], past_key_values=cache)
        two.crop(-2)
        assert two.get_seq_length() == one.get_seq_length() == 12
        with pytest.raises(LossplugError, match="9 tokens can't be taken back, 2 are kept exactly"):
            two.crop(-9)


def test_assisted_decoding_is_refused():
    model = model_of("llama")
    with pytest.raises(LossplugError, match="assisted decoding"):
        generate(
            model,
            {"input_ids": tokens(1, 11)},
            ChannelShrunkCache(model, factors_of(model)),
            prompt_lookup_num_tokens=2,
        )


def test_without_hooks_is_one_line():
    model = model_of("llama")
    factors = factors_of(model)
    cache = ChannelShrunkCache(model, factors)
    remove_cache_hooks(model)
    with pytest.raises(LossplugError, match="used without its hooks"):
        generate(model, padded(), cache)
    same(generate(model, padded()), generate(model, padded(), ChannelShrunkCache(model, factors)))


def test_factors_of_another_model():
    model, other = model_of("llama"), model_of("qwen2")
    with pytest.raises(LossplugError, match="of another model"):
        ChannelShrunkCache(other, factors_of(model))
    with pytest.raises(LossplugError, match=r"3 layers to shrink, this one has 2"):
        ChannelShrunkCache(model_of("gemma3"), factors_of(model))


@pytest.mark.parametrize("window", [0, -1, 2.5])
def test_bad_window(window):
    model = model_of("llama")
    with pytest.raises(LossplugError, match="window is"):
        ChannelShrunkCache(model, factors_of(model), window=window)
