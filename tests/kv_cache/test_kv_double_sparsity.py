"""Double Sparsity: dense at the limits, exact top-k with all channels, one pass equals decoding."""

import pytest
import torch
import torch.nn.functional as F
from families import model_of, tokens
from test_kv_generate import generate, padded, same

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache import (
    DoubleSparsity,
    DoubleSparsityCache,
    double_sparsity,
    double_sparsity_mode,
)
from lightning_lossplug.kv_cache.labels import label_channels, label_scores, round_labels, sparse_attention, take_labels

TEXT = [tokens(4, 40, seed) for seed in range(2)]


def states(tokens=20, heads=2, width=8, rows=3):
    g = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, heads, tokens, width, generator=g, dtype=torch.float64)
    return torch.randn(2, heads, rows, width, generator=g, dtype=torch.float64), keys, values


def test_all_channels_give_the_exact_top_k():
    query, keys, values = states()
    everything = torch.arange(8).expand(2, 8)
    scores = label_scores(query, keys, everything, 16)
    exact = query @ keys.transpose(-1, -2)
    keep = exact >= exact.topk(5, dim=-1).values[..., -1:]
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=keep, scale=0.5)
    torch.testing.assert_close(sparse_attention(query, keys, values, scores, 5, 0.5), expected)
    torch.testing.assert_close(sparse_attention(query, keys, values, 7 * scores, 5, 0.5), expected)
    dense = F.scaled_dot_product_attention(query, keys, values, scale=0.5)
    torch.testing.assert_close(sparse_attention(query, keys, values, scores, 20, 0.5), dense)
    mask = torch.zeros(2, 1, 1, 20, dtype=torch.float64)
    mask[0, ..., :12] = torch.finfo(torch.float64).min
    masked = sparse_attention(query, keys, values, scores + mask, 6, 0.5, mask)
    alone = sparse_attention(query[:1], keys[:1, :, 12:], values[:1, :, 12:], scores[:1, ..., 12:], 6, 0.5)
    torch.testing.assert_close(masked[:1], alone)


def test_labels():
    statistic = torch.tensor([[1.0, 5.0, 5.0, 2.0]])
    assert label_channels(statistic, 3).tolist() == [[1, 2, 3]]  # ties: the lower channel
    query, keys, _ = states()
    channels = label_channels(torch.rand(2, 8), 3)
    order = torch.randperm(8)
    where = torch.stack([torch.stack([(order == c).nonzero()[0, 0] for c in head]) for head in channels])
    pairs = ((query, keys, channels), (query[..., order], keys[..., order], where))
    one, two = (label_scores(q, take_labels(k, c), c, 4) for q, k, c in pairs)
    torch.testing.assert_close(one, two)
    rounded = round_labels(keys, 4)
    step = (keys.amax(-1) - keys.amin(-1)) / 15
    assert bool(((rounded - keys).abs() <= step[..., None] / 2 + 1e-12).all())
    torch.testing.assert_close(round_labels(torch.full((1, 3), 2.5), 2), torch.full((1, 3), 2.5))
    with pytest.raises(LossplugError, match="channels is 5, allowed are whole numbers from 1 to 4"):
        label_channels(statistic, 5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi", "gpt_neox"])
def test_enough_tokens_are_dense(family):
    model = model_of(family)
    table = double_sparsity(model, TEXT, channels=4, tokens=64)
    assert set(table.channels) == {2}
    same(generate(model, padded()), generate(model, padded(), DoubleSparsityCache(model, table)))


@torch.no_grad()
@pytest.mark.parametrize(("statistic", "bits"), [("q", 16), ("k", 4), ("qk", 16)])
def test_one_pass_equals_decoding(statistic, bits):
    model, ids = model_of("llama"), tokens(2, 30, seed=9)
    table = double_sparsity(model, TEXT, 3, 6, statistic, bits, dense_layers=(1,))
    assert set(table.channels) == {0, 2}
    cache = DoubleSparsityCache(model, table)
    logits = [model(input_ids=ids[:, :14], past_key_values=cache).logits]
    logits += [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(14, 30)]
    with double_sparsity_mode(model, table, 14):
        once = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(once, torch.cat(logits, dim=1), rtol=0, atol=1e-4)
    dense = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(once[:, :14], dense[:, :14], rtol=0, atol=1e-4)
    assert (once - dense)[:, 14:].abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
def test_beams_and_taking_back(options):
    model = model_of("llama")
    table = double_sparsity(model, TEXT, channels=8, tokens=64, dense_layers=())
    inputs = {"input_ids": tokens(1, 12)}
    dense = generate(model, inputs, **options)
    assert torch.equal(dense.sequences, generate(model, inputs, DoubleSparsityCache(model, table), **options).sequences)


def test_padding_is_never_chosen():
    model = model_of("llama")
    table = double_sparsity(model, TEXT, channels=4, tokens=5, dense_layers=())
    both = generate(model, padded(), DoubleSparsityCache(model, table))
    alone = generate(model, {"input_ids": padded()["input_ids"][:1, 4:]}, DoubleSparsityCache(model, table))
    assert torch.equal(both.sequences[0, 11:], alone.sequences[0, 7:])


def test_statistic_is_that_of_the_group():
    model = model_of("llama")
    layer, seen = model.model.layers[1].self_attn.q_proj, []
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out))
    table = double_sparsity(model, TEXT[:1], channels=8, dense_layers=(0, 2))
    handle.remove()
    q = seen[0].unflatten(-1, (2, 2, 8)).abs().mean((0, 1, 3))
    assert torch.equal(table.channels[1], q.argsort(-1, descending=True))


def test_saved_and_refused(tmp_path):
    model = model_of("llama")
    table = double_sparsity(model, TEXT, channels=2, tokens=9, label_bits=4)
    loaded = DoubleSparsity.load(table.save(tmp_path / "labels.json"))
    assert (loaded.tokens, loaded.label_bits) == (9, 4)
    assert torch.equal(loaded.channels[2], table.channels[2])
    with pytest.raises(LossplugError, match="of another model"):
        DoubleSparsityCache(model_of("qwen2"), loaded)
    with pytest.raises(LossplugError, match="can't be read"):
        DoubleSparsity.load(tmp_path / "none.json")
    for bad, words in (
        ({"tokens": 0}, "tokens is 0"),
        ({"label_bits": 3}, "bits is 3"),
        ({"channels": 9}, "channels is 9, allowed are whole numbers from 1 to 8"),
        ({"statistic": "v"}, "statistic is 'v'"),
        ({"dense_layers": (0, 1, 2)}, "every layer is a dense layer"),
    ):
        with pytest.raises(LossplugError, match=words):
            double_sparsity(model, TEXT[:1], **{"channels": 2, **bad})
    with pytest.raises(LossplugError, match="the queries were not seen"):
        double_sparsity(model_of("gemma2"), TEXT)
