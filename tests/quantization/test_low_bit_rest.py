"""BiViT, DenseShift, kernel codebooks, AdaPT's pieces and the format adviser: closed forms and identities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug import LossplugError
from lightning_lossplug.quantization import (
    adapt,
    advise_fp_format,
    binary_kernels,
    bivit,
    bivit_attention,
    create,
    critical_tokens,
    denseshift,
    fp_training_loss,
    gradient_diversity,
    push_down,
    push_up,
    sinkhorn,
    sparse_kernel_bnn,
)

DOUBLE = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def sign(x):
    return torch.where(x >= 0, 1.0, -1.0).to(x)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99))
def test_bivit_attention(seed):
    scores = (random(2, 4, 6, seed=seed) * 2).requires_grad_()
    p = scores.softmax(-1)
    b = bivit_attention(scores)
    assert torch.equal(b, (p >= 0.25 * p.amax(-1, keepdim=True)).to(DOUBLE))
    assert (b.sum(-1) >= 1).all()
    assert torch.equal(bivit_attention(scores + 3.0), b)
    assert (bivit_attention(scores, 1e-30) == 1).all()
    assert (bivit_attention(scores, 1.0).sum(-1) == 1).all()
    g = random(2, 4, 6, seed=seed + 1)
    (got,) = torch.autograd.grad(b, scores, g)
    assert torch.equal(got, g * (scores.abs() < 1))


def test_bivit_weights_and_their_gradients():
    w, alpha = random(3, 5).requires_grad_(), torch.tensor([[0.5], [1.0], [2.0]], dtype=DOUBLE, requires_grad=True)
    y = bivit(w, alpha)
    centred = w.detach() - w.detach().mean(1, keepdim=True)
    torch.testing.assert_close(y.detach(), alpha.detach() * sign(centred))
    g = random(3, 5, seed=1)
    dw, da = torch.autograd.grad(y, (w, alpha), g)
    through = g * alpha.detach() * (centred.abs() < 1)
    torch.testing.assert_close(dw, through - through.mean(1, keepdim=True))
    torch.testing.assert_close(da, (g * sign(centred)).sum(1, keepdim=True))
    with pytest.raises(LossplugError, match="attn_ratio is 0"):
        bivit_attention(w, 0.0)
    quantizer = create("bivit")(torch.ones(2, 3))
    assert quantizer.shape == (2, 3)


def surrogate(u, t):
    """sgn(u) sqrt(S + 1) with straight-through steps, by autograd."""

    def straight(hard, soft):
        return soft + (hard - soft).detach()

    s = torch.zeros_like(u)
    for switch in t:
        s = (s + 1) * straight((switch > 0).to(u), switch)
    return straight(sign(u), u) * (s + 1).sqrt()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), bits=st.integers(2, 4))
def test_denseshift_equals_its_surrogate(seed, bits):
    switches = 2 ** (bits - 1) - 1
    u, t = random(4, 6, seed=seed).requires_grad_(), random(switches, 4, 6, seed=seed + 1).requires_grad_()
    w = denseshift(u, t)
    power = w.abs().log2()
    assert torch.equal(power, power.round())
    assert power.min() >= 0
    assert power.max() <= switches
    assert torch.equal(denseshift(-u, t), -w)
    g = random(4, 6, seed=seed + 2)
    for got, want in zip(
        torch.autograd.grad(w, (u, t), g), torch.autograd.grad(surrogate(u, t), (u, t), g), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_denseshift_ends_and_start():
    u = torch.tensor([0.0, -0.1], dtype=DOUBLE)
    assert denseshift(u, torch.zeros(3, 2, dtype=DOUBLE)).tolist() == [1.0, -1.0]
    assert denseshift(u, torch.ones(3, 2, dtype=DOUBLE)).tolist() == [8.0, -8.0]
    switches = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).T
    assert denseshift(torch.ones(8), switches).unique().tolist() == [1.0, 2.0, 4.0, 8.0]
    w = random(6, 40).float()
    quantizer = create("denseshift", bits=4)
    y = quantizer(w)
    big = w.abs() > quantizer.alpha  # the reach of seven powers
    assert ((y / w)[big].log2().abs() <= 0.5 + 1e-4).all()
    assert (y.sign() == sign(w)).all()
    assert quantizer.t.abs().max() < 0.01
    again = create("denseshift", bits=4)
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(w), y)
    with pytest.raises(LossplugError, match="bits is 5, allowed is 2 to 4"):
        create("denseshift", bits=5)
    with pytest.raises(LossplugError, match="its switches are of a weight of shape"):
        quantizer(w[:3])


def test_kernel_codebook():
    kernels = binary_kernels(DOUBLE)
    assert kernels.unique(dim=1).shape == (9, 512)
    soft = sinkhorn(random(512, 512) * 0.05, iters=200)
    one = torch.ones(512, dtype=DOUBLE)
    torch.testing.assert_close(soft.sum(0), one)
    torch.testing.assert_close(soft.sum(1), one, rtol=0, atol=1e-3)
    w, x = random(4, 3, 3, 3).requires_grad_(), (random(512, 512, seed=1) * 0.01).requires_grad_()
    full = sparse_kernel_bnn(w, x, n_codewords=512)
    assert torch.equal(full, sign(w))
    few = sparse_kernel_bnn(w, x, n_codewords=8)
    used = few.reshape(-1, 9).unique(dim=0)
    assert 1 < len(used) <= 8
    assert set(few.unique().tolist()) == {-1.0, 1.0}
    g = random(4, 3, 3, 3, seed=2)
    dw, dx = torch.autograd.grad(few, (w, x), g)
    assert torch.equal(dw, g * (w.abs() <= 1))
    assert dx.isfinite().all()
    assert (dx != 0).any()


def test_kernel_codebook_refuses_other_kernels():
    x = torch.zeros(512, 512)
    with pytest.raises(LossplugError, match=r"kernels are \(5, 5\)"):
        sparse_kernel_bnn(torch.zeros(1, 1, 5, 5), x)
    with pytest.raises(LossplugError, match="n_codewords is 48"):
        sparse_kernel_bnn(torch.zeros(1, 1, 3, 3), x, 48)
    with pytest.raises(LossplugError, match="tau is 0"):
        sparse_kernel_bnn(torch.zeros(1, 1, 3, 3), x, tau=0)


def test_stochastic_rounding_is_right_on_average():
    x = torch.linspace(-1.9, 1.9, 11, dtype=DOUBLE, requires_grad=True)
    many = x.expand(20000, 11)
    y = adapt(many, 4, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(y.mean(0).clamp(-1.8, 1.6), x.detach().clamp(-1.8, 1.6), rtol=0, atol=0.01)
    codes = y / 0.25
    assert torch.equal(codes, codes.round())
    assert codes.min() >= -8
    assert codes.max() <= 7
    nearest = adapt(x, 8, 5, stochastic=False)
    assert ((nearest - x).abs() <= 2**-6 + 1e-12).all()
    (g,) = torch.autograd.grad(adapt(x, 4, 2, stochastic=False).sum(), x)
    assert torch.equal(g, ((x / 0.25 >= -8) & (x / 0.25 <= 7)).to(DOUBLE))
    torch.testing.assert_close(adapt(x, 40, 32, stochastic=False), x.detach(), rtol=0, atol=1e-9)
    with pytest.raises(LossplugError, match="word length 1"):
        adapt(x, 1, 0)


def test_word_lengths_follow_weights_and_gradients():
    same = random(5).expand(4, 5)
    assert gradient_diversity(same) == pytest.approx(1 / 4)
    assert gradient_diversity(torch.eye(4)) == pytest.approx(1.0)
    grid = torch.randint(-8, 8, (500,), generator=torch.Generator().manual_seed(0)).double() / 8
    assert push_down(grid) == 3
    assert push_down(random(5000)) > 3
    assert push_down(torch.zeros(10)) == 0
    assert push_up(4, 1.0) == 4
    low, mean, high = (push_up(4, 0.3, strategy) for strategy in ("min", "mean", "max"))
    assert 4 < low <= mean <= high <= 32
    with pytest.raises(LossplugError, match="strategy is 'most'"):
        push_up(4, 0.3, "most")


def test_format_adviser():
    assert [advise_fp_format(bits) for bits in (4, 5, 6, 8, 16)] == [(2, 1), (2, 2), (3, 2), (4, 3), (8, 7)]
    for (e, m), want in (((8, 7), 1.73e15), ((4, 3), 2.7e13), ((2, 1), 3.9e11)):
        assert critical_tokens(1e9, e, m, 128) == pytest.approx(want, rel=0.03)
    tokens = critical_tokens(1e9, 2, 1, 128)
    least = fp_training_loss(1e9, tokens, 2, 1, 128)
    assert all(fp_training_loss(1e9, tokens * f, 2, 1, 128) > least for f in (0.9, 1.1))
    assert fp_training_loss(1e9, 1e10, 2, 1, 1) == fp_training_loss(1e9, 1e10, 8, 7, 1)
    with pytest.raises(LossplugError, match="bits is 2"):
        advise_fp_format(2)
    assert math.isfinite(least)
