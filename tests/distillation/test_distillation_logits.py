"""Values, gradients and limits of the logit losses, in float64, against closed forms and short references."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lossplug.distillation import LogitLoss, OnlineLoss, create, names
from lightning_lossplug.distillation import divergences as div
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.fused import fused_linear_divergence
from lightning_lossplug.registry import registry

N, C = 6, 5
# name: parameter sets; shift: whether adding a constant to the logits of a row changes nothing
LOGITS = {
    "kd": [{}, {"temperature": 1.0}, {"divergence": "mse"}, {"t2_scale": False}],
    "dkd": [{}, {"alpha": 0.5, "beta": 2.0, "temperature": 2.0}],
    "dist": [{}, {"tau": 3.0, "gamma": 0.0}],
    "logit_std": [{}, {"loss": "dkd"}],
    "mlkd": [{}, {"temperatures": [1.0, 3.0], "conf_percentile": 100}],
    "ttm": [{}, {"gamma": 1.0}],
    "wttm": [{}, {"gamma": 1.0}],
    "abkd": [{}, {"alpha": 1.0, "beta": 0.0}, {"alpha": 0.2, "beta": 0.7}, {"alpha": 0.0, "beta": 1.0}],
    "akl": [{}, {"mu": 0.9}],
    "jeffreys": [{}],
    "tvd": [{}],
    "dhkd": [{}, {"form": "plain"}],
    "gkd": [{}, {"beta": 0.0}, {"beta": 1.0}, {"beta": 0.1, "temperature": 2.0, "t2_scale": True}],
    "distillm": [{}, {"direction": "reverse"}],
    "minillm": [{}],
    "uld": [{}],
    "mekd": [{}],
    "dac_kl": [{}, {"lower": 0.1, "upper": 0.7, "temperature": 2.0, "t2_scale": True}, {"upper": 1.0}],
}
NOT_SHIFT_INVARIANT = {("kd", "mse"), ("dhkd", None)}
OTHERS = {
    "bdkd",
    "dml",
    "kdcl",
    "switokd",
    "one",
    "fitnet",
    "at",
    "rkd",
    "hidden_cosine",
    "topk_logits",
    "dino",
    "reviewkd",
    "ofd",
    "crd",
    "faqd",
    "group_at",
    "spectral_kd",
    "mcmi_teacher",
    "self_distill",
    "wad",
    "arm_selfdistill",
    "distill_vq",
    "makd",
    "mft",
    "span",
    "minillm_policy",
    "entropic_student",
    "ca_dino",
    "learned_layers",
}
CASES = [(name, p) for name, sets in LOGITS.items() for p in sets]
EACH = pytest.mark.parametrize(("name", "parameters"), CASES, ids=str)
ROWS = [(n, p) for n, p in CASES if n not in ("dist", "mlkd", "uld")]


def logits(seed=0, scale=2.0, n=N, c=C):
    g = torch.Generator().manual_seed(seed)
    z_s, z_t = (scale * torch.randn(n, c, generator=g, dtype=torch.float64) for _ in range(2))
    return z_s.requires_grad_(), z_t, torch.randint(c, (n,), generator=g)


def value(name, loss, z_s, z_t, y):
    if name == "uld":
        return loss(z_s[None], z_t[None])
    return loss(z_s, z_t, y)


def test_every_loss_of_the_family_is_tested():
    assert set(names()) == {*LOGITS, *OTHERS}


@pytest.mark.parametrize("name", [*LOGITS, *OTHERS])
def test_registry_facts(name):
    entry = registry.get("loss", name)
    assert entry.family == "distillation"
    assert entry.paper
    assert entry.signature
    assert "Use it" in entry.load().__doc__
    described = entry.load().__doc__
    assert all(f"{p.name}: " in described or f"{p.name}_: " in described for p in entry.parameters())


@EACH
def test_equal_logits_give_zero_with_zero_gradient(name, parameters):
    z_s, _, y = logits()
    loss = create(name, **parameters)
    found = value(name, loss, z_s, z_s.detach().clone(), y)
    if (name, parameters.get("gamma", 1.0)) in (("ttm", 1.0), ("wttm", 1.0)) and not parameters:
        assert found > 0  # the teacher is softened and the student isn't
        return
    assert abs(found.item()) < (1e-5 if name == "dist" else 1e-12)  # dist: its eps
    (grad,) = torch.autograd.grad(found, z_s)
    assert grad.abs().max() < (1e-5 if name == "dist" else 1e-12) or name in ("uld", "tvd")


@EACH
def test_invariances_and_finite_differences(name, parameters):
    z_s, z_t, y = logits()
    loss = create(name, **parameters)
    base = value(name, loss, z_s, z_t, y)
    assert base.shape == ()
    assert base > 0
    perm = torch.randperm(C, generator=torch.Generator().manual_seed(1))
    permuted = value(name, loss, z_s[:, perm], z_t[:, perm], perm.argsort()[y])
    torch.testing.assert_close(permuted, base)
    if (name, parameters.get("divergence")) not in NOT_SHIFT_INVARIANT:
        torch.testing.assert_close(value(name, loss, z_s + torch.arange(N)[:, None], z_t - 3.0, y), base)
    if name != "akl":  # its weights are functions of the logits without a gradient
        assert torch.autograd.gradcheck(lambda z: value(name, loss, z, z_t, y), (z_s,))


@EACH
def test_no_gradient_reaches_the_teacher(name, parameters):
    z_s, z_t, y = logits()
    z_t.requires_grad_()
    value(name, create(name, **parameters), z_s, z_t, y).backward()
    assert z_t.grad is None


@pytest.mark.parametrize(("name", "parameters"), ROWS, ids=str)
def test_masks_reductions_and_precision(name, parameters):
    z_s, z_t, y = logits()
    loss = create(name, **parameters)
    rows = loss(z_s, z_t, y, reduction="none")
    assert rows.shape == (N,)
    torch.testing.assert_close(loss(z_s, z_t, y), rows.mean())
    torch.testing.assert_close(loss(z_s, z_t, y, reduction="global_tokens", denominator=11.0), rows.sum() / 11)
    mask = torch.tensor([True, False, True, True, False, True])
    bad = z_s.detach().clone()
    bad[~mask] = float("nan")  # what is masked doesn't matter, whatever it is
    bad.requires_grad_()
    found = loss(bad, z_t, y, mask=mask)
    torch.testing.assert_close(found, rows[mask].mean())
    found.backward()
    assert bad.grad[mask].isfinite().all()
    assert (bad.grad[~mask] == 0).all()
    torch.testing.assert_close(loss(z_s, z_t, torch.where(mask, y, -100)), rows[mask].mean())
    weight = torch.linspace(0, 2, N)
    torch.testing.assert_close(loss(z_s, z_t, y, sample_weight=weight), (rows * weight).mean())
    empty = loss(z_s, z_t, torch.full((N,), -100))
    assert empty == 0
    (grad,) = torch.autograd.grad(empty, z_s)
    assert (grad == 0).all()
    # tokens [B, L, V] and pixels [N, C, H, W] are the same rows
    tokens = loss(z_s.view(2, 3, C), z_t.view(2, 3, C), y.view(2, 3))
    torch.testing.assert_close(tokens, rows.mean())
    s, t = (z.view(2, 3, 1, C).movedim(-1, 1) for z in (z_s, z_t))
    torch.testing.assert_close(loss(s, t, y.view(2, 3, 1), reduction="pixelmean"), rows.mean())
    half = loss(z_s.bfloat16(), z_t.bfloat16(), y)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(z_s.bfloat16().float(), z_t.bfloat16().float(), y))
    with torch.autocast("cpu", torch.bfloat16):
        wide = loss((1e4 * z_s).bfloat16(), (1e4 * z_t).bfloat16(), y)
    assert wide.isfinite()


@pytest.mark.parametrize("t", [1.0, 3.0])
def test_closed_form_gradients(t):
    z_s, z_t, _ = logits()
    q, p = (z_s / t).softmax(1), (z_t / t).softmax(1)
    (grad,) = torch.autograd.grad(create("kd", temperature=t)(z_s, z_t), z_s, retain_graph=True)
    torch.testing.assert_close(grad, t / N * (q - p))
    reverse = div.reverse_kl(z_s, z_t, t)
    (grad,) = torch.autograd.grad(t**2 * reverse.mean(), z_s, retain_graph=True)
    torch.testing.assert_close(grad, t / N * q * ((q / p).log() - reverse[:, None]))
    (grad,) = torch.autograd.grad(create("wttm", gamma=0.3)(z_s, z_t), z_s)
    u = (z_t.softmax(1) ** 0.3).sum(1, keepdim=True)
    torch.testing.assert_close(grad, u / N * (z_s.softmax(1) - (0.3 * z_t).softmax(1)))
    assert (u >= 1).all()
    assert (u <= C**0.7).all()


def test_kd_limits():
    z_s, z_t, _ = logits()
    far = create("kd", temperature=1e4)(z_s, z_t)
    centred = [z - z.mean(1, keepdim=True) for z in (z_s, z_t)]
    torch.testing.assert_close(far, (centred[0] - centred[1]).square().sum() / (2 * N * C), rtol=1e-3, atol=0)
    torch.testing.assert_close(create("kd", divergence="hard")(z_s, z_t), F.cross_entropy(z_s, z_t.argmax(1)))
    one_hot = 1e4 * F.one_hot(z_t.argmax(1), C).double()
    torch.testing.assert_close(create("kd", temperature=1.0)(z_s, one_hot), F.cross_entropy(z_s, z_t.argmax(1)))


def test_dkd_is_the_decoupled_kl():
    z_s, z_t, y = logits()
    tckd, nckd = create("dkd", temperature=1.0).parts(z_s, z_t, y)
    p_y = z_t.softmax(1).gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(tckd + (1 - p_y) * nckd, div.forward_kl(z_s, z_t))
    _, none = create("dkd").parts(z_s[:, :2], z_t[:, :2], y % 2)
    assert none.abs().max() < 1e-12
    confident = 60.0 * F.one_hot(y, C).double() + z_t  # 1 - p_y underflows in a naive form
    assert create("dkd", temperature=1.0)(z_s, confident, y).isfinite()


def test_dist_bounds_and_batch_of_one():
    z_s, z_t, _ = logits()
    assert 0 < create("dist")(z_s, z_t) <= 4
    one = create("dist")(z_s[:1], z_t[:1])
    torch.testing.assert_close(one, create("dist", gamma=0.0)(z_s[:1], z_t[:1]))
    q, p = z_s.softmax(1), z_t.softmax(1)
    want = 2 - torch.stack([torch.corrcoef(torch.stack(r))[0, 1] for r in zip(q, p, strict=True)]).mean()
    want = want - torch.stack([torch.corrcoef(torch.stack(r))[0, 1] for r in zip(q.T, p.T, strict=True)]).mean()
    torch.testing.assert_close(create("dist")(z_s, z_t), want, rtol=1e-6, atol=0)


def test_standardised_logits_ignore_scale_and_shift():
    z_s, z_t, _ = logits()
    loss = create("logit_std", eps=0.0)
    base = loss(z_s, z_t)
    torch.testing.assert_close(loss(3 * z_s + 1, 0.1 * z_t - 7), base)
    (grad,) = torch.autograd.grad(base, z_s)
    assert grad.sum(1).abs().max() < 1e-12
    assert (grad * z_s).sum(1).abs().max() < 1e-12
    loss.temperature = 5.0
    assert loss.host.temperature == 5.0


def test_alpha_beta_limits():
    z_s, z_t, _ = logits()
    p, q = z_t.softmax(1), z_s.softmax(1)

    def ab(a, b):
        return create("abkd", alpha=a, beta=b)(z_s, z_t)

    torch.testing.assert_close(ab(1.0, 0.0), div.forward_kl(z_s, z_t).mean())
    torch.testing.assert_close(ab(0.0, 1.0), div.reverse_kl(z_s, z_t).mean())
    torch.testing.assert_close(ab(0.5, 0.5), 2 * (p.sqrt() - q.sqrt()).square().sum(1).mean())
    torch.testing.assert_close(ab(0.7, 1e-6), ab(0.7, 0.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(ab(1e-6, 0.7), ab(0.0, 0.7), rtol=1e-4, atol=0)


def test_jensen_shannon_limits_and_bound():
    z_s, z_t, _ = logits()
    rows = div.jsd(z_s, z_t, 1e-7) / 1e-7
    torch.testing.assert_close(rows, div.forward_kl(z_s, z_t), rtol=1e-4, atol=0)
    rows = div.jsd(z_s, z_t, 1 - 1e-7) / 1e-7
    torch.testing.assert_close(rows, div.reverse_kl(z_s, z_t), rtol=1e-4, atol=0)
    for beta in (0.1, 0.5, 0.8):
        bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert (div.jsd(50 * z_s, 50 * z_t, beta) <= bound + 1e-12).all()
    assert create("distillm", alpha=1.0)(z_s, z_t).abs() < 1e-12
    for direction, plain in (("forward", div.forward_kl), ("reverse", div.reverse_kl)):
        torch.testing.assert_close(create("distillm", alpha=0.0, direction=direction)(z_s, z_t), plain(z_s, z_t).mean())


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd"])
def test_the_fused_divergence_is_the_same(kind):
    torch.manual_seed(0)
    h_s, w_s = torch.randn(4, 3, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)
    h_t, w_t = torch.randn(4, 7, dtype=torch.float64), torch.randn(11, 7, dtype=torch.float64)
    loss = {"kl": create("kd", temperature=2.0), "reverse_kl": create("minillm", temperature=2.0, t2_scale=True)}
    loss["jsd"] = create("gkd", beta=0.3, temperature=2.0, t2_scale=True)
    fused = fused_linear_divergence(h_s, w_s, h_t, w_t, kind=kind, beta=0.3, temperature=2.0)
    torch.testing.assert_close(fused, loss[kind](h_s @ w_s.T, h_t @ w_t.T))


@pytest.mark.parametrize("name", ["kd", "gkd", "distillm", "minillm", "jeffreys", "abkd", "akl", "ttm", "wttm"])
def test_masked_classes_contribute_nothing(name):
    z_s, z_t, y = logits()
    s, t = (torch.cat([z, torch.full((N, 2), -math.inf, dtype=z.dtype)], dim=1) for z in (z_s, z_t))
    found = create(name)(s, t, y)
    torch.testing.assert_close(found, create(name)(z_s, z_t, y))
    (grad,) = torch.autograd.grad(found, z_s)
    assert grad.isfinite().all()


def test_dual_head_losses():
    z_s, z_t, _ = logits()
    t = 2.0
    norm, plain = create("dhkd", temperature=t), create("dhkd", temperature=t, form="plain")
    torch.testing.assert_close(norm(z_s, z_t), norm(2 * z_t - z_s, z_t))  # even
    (grad,) = torch.autograd.grad(norm(z_s, z_t), z_s)
    torch.testing.assert_close(grad, t / N * (((z_s - z_t) / t).sigmoid() - 0.5))
    (grad,) = torch.autograd.grad(plain(z_s, z_t), z_s)
    torch.testing.assert_close(grad, t / N * ((z_s / t).sigmoid() - (z_t / t).sigmoid()))
    near = z_t + 1e-4 * z_s.detach()
    torch.testing.assert_close(norm(near, z_t), (near - z_t).square().sum() / (8 * N), rtol=1e-4, atol=0)
    s, p = (z_s / t).sigmoid(), (z_t / t).sigmoid()
    want = t**2 / N * (p * (p / s).log() + (1 - p) * ((1 - p) / (1 - s)).log()).sum()
    torch.testing.assert_close(plain(z_s, z_t), want)


def test_universal_logits_across_vocabularies():
    torch.manual_seed(0)
    z_s, z_t = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 6, 9, dtype=torch.float64)
    loss = create("uld")
    base = loss(z_s, z_t)
    assert 0 < base <= 2
    torch.testing.assert_close(loss(z_s[..., [3, 1, 0, 2, 4]], z_t), base)
    same = loss(z_s, torch.cat([z_s, torch.full((2, 4, 3), -math.inf, dtype=z_s.dtype)], dim=2))
    assert same < 1e-12
    q, p = (z[0, :2].softmax(1).sort(1, descending=True).values for z in (z_s, z_t))
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, :2] = True
    want = (F.pad(q, (0, 4)) - p).abs().sum(1).mean()
    torch.testing.assert_close(loss(z_s, z_t, mask=mask), want)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), st.floats(0.1, 20.0), st.integers(0, 1000))
def test_divergences_are_not_negative(n, c, t, seed):
    z_s, z_t, _ = logits(seed, 5.0, n, c)
    for rows in (
        div.forward_kl(z_s, z_t, t),
        div.reverse_kl(z_s, z_t, t),
        div.jsd(z_s, z_t, 0.3, t),
        div.skew_kl(z_s, z_t, 0.1, t),
        create("abkd", alpha=0.3, beta=0.4, temperature=t).rows(z_s, z_t, None),
    ):
        assert (rows > -1e-12).all()


@pytest.mark.parametrize("name", ["kd", "dkd", "jeffreys", "gkd", "distillm", "minillm", "abkd", "dhkd", "bdkd", "dml"])
@pytest.mark.parametrize("t", [0, -1.0, float("nan"), float("inf")])
def test_bad_temperatures_are_one_line(name, t):
    with pytest.raises(LossplugError, match=r"temperature is .*allowed is \(0, inf\)") as error:
        create(name, temperature=t)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, t, y: create("kd", reduction="mean"), "'mean' would also divide by the classes"),
        (lambda z, t, y: create("kd")(z, t[:, :3]), "the student has 5 classes, the teacher has 3"),
        (lambda z, t, y: create("kd")(z.view(2, 3, 5), t.view(2, 3, 5)[..., :2]), "vocab_size"),
        (lambda z, t, y: create("kd")(z, t[:4]), r"\(6, 5\), the teacher's \(4, 5\)"),
        (lambda z, t, y: create("dkd")(z, t), "needs class indices of shape .*got nothing"),
        (lambda z, t, y: create("dkd")(z, t, z.softmax(1)), "mixup"),
        (lambda z, t, y: create("dkd")(z, t, y + 3), "outside the 5 classes"),
        (lambda z, t, y: create("dkd", beta=-1.0), r"beta is -1.0, allowed is \[0, inf\)"),
        (lambda z, t, y: create("bdkd", delta=0.5), r"delta is 0.5, allowed is \[1"),
        (lambda z, t, y: create("ttm", gamma=0.0), r"allowed is \(0, 1\]"),
        (lambda z, t, y: create("kd")(z.long(), t), "floating"),
        (lambda z, t, y: create("kd")(z, t, mask=y[:3] > 0), "mask"),
        (lambda z, t, y: create("kd", reduction="global_tokens")(z, t), "denominator"),
        (lambda z, t, y: create("dist")(z, t, reduction="none"), "compares rows"),
        (lambda z, t, y: create("kdd"), "Did you mean 'kd'"),
        (lambda z, t, y: create("focal"), "no distillation loss"),
        (lambda z, t, y: create("kd", temprature=1.0), "Did you mean 'temperature'"),
        (lambda z, t, y: create("logit_std", loss="at"), "no parameter"),
        (lambda z, t, y: create("logit_std", loss="mlkd"), "no parameter"),
        (lambda z, t, y: create("logit_std", loss="bdkd"), "no value per row"),
        (lambda z, t, y: create("uld")(z, t), "expected"),
    ],
)
def test_bad_input_is_one_line(call, message):
    z, t, y = logits()
    with pytest.raises(LossplugError, match=message) as error:
        call(z, t, y)
    assert "\n" not in str(error.value)


def test_losses_are_modules_of_their_kind():
    assert isinstance(create("kd"), LogitLoss)
    assert isinstance(create("bdkd"), OnlineLoss)
    assert isinstance(create("fitnet"), nn.Module)
