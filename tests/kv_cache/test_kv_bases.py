"""Orthogonal bases: identities in float64, and EigenAttention and MatryoshkaKV on tiny models."""

import itertools

import pytest
import torch
from families import model_of, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache import (
    ChannelShrunkCache,
    KVShrinkSettings,
    decode_logits,
    record_moments,
    shrink_kv,
)
from lightning_lossplug.kv_cache import cayley, fit_factors, nested_ranks, principal_axes, ranks_of_threshold
from lightning_lossplug.kv_cache.orthogonal import axis_energies, basis_factors
from lightning_lossplug.kv_cache.plan import relative_error

TEXT = [tokens(4, 40, seed) for seed in range(3)]


def second_of(width, seed=0):
    x = torch.randn(200, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x @ torch.randn(width, width, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return x.T @ x / len(x)


def product(factors):
    return (factors.encode @ factors.decode).double()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(0, 99), st.floats(0, 30))
def test_cayley_is_orthogonal(width, seed, size):
    free = size * torch.randn(2, width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    turned = cayley(free)
    one = torch.eye(width, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(turned.mT @ turned, one, rtol=0, atol=1e-10)
    torch.testing.assert_close(cayley(0 * free), one, rtol=0, atol=0)
    skew = (free - free.mT) / 2
    torch.testing.assert_close(turned @ (one + skew), one - skew, rtol=1e-9, atol=1e-9 * (1 + size))


def test_cayley_has_a_gradient_and_stays_orthogonal_under_steps():
    free = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cayley, torch.randn(3, 3, dtype=torch.float64, requires_grad=True))
    target = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    target = target * target.det().sign()
    optimizer = torch.optim.Adam([free], lr=0.1)
    for _ in range(50):
        loss = (cayley(free) - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        turned = cayley(free.detach())
        assert (turned.T @ turned - torch.eye(4)).abs().max() < 1e-12


def test_ranks_are_nested_and_all_axes_are_exact():
    second = second_of(12)
    bases = principal_axes(second, 3)
    errors = [
        relative_error(
            second, basis_factors([u[:, :r] for u, r in zip(bases, nested_ranks(energies, rank), strict=True)])
        )
        for energies in [axis_energies(second, bases)]
        for rank in range(3, 13)
    ]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-12
    energies = axis_energies(second, bases)
    expected = torch.stack([torch.linalg.eigvalsh(second[i : i + 4, i : i + 4]).flip(0) for i in (0, 4, 8)])
    torch.testing.assert_close(energies, expected)
    assert nested_ranks(energies, 3) == [1, 1, 1]
    with pytest.raises(LossplugError, match="the rank 2 is not in 3 to 12"):
        nested_ranks(energies, 2)


def test_thresholds_are_of_singular_values():
    spectra = [torch.tensor([16.0, 4.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])]  # 4, 2, 1, 1
    assert ranks_of_threshold(spectra, 0.5) == [1, 1]
    assert ranks_of_threshold(spectra, 0.75) == [2, 1]
    assert ranks_of_threshold(spectra, 0.76) == [3, 1]
    assert ranks_of_threshold(spectra, 1) == [4, 3]
    with pytest.raises(LossplugError, match="threshold is 0"):
        ranks_of_threshold(spectra, 0)


@pytest.mark.parametrize("family", ["llama_bias", "qwen3"])
def test_untrained_bases_are_the_closed_form_by_groups(family):
    model = model_of(family)
    recorder = record_moments(model, TEXT)
    plain = {"k_ratio": 0.5, "v_ratio": 0.5}
    eigen = fit_factors(model, recorder, KVShrinkSettings(**plain, factors="eigen_attention"))
    joint = fit_factors(model, recorder, KVShrinkSettings(**plain))
    nested = fit_factors(model, recorder, KVShrinkSettings(**plain, factors="matryoshka_kv"))
    for index in eigen.layers:
        one, two = eigen.layers[index].keys, joint.layers[index].keys
        torch.testing.assert_close(product(one), product(two), rtol=0, atol=1e-4)
        assert nested.layers[index].keys.rank == two.rank
        # a projection on axes: symmetric, and the same twice
        for factors in (one, eigen.layers[index].values, nested.layers[index].keys):
            through = product(factors)
            torch.testing.assert_close(through, through.T, rtol=0, atol=1e-4)
            torch.testing.assert_close(through @ through, through, rtol=0, atol=1e-4)
        assert joint.layers[index].k_error <= nested.layers[index].k_error + 1e-9


def test_no_error_allowed_is_dense_and_more_costs_less():
    model = model_of("llama")
    recorder = record_moments(model, TEXT)
    found = [
        fit_factors(model, recorder, KVShrinkSettings(factors="eigen_attention", error_budget=budget), TEXT)
        for budget in (1e-7, 0.1, 0.5)
    ]
    bytes_ = [factors.summary(4)["bytes_per_token"] for factors in found]
    assert bytes_[0] == found[0].summary(4)["dense_bytes_per_token"] > bytes_[1] > bytes_[2]
    dense, kept = (decode_logits(model, factors, TEXT[0], 10) for factors in (None, found[0]))
    torch.testing.assert_close(dense, kept, rtol=0, atol=1e-3)
    with pytest.raises(LossplugError, match="making these factors looks at texts, and there are none"):
        fit_factors(model, recorder, found[1].settings)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_training_lowers_the_divergence_and_keeps_bases_orthogonal(family):
    model, few = model_of(family), {"k_ratio": 0.75, "v_ratio": 0.75, "window": 1, "sinks": 0}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def divergence(steps):
        wanted = KVShrinkSettings(**few, factors="matryoshka_kv", steps=steps, lr=0.02)
        factors = shrink_kv(model, TEXT, wanted)
        through = product(factors.layers[max(factors.layers)].values)
        torch.testing.assert_close(through @ through, through, rtol=0, atol=1e-4)
        logits = [decode_logits(model, f, TEXT[0], 10)[:, 10:].log_softmax(-1) for f in (None, factors)]
        return float(torch.nn.functional.kl_div(logits[1], logits[0], log_target=True, reduction="batchmean"))

    assert divergence(40) < 0.98 * divergence(0)
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())


def test_the_cache_takes_them():
    model = model_of("qwen2")
    inputs = {"input_ids": TEXT[0][:2]}
    for name in ("eigen_attention", "matryoshka_kv"):
        factors = shrink_kv(model, TEXT, KVShrinkSettings(k_ratio=0.5, v_ratio=0.5, factors=name))
        found = [
            model.generate(
                **inputs,
                past_key_values=ChannelShrunkCache(model, factors, attention=attention),
                max_new_tokens=6,
                do_sample=False,
            )
            for attention in ("rebuild", "auto")
        ]
        assert torch.equal(*found)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"factors": "svd"}, "factors is 'svd'"),
        ({"factors": "eigen_attention", "steps": 3}, "eigen_attention trains nothing"),
        ({"factors": "matryoshka_kv", "means": True}, "means is True, which is for factors='cskv'"),
        ({"error_budget": 0.1}, "error_budget is for factors='eigen_attention'"),
        ({"factors": "eigen_attention", "error_budget": 1.5}, "error_budget is 1.5"),
    ],
)
def test_settings_that_do_not_go_together(fields, words):
    with pytest.raises(LossplugError, match=words):
        KVShrinkSettings(**fields)
