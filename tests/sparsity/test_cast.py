"""CAST: the decay touches pruned weights alone, all reach zero at the end, the forward pass is dense until then."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import NMCAST, NMSettings, NMTechnique, nm_mask, sign_decay_
from lightning_lossplug.surgery import fold, latent


def weight_of(seed=0, shape=(6, 16)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), remaining=st.integers(1, 50), shape=st.sampled_from([(6, 16), (3, 4, 3, 3), (2, 20)]))
def test_one_decay_is_a_sign_step_of_the_pruned_weights(seed, remaining, shape):
    weight = weight_of(seed, shape)
    mask = nm_mask(weight, 2, 4)
    found = sign_decay_(weight.clone(), mask, remaining)
    assert torch.equal(found[mask], weight[mask])
    largest = (weight * ~mask).flatten(1).abs().amax(1).view(-1, *[1] * (weight.ndim - 1))
    expected = weight.sign() * (weight.abs() - largest / remaining).clamp_min(0)
    assert torch.allclose(found[~mask], expected[~mask], rtol=1e-12, atol=1e-15)
    if remaining == 1:
        assert not found[~mask].any()
        assert not found[~mask].signbit().any()


def test_left_alone_the_rows_meet_zero_together():
    weight = weight_of() * torch.tensor([1.0, 100, 1e-3, 7, 0, 2], dtype=torch.float64)[:, None]
    mask = nm_mask(weight, 2, 4)
    first = (weight * ~mask).abs().amax(1)
    for step in range(20):
        sign_decay_(weight, mask, 20 - step)
        now = (weight * ~mask).abs().amax(1)
        assert torch.allclose(now, first * (19 - step) / 20, rtol=1e-12)
    assert torch.equal(weight != 0, mask & (weight != 0))
    assert not weight[~mask].any()
    with pytest.raises(LossplugError, match="remaining is 0"):
        sign_decay_(weight, mask, 0)


def run(optimizer, steps=25, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    technique = NMTechnique(NMSettings(2, 4, "nm_cast", include=["0", "2"], **options))
    technique.attach(model)
    optimizer = optimizer(model.parameters())
    x, target = weight_of(1, (32, 8)), weight_of(2, (32, 4))
    technique.advance(Progress(0, steps))
    updates, dense, pruned = [], [], []
    for step in range(steps):
        updates.append(technique.layers["0"].last_update)
        dense.append(torch.equal(model[0].weight, latent(model[0])))
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        technique.before_step(optimizer)
        optimizer.step()
        technique.after_step(optimizer)
        pruned.append(float((latent(model[0]) * ~technique.layers["0"].transform.mask).detach().abs().max()))
        technique.advance(Progress(step + 1, steps))
    return technique, model, updates, dense, pruned


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)],
)
def test_dense_until_the_end_and_exact_then(optimizer):
    technique, model, updates, dense, pruned = run(optimizer)
    assert all(dense)
    assert updates == [0] * 10 + [10] * 10 + [20] * 5
    assert pruned[0] > pruned[12] > pruned[22] > pruned[24] == 0
    assert not technique.finish()
    for i, layer in ((0, technique.layers["0"]), (2, technique.layers["2"])):
        kept = latent(model[i]) != 0
        assert torch.equal(kept.reshape(-1, 4).sum(1), torch.full((kept.numel() // 4,), 2))
        assert not latent(model[i])[~layer.transform.mask].any()
        assert torch.equal(fold(model)[i].weight, latent(model[i]))  # nothing is left for the mask to remove


def test_phases():
    technique, model, _, dense, pruned = run(lambda p: torch.optim.AdamW(p, 1e-2), finetune_fraction=0.2)
    assert dense[:20] == [True] * 20
    assert not any(pruned[19:])
    assert not latent(model[0])[~technique.layers["0"].transform.mask].any()
    _, _, updates, _, pruned = run(lambda p: torch.optim.AdamW(p, 1e-2), dense_fraction=0.2)
    assert updates[:5] == [-1] * 5
    assert updates[5] == 5
    assert pruned[-1] == 0
    assert NMCAST().mask_update_every == 10
    with pytest.raises(LossplugError, match="training length is unknown"):
        NMCAST().plan(None).state(0)


def test_a_run_cut_short_is_not_sparse_and_says_so():
    technique, _, _, dense, pruned = run(lambda p: torch.optim.AdamW(p, 1e-2), total_steps=100)
    assert "ended before the final pattern" in technique.finish()[0]
    assert all(dense)
    assert pruned[-1] > 0
