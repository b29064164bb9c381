"""Factors trained against the dense logits get closer to them, whatever the bits; the model stays as it is."""

import pytest
import torch
from families import model_of, tokens

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache import KVShrinkSettings, decode_logits, decode_mode, distill_kv, shrink_kv

TEXT = [tokens(4, 40, seed) for seed in range(3)]


def gap(model, factors, ids):
    dense, shrunk = (decode_logits(model, f, ids, 10)[:, 10:].log_softmax(-1) for f in (None, factors))
    return float((dense.exp() * (dense - shrunk)).sum(-1).mean())


@pytest.mark.parametrize(("family", "bits"), [("llama", 16), ("qwen2", 4), ("gpt_neox", 16)])
def test_training_closes_the_gap(family, bits):
    model = model_of(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    start = shrink_kv(model, TEXT, KVShrinkSettings(k_ratio=0.8, v_ratio=0.8, window=4, k_bits=bits, v_bits=bits))
    losses = []
    made = distill_kv(model, start, TEXT, steps=24, lr=3e-2, prefill=10, report=lambda step, loss: losses.append(loss))
    assert len(losses) == 24
    assert gap(model, made, TEXT[0]) < 0.9 * gap(model, start, TEXT[0])
    assert all(torch.equal(before[name], p) and p.requires_grad for name, p in model.named_parameters())
    assert made.branches() == start.branches()
    assert not made.layers[0].keys.encode.requires_grad


def test_the_model_itself_can_be_trained_under_the_codes():
    model = model_of("llama")
    factors = shrink_kv(model, TEXT, KVShrinkSettings(k_ratio=0.5, v_ratio=0.5, window=4))
    with decode_mode(model, factors, 1):
        model(input_ids=TEXT[0], labels=TEXT[0], use_cache=False).loss.backward()
    weight = model.model.layers[1].self_attn.k_proj.weight
    assert bool(weight.grad.isfinite().all())
    assert float(weight.grad.abs().max()) > 0
    model.zero_grad()


def test_refusals():
    model = model_of("llama")
    factors = shrink_kv(model, TEXT, KVShrinkSettings(k_ratio=0.5, v_ratio=0.5))
    with pytest.raises(LossplugError, match="there are no batches"):
        distill_kv(model, factors, [], steps=1)
    with pytest.raises(LossplugError, match="steps is 0"):
        distill_kv(model, factors, TEXT, steps=0)
    with pytest.raises(LossplugError, match="lr is 0"):
        distill_kv(model, factors, TEXT, steps=1, lr=0.0)
