"""Training factors on the tokens themselves: CSKV's loss, and few-bit codes through their rounding."""

import pytest
import torch
from families import model_of, tokens

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.kv_cache import KVShrinkSettings, gram_loss, record_moments, shrink_kv, stream_factors

TEXTS = [tokens(4, 40, seed) for seed in range(3)]


def fitted(family, **options):
    return shrink_kv(model_of(family), TEXTS, KVShrinkSettings(**{"k_ratio": 0.5, "v_ratio": 0.5, **options}))


def losses_of(family, factors, steps, lr=1e-2):
    found = []
    trained = stream_factors(
        model_of(family), factors, TEXTS, steps=steps, lr=lr, report=lambda step, loss: found.append(loss)
    )
    return trained, found


@pytest.mark.parametrize("family", ["llama_bias", "gemma3", "phi"])
@pytest.mark.parametrize("sinks", [0, 4])
def test_the_streamed_loss_is_the_one_from_moments(family, sinks):
    factors = fitted(family, sinks=sinks)
    _, found = losses_of(family, factors, 1)
    layers = record_moments(model_of(family), TEXTS[:1], sinks).layers
    expected = sum(
        gram_loss(moments.second(centred=False), None, own.encode.double(), own.decode.double())
        for index, layer in factors.layers.items()
        for moments, own in ((layers[index].keys, layer.keys), (layers[index].values, layer.values))
    )
    assert found[0] == pytest.approx(float(expected), rel=1e-4)


def test_it_ends_between_its_start_and_the_closed_form():
    closed, start = fitted("llama"), fitted("llama", init="asvd")
    trained = fitted("llama", init="asvd", steps=150, lr=1e-2, train_on="text")
    for index, layer in trained.layers.items():
        for name in ("k_error", "v_error"):
            best, first, last = (getattr(f.layers[index], name) for f in (closed, start, trained))
            assert best - 1e-6 <= getattr(layer, name) == last < first
            assert last < best + 0.5 * (first - best)


@pytest.mark.parametrize("bits", [4, 2])
def test_few_bits_are_trained_through_their_rounding(bits):
    model = model_of("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    factors = fitted("llama", k_ratio=0.0, v_ratio=0.0, k_bits=bits, v_bits=bits)  # rounding is the only error
    _, found = losses_of("llama", factors, 90)
    assert sum(found[-3:]) < 0.95 * sum(found[:3])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any("_hook.<locals>" in str(module._forward_pre_hooks) for module in model.modules())


def test_head_groups_stay_apart():
    factors = fitted("llama", head_group=1, steps=3, train_on="text")
    for layer in factors.layers.values():
        for own in (layer.keys, layer.values):
            half = own.width // 2
            assert not own.encode[:half, own.rank // 2 :].any()
            assert not own.decode[own.rank // 2 :, :half].any()
            assert own.encode.any()


def test_refusals():
    model, factors = model_of("llama"), fitted("llama")
    with pytest.raises(LossplugError, match="there are no texts"):
        stream_factors(model, factors, [], steps=1)
    with pytest.raises(LossplugError, match="steps is 0"):
        stream_factors(model, factors, TEXTS, steps=0)
    with pytest.raises(LossplugError, match="of another model"):
        stream_factors(model_of("qwen2"), factors, TEXTS, steps=1)
    with pytest.raises(LossplugError, match="loss is not finite"):
        stream_factors(model, factors, TEXTS, steps=9, lr=1e30)
    with pytest.raises(LossplugError, match="train_on is 'texts'"):
        KVShrinkSettings(train_on="texts")
    with pytest.raises(LossplugError, match="train_on is 'text', which is for factors='cskv'"):
        KVShrinkSettings(train_on="text", factors="matryoshka_kv")
