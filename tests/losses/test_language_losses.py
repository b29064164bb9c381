"""Identities of the cards ``number_token``, ``dist2``, ``eisl`` and ``moe_bias_balancing``."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import LabelError, create
from lightning_lossplug.losses.dist2 import tau_for_entropy
from lightning_lossplug.losses.eisl import window_means
from lightning_lossplug.losses.moe_bias_balancing import bias_step

V = 14
NAN = float("nan")


def digit_table():
    values = torch.full((V,), NAN, dtype=torch.float64)
    values[2:12] = torch.arange(10.0)
    return values


@pytest.fixture
def batch():
    torch.manual_seed(0)
    y = torch.randint(V, (3, 6))
    y[0, :3] = torch.tensor([4, 11, 0])
    return torch.randn(3, 6, V, dtype=torch.float64, requires_grad=True), y


def number(**parameters):
    return create("number_token", **{"weight": 1.0, "values": digit_table(), **parameters})


def reference(z, y, ignore=-100):
    """Loop over positions: (softmax over numbers, values, true value) of those that count."""
    table = digit_table()
    numbers = table[table.isfinite()]
    for b, t in [(b, t) for b in range(y.shape[0]) for t in range(y.shape[1])]:
        if y[b, t] != ignore and table[y[b, t]].isfinite():
            yield z[b, t, table.isfinite()].softmax(0), numbers, table[y[b, t]]


def test_number_token_definitions(batch):
    z, y = batch
    rows = list(reference(z, y))
    was = torch.stack([(q * (v - t).abs()).sum() for q, v, t in rows]).mean()
    mse = torch.stack([((q * v).sum() - t) ** 2 for q, v, t in rows]).mean()
    torch.testing.assert_close(number()(z, y), was)
    torch.testing.assert_close(number(variant="mse")(z, y), mse)
    torch.testing.assert_close(create("number_token")(z, y, digit_table()), 0.3 * was)


def test_number_token_jensen_and_equality_on_one_side(batch):
    z, y = batch
    was = number(reduction="none")(z, y)
    mse = number(variant="mse", reduction="none")(z, y)
    assert (was >= mse.sqrt() - 1e-12).all()
    y = torch.full_like(y, 2)  # the value 0: everything lies on one side
    torch.testing.assert_close(number(reduction="none")(z, y), number(variant="mse", reduction="none")(z, y).sqrt())


def test_number_token_is_zero_only_at_the_label():
    y = torch.tensor([[5]])
    sure = torch.full((1, 1, V), -1e4, dtype=torch.float64)
    sure[0, 0, 5] = 0
    assert number()(sure, y) == 0
    sure[0, 0, 6] = -2.0
    assert number()(sure, y) > 0


def test_number_token_shift_of_number_logits(batch):
    z, y = batch
    shifted = torch.where(digit_table().isfinite(), z + 3.0, z)
    torch.testing.assert_close(number()(shifted, y), number()(z, y))
    reweighed = number(reweigh=True)
    assert reweighed(shifted, y) < reweighed(z, y)


def test_number_token_reweigh_and_squash(batch):
    z, y = batch
    mass = z.softmax(-1)[..., digit_table().isfinite()].sum(-1)
    counts = digit_table()[y].isfinite()
    plain = number(reduction="none")(z, y)
    expected = torch.where(counts, plain * mass + 1.01 * 9 * (1 - mass), 0)
    torch.testing.assert_close(number(reduction="none", reweigh=True)(z, y), expected)
    numbers = digit_table()[2:12]
    matrix = (numbers[:, None] - numbers).abs()
    squashed = torch.where(matrix > 0, 1 + (matrix - 1) * (4.0 - 1) / (9 - 1), 0)
    q = z[..., 2:12].softmax(-1)
    rows = (q * squashed[(y - 2).clamp(0, 9)]).sum(-1)
    torch.testing.assert_close(number(squash=4.0, reduction="none")(z, y), torch.where(counts, rows, 0))


def test_number_token_values_with_duplicates_and_gaps(batch):
    z, y = batch
    values = digit_table()
    values[12], values[13] = 3.0, 250.0
    q = z[..., 2:].softmax(-1)
    rows = (q * (values[2:] - values[y].nan_to_num()[..., None]).abs()).sum(-1)
    expected = torch.where(values[y].isfinite(), rows, 0)
    torch.testing.assert_close(number(values=values, reduction="none")(z, y), expected)
    assert number(values=torch.tensor([NAN] * 12 + [1.0, 1.0]), squash=2.0)(z, y).isfinite()


@pytest.mark.parametrize("name", ["number_token", "dist2"])
def test_ignored_labels_do_not_read_the_table(name, batch):
    z, y = batch
    values = digit_table()
    values[V - 1] = 5.0  # what index -100 + V would read is a number here
    ignored = y.clone()
    ignored[0, 0] = -100
    loss = create(name, values=values, reduction="none")
    expected = loss(z, y).detach().clone()
    expected[0, 0] = 0
    torch.testing.assert_close(loss(z, ignored).detach(), expected)
    bad = z.detach().clone()
    bad[0, 0] = NAN
    bad.requires_grad_()
    value = create(name, values=values)(bad, ignored)
    assert value.isfinite()
    assert torch.autograd.grad(value, bad)[0].isfinite().all()


@pytest.mark.parametrize("name", ["number_token", "dist2"])
def test_no_number_in_the_batch_is_zero_and_attached(name, batch):
    z, _ = batch
    for y in (torch.zeros(3, 6, dtype=torch.long), torch.full((3, 6), -100)):
        value = create(name, values=digit_table())(z, y)
        assert value == 0
        assert (torch.autograd.grad(value, z)[0] == 0).all()


@pytest.mark.parametrize("name", ["number_token", "dist2"])
def test_token_values_are_checked(name, batch):
    z, y = batch
    for values, message in (
        (None, "no value table"),
        (torch.zeros(V - 1), "tokens"),
        (torch.full((V,), NAN), "no token"),
        (torch.zeros(V, 2, 2), "shape"),
    ):
        with pytest.raises(LossplugError, match=message):
            create(name)(z, y, values)
    for labels in (y[:, :2], y.double(), y.bool()):
        with pytest.raises(LossplugError, match="target"):
            create(name, values=digit_table())(z, labels)
    with pytest.raises(LabelError):
        create(name, values=digit_table())(z, torch.full_like(y, V))


def test_number_token_equals_ntloss(batch):
    ntloss = pytest.importorskip("ntloss", reason="parity with the authors' package needs ntloss")
    z, y = batch

    class Tokenizer:
        vocab = {("x" * (i + 2) if not 2 <= i < 12 else str(i - 2)): i for i in range(V)}

        def get_vocab(self):
            return self.vocab

        def add_tokens(self, tokens):
            return 0

        def __len__(self):
            return V

    y[1, 2] = -100
    z32 = z.detach().float()
    weight = torch.rand(3, 6)
    for options in ({}, {"reweigh": True}, {"squash": 3.0}, {"squash": 3.0, "reweigh": True}):
        theirs = ntloss.NTLoss(Tokenizer(), reweigh=options.get("reweigh", False), squash_factor=options.get("squash"))
        torch.testing.assert_close(number(**options)(z32, y), theirs(z32, y))
        torch.testing.assert_close(number(**options)(z32, y, sample_weight=weight), theirs(z32, y, loss_weights=weight))
    for reweigh in (False, True):
        theirs = ntloss.NTLossDotProduct(Tokenizer(), reweigh=reweigh)
        torch.testing.assert_close(number(variant="mse", reweigh=reweigh)(z32, y), theirs(z32, y))


def dist2(**parameters):
    return create("dist2", **{"alpha": 1.0, "values": digit_table(), **parameters})


def test_dist2_definition_restricted_and_not(batch):
    z, y = batch
    counts = digit_table()[y].isfinite()
    numbers = digit_table()[2:12]
    truth = digit_table()[y][counts]
    for kind, d in (("sq", (numbers - truth[:, None]) ** 2), ("abs", (numbers - truth[:, None]).abs())):
        p = (-d / 4.0).softmax(1)
        inside = z[counts][:, 2:12].log_softmax(1)
        outside = z[counts].log_softmax(1)[:, 2:12]
        for restrict, log_q in ((True, inside), (False, outside)):
            expected = (p * (p.log() - log_q)).sum(1).mean()
            torch.testing.assert_close(dist2(distance=kind, tau=4.0, restrict=restrict)(z, y), expected)


def test_dist2_small_tau_is_cross_entropy_over_numbers(batch):
    z, y = batch
    counts = digit_table()[y].isfinite()
    expected = F.cross_entropy(z[counts][:, 2:12], y[counts] - 2)
    torch.testing.assert_close(dist2(tau=1e-3)(z, y), expected)
    assert dist2(tau=1e-30)(z.float(), y).isfinite()


def test_dist2_gradient_and_minimum(batch):
    z, y = batch
    loss = dist2(alpha=0.7, tau=3.0, reduction="sum")
    grad = torch.autograd.grad(loss(z, y), z)[0]
    counts = digit_table()[y].isfinite()
    numbers = digit_table()[2:12]
    p = (-((numbers - digit_table()[y][counts][:, None]) ** 2) / 3.0).softmax(1)
    expected = torch.zeros_like(z)
    expected[counts] = F.pad(0.7 * (z[counts][:, 2:12].softmax(1) - p), (2, 2))
    torch.testing.assert_close(grad, expected.detach())
    best = z.detach().clone()
    best[..., 2:12][counts] = p.log()
    assert (dist2(tau=3.0, reduction="none")(best, y).abs() < 1e-12).all()
    assert (dist2(tau=3.0, reduction="none")(z, y) >= 0).all()


def test_dist2_embeddings_and_entropy(batch):
    z, y = batch
    torch.manual_seed(1)
    table = torch.full((V, 3), NAN, dtype=torch.float64)
    table[2:12] = torch.randn(10, 3, dtype=torch.float64)
    counts = table[y].isfinite().all(-1)
    truth, codes = table[y][counts], table[2:12]
    for kind, d in (
        ("mse", ((truth[:, None] - codes) ** 2).mean(2)),
        ("cosine", 1 - F.cosine_similarity(truth[:, None], codes, dim=2)),
    ):
        p = (-d / 0.5).softmax(1)
        expected = (p * (p.log() - z[counts][:, 2:12].log_softmax(1))).sum(1).mean()
        # The table is kept in the default dtype, so the distances have its digits.
        torch.testing.assert_close(dist2(distance=kind, tau=0.5, values=table)(z, y), expected, rtol=1e-6, atol=1e-6)
        tau = tau_for_entropy(d, 1.5)
        q = (-d / tau).softmax(1)
        assert -(q * q.log()).sum(1).mean() == pytest.approx(1.5, abs=1e-6)
        with pytest.raises(LossplugError, match="entropy"):
            tau_for_entropy(d, 2.4)
        with pytest.raises(LossplugError, match="embeddings"):
            dist2(distance=kind)


def eisl(**parameters):
    return create("eisl", **{"gumbel": False, **parameters})


def test_eisl_windows_are_explicit_means():
    torch.manual_seed(0)
    a = torch.randn(2, 5, 4, dtype=torch.float64)
    for n in (1, 2, 3, 4):
        r = window_means(a, n)
        assert r.shape == (2, 6 - n, 5 - n)
        for t in range(6 - n):
            for u in range(5 - n):
                torch.testing.assert_close(r[:, t, u], torch.stack([a[:, t + k, u + k] for k in range(n)]).mean(0))


def test_eisl_full_length_is_mean_token_nll(batch):
    z, y = batch
    nll = F.cross_entropy(z.flatten(0, 1), y.flatten())
    for n in ([6], [0]):
        torch.testing.assert_close(eisl(ngrams=n)(z, y), nll)
    torch.testing.assert_close(eisl(ngrams=[6], weights=(0.5, 2.0))(z, y), 2.5 * nll)


def test_eisl_definition_and_list(batch):
    z, y = batch
    lp = z.log_softmax(-1)
    y = y[:, :5]

    def by_hand(n):
        total = 0.0
        for b in range(3):
            grams = []
            for u in range(5 - n + 1):
                r = torch.stack([sum(lp[b, t + k, y[b, u + k]] for k in range(n)) / n for t in range(6 - n + 1)])
                grams.append((r.softmax(0) * r).sum())
            total = total - torch.stack(grams).mean()
        return total / 3

    torch.testing.assert_close(eisl(ngrams=[2])(z, y), by_hand(2))
    torch.testing.assert_close(eisl(ngrams=[2, 3, -2, 9])(lp, y), (by_hand(2) + by_hand(3) + by_hand(4)) / 3)


def test_eisl_forgives_a_shift():
    torch.manual_seed(0)
    y = torch.randperm(20)[None, :12]
    sharp = 12.0 * F.one_hot(y, 20).double()
    shifted = sharp.roll(1, dims=1)
    right, moved = (F.cross_entropy(s[0], y[0]) for s in (sharp, shifted))
    assert moved - right > 8
    change = eisl(ngrams=[2])(shifted, y) - eisl(ngrams=[2])(sharp, y)
    assert change < 2  # only the bigram that crosses the border is lost


def test_eisl_padding_and_output_mask(batch):
    z, y = batch
    padded = y.clone()
    padded[0, 4:] = -100
    loss = eisl(ngrams=[2, 3], reduction="none")
    alone = loss(z[:1], y[:1, :4])
    torch.testing.assert_close(loss(z, padded)[:1], alone)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, 4:] = False
    torch.testing.assert_close(loss(z, padded, output_mask=mask)[:1], loss(z[:1, :4], y[:1, :4]))
    ignored = eisl()(z, torch.full_like(y, -100))
    assert ignored == 0
    assert (torch.autograd.grad(ignored, z)[0] == 0).all()
    with pytest.raises(LossplugError, match="output_mask"):
        loss(z, y, output_mask=mask[:, :3])


def test_eisl_noise_is_torchs_and_the_floor_holds(batch):
    z, y = batch
    noisy = create("eisl")
    torch.manual_seed(3)
    first = noisy(z, y)
    torch.manual_seed(3)
    assert noisy(z, y) == first
    assert noisy(z, y) != first
    assert eisl()(z, y) == eisl()(z, y)
    worst = torch.zeros(1, 3, 5)
    worst[..., 0] = 1e6
    assert eisl(ngrams=[1])(worst, torch.tensor([[1, 2, 3]])) == 20
    with pytest.raises(LossplugError, match="equal lengths"):
        eisl(weights=(1.0, 1.0))(z, y[:, :3])
    with pytest.raises(LabelError):
        eisl()(z, torch.full_like(y, V))


def balancer(**parameters):
    return create("moe_bias_balancing", **{"num_experts": 4, "k": 2, **parameters})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=9), st.floats(1e-5, 1.0))
def test_bias_step_follows_the_sign(counts, rate):
    c = torch.tensor(counts)
    change = bias_step(torch.zeros(len(counts)), c, rate)
    mean = sum(counts) / len(counts)
    for value, count in zip(change.tolist(), counts, strict=True):
        assert value == pytest.approx(rate * ((mean > count) - (mean < count)), rel=1e-6)
    assert bias_step(torch.zeros(len(counts)), c, rate, center=True).mean().abs() < 1e-6


def test_router_chooses_with_the_bias_and_gates_without():
    torch.manual_seed(0)
    router = balancer()
    scores = torch.rand(5, 7, 4, requires_grad=True)
    gates, experts = router(scores)
    torch.testing.assert_close(gates, scores.topk(2).values)
    router.bias.copy_(torch.tensor([10.0, 0, 0, 0]))
    gates, experts = router(scores)
    assert (experts == 0).any(-1).all()
    torch.testing.assert_close(gates, scores.gather(-1, experts))
    gates.sum().backward()
    assert router.bias.grad is None
    assert not router.bias.requires_grad
    before = router(scores)[1]
    router.bias.add_(3.0)
    assert (router(scores)[1] == before).all()


def test_router_counts_in_training_and_steps():
    router = balancer(k=1, update_rate=0.5)
    scores = torch.eye(4)[[0, 0, 0, 1]]
    router(scores)
    router(scores)
    router.eval()
    router(scores)
    assert router.counts.tolist() == [6, 2, 0, 0]
    assert router.max_violation() == 2.0
    router.step()
    assert router.bias.tolist() == [-0.5, 0.0, 0.5, 0.5]
    assert router.counts.sum() == 0
    router.counts.fill_(5)
    before = router.bias.clone()
    router.step()
    assert (router.bias == before).all()  # uniform counts


def test_router_keeps_its_bias_in_float32_and_in_checkpoints():
    router = balancer(update_rate=1e-3)
    router.bias.fill_(1.0)
    router.bfloat16()
    assert router.bias.dtype == torch.float32
    router(torch.eye(4, dtype=torch.bfloat16)[[0, 0]])
    router.step()
    assert router.bias.tolist() != [1.0] * 4
    copy = balancer()
    copy.load_state_dict(router.state_dict())
    assert (copy.bias == router.bias).all()
    assert set(router.state_dict()) == {"bias"}
    assert list(router.parameters()) == []


def test_balancing_evens_out_a_skewed_router():
    torch.manual_seed(0)
    router = balancer(k=1, update_rate=0.01)
    skew = torch.tensor([2.0, 0.0, -1.0, 0.5])
    violations = []
    for _ in range(150):
        router(torch.sigmoid(torch.randn(256, 4) + skew))
        violations.append(router.max_violation())
        router.step()
    assert violations[0] > 0.8
    assert sum(violations[-10:]) / 10 < 0.35


def test_router_refuses_bad_settings():
    for bad in ({"k": 5}, {"k": 0}, {"num_experts": 0}, {"update_rate": -1.0}, {"update_rate": math.inf}):
        with pytest.raises(LossplugError):
            balancer(**bad)
    with pytest.raises(LossplugError, match="experts"):
        balancer()(torch.rand(3, 5))
    with pytest.raises(LossplugError, match="dtype"):
        balancer()(torch.ones(3, 4).long())
    frozen = balancer(update_rate=0.0)
    frozen(torch.eye(4)[[0, 0]])
    frozen.step()
    assert (frozen.bias == 0).all()
