"""Teachers trained for students, closed-form self-distillation, pseudo-labels, margins, quantised search, answers."""

import math

import pytest
import torch
import torch.nn.functional as F
from distillation_runs import CLASSES, Plain, data, network, samples, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import Distillation, SwapLoss
from lightning_lossplug.distillation import (
    MCMITeacher,
    ProductQuantizer,
    aspects_of,
    class_centroids,
    class_means,
    conditional_mutual_information,
    create,
    ground_truth_weight,
    kernel_generations,
    kernel_limit,
    labelled_fraction,
    narrow_classifier,
    pseudo_labels,
    widen_classifier,
)
from lightning_lossplug.distillation.distill_vq import scores
from lightning_lossplug.distillation.mft import corrected

pytestmark = pytest.mark.filterwarnings("ignore")
D = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def test_mutual_information_is_the_gap_of_entropies():
    z, y = rand(12, 4), torch.arange(12) % 3
    p = z.softmax(1)
    centroids = torch.stack([p[y == c].mean(0) for c in range(3)] + [torch.full((4,), 0.25, dtype=D)])
    entropy = lambda q: -torch.special.xlogy(q, q).sum(-1)  # noqa: E731
    want = entropy(centroids[:3]).mean() - entropy(p).mean()  # the classes are equally frequent
    torch.testing.assert_close(conditional_mutual_information(z, y, centroids), want)
    constant = rand(4, 4)[y]
    assert conditional_mutual_information(constant, y, constant[:4].softmax(1)[[0, 1, 2, 0]]).abs() < 1e-12
    plain = MCMITeacher(centroids, lambda_=0.0)
    assert torch.equal(plain(z, y), F.cross_entropy(z, y))
    x = z.clone().requires_grad_()
    loss = MCMITeacher(centroids, lambda_=0.2).double()
    assert torch.autograd.gradcheck(lambda a: loss(a, y), (x,))
    torch.testing.assert_close(loss(z, y), F.cross_entropy(z, y) - 0.2 * want)
    with pytest.raises(LossplugError, match="no distribution"):
        MCMITeacher(2 * centroids)


def test_centroids_of_a_network_and_a_teacher_trained_with_them():
    net = network().eval()
    x, y = samples().tensors[0], torch.arange(64) % CLASSES
    labelled = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    with torch.no_grad():
        p = net(x).softmax(1)
    want = torch.stack([p[y == c].mean(0) for c in range(CLASSES)])
    found = class_centroids(net, labelled, CLASSES)
    torch.testing.assert_close(found, want)
    loss = MCMITeacher(found, momentum=0.9)
    module = Plain()
    trainer(SwapLoss(loss)).fit(module, data())
    torch.testing.assert_close(loss.centroids.sum(1), torch.ones(CLASSES))
    assert not torch.equal(loss.centroids, found)
    with pytest.raises(LossplugError, match=r"class \d has no sample"):
        class_centroids(network(classes=5), data(), 5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 1.0), st.floats(0.05, 2.0))
def test_generations_of_kernel_ridge(seed, alpha, ridge):
    f = rand(8, 5, seed=seed)
    kernel, y = f @ f.T + 0.1 * torch.eye(8, dtype=D), rand(8, seed=seed + 1)
    found = kernel_generations(kernel, y, alpha, ridge, 400)
    torch.testing.assert_close(found[-1], kernel_limit(kernel, y, alpha, ridge), rtol=1e-3, atol=1e-3)
    once = kernel_generations(kernel, y, 1.0, ridge, 3)
    assert torch.equal(once[0], once[1])
    torch.testing.assert_close(found[0], kernel @ torch.linalg.solve(kernel + ridge * torch.eye(8, dtype=D), y))
    assert torch.equal(kernel_limit(kernel, y, 0.0, ridge), torch.zeros(8, dtype=D))


def test_a_noisy_sine_over_generations():
    x = torch.linspace(0, 1, 50, dtype=D)
    kernel = (-80 * (x[:, None] - x) ** 2).exp()
    y = torch.sin(2 * math.pi * x) + 0.5 * rand(50)
    errors = [(f - torch.sin(2 * math.pi * x)).square().mean() for f in kernel_generations(kernel, y, 0.0, 0.2, 40)]
    assert errors[1] < errors[0]  # a generation helps,
    assert errors[-1] > min(errors)  # too many without labels collapse


def test_the_weight_of_the_labels_is_the_best_blend():
    a, b, y = rand(30), rand(30, seed=1), rand(30, seed=2) + rand(30)
    found = ground_truth_weight(a, b, y)
    error = lambda w: (w * a + (1 - w) * b - y).square().mean()  # noqa: E731
    grid = torch.linspace(0, 1, 2001, dtype=D)
    best = grid[torch.stack([error(w) for w in grid]).argmin()]
    assert abs(found - best) < 1e-3
    assert ground_truth_weight(a, a, y) == 1
    assert ground_truth_weight(a, b, b - (a - b)) == 0
    with pytest.raises(LossplugError, match="shapes differ"):
        ground_truth_weight(a, b[:3], y)


def test_one_generation_of_a_network():
    z_s, z_t, y = rand(6, 4).requires_grad_(), rand(6, 4, seed=1), torch.arange(6) % 4
    loss = create("self_distill", alpha=0.3)
    q, p = z_s.softmax(1), z_t.softmax(1)
    want = 0.3 * F.mse_loss(q, F.one_hot(y, 4).double()) + 0.7 * F.mse_loss(q, p)
    torch.testing.assert_close(loss(z_s, z_t, y), want)
    one = create("self_distill", alpha=1.0)
    torch.testing.assert_close(one(z_s, z_t, y), one(z_s, rand(6, 4, seed=9), y))
    trainer(Distillation(network(seed=5), "self_distill", ce_weight=0.0)).fit(Plain(), data())


def test_pseudo_labels():
    features, y = rand(9, 5), torch.arange(9) % 3
    means = class_means(features, y, 3)
    torch.testing.assert_close(means.norm(dim=1), torch.ones(3, dtype=D))
    new = rand(4, 5, seed=1)
    found = pseudo_labels(new, means)
    cosines = torch.cosine_similarity(new[:, None], means[None], dim=2)
    top = cosines.sort(dim=1, descending=True)
    assert torch.equal(found.target, top.indices[:, 0])
    torch.testing.assert_close(found.weight, top.values[:, 0] - top.values[:, 1])
    loss = create("wad")
    z, z_u = rand(3, 3), rand(4, 3, seed=2)
    weight = torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=D)
    want = F.cross_entropy(z, y[:3]) + (weight * F.cross_entropy(z_u, found.target, reduction="none")).mean()
    torch.testing.assert_close(loss(z, y[:3], z_u, found.target, weight), want)
    changed = z_u.clone()
    changed[[1, 3]] += 7 * rand(2, 3, seed=3)
    torch.testing.assert_close(loss(z, y[:3], changed, found.target, weight), want)
    assert [labelled_fraction(i) for i in (0, 5)] == [0.1, 0.0]
    with pytest.raises(LossplugError, match="class 3 has no labelled sample"):
        class_means(features, y, 4)


def test_adaptive_margins():
    q, p, n = (F.normalize(rand(4, 6, seed=i), dim=1) for i in range(3))
    tau = (p * n).sum(1) / 2 + 0.5
    margin = (q * p).sum(1) - (q * n).sum(1)
    torch.testing.assert_close(create("arm_selfdistill")(3 * q, p, 2 * n), (margin - tau).square().mean())
    torch.testing.assert_close(create("arm_selfdistill", error="softplus")(q, p, n), F.softplus(tau - margin).mean())
    batch = create("arm_selfdistill", in_batch=True)
    want = [
        ((q[j] @ p[j] - q[i] @ n[j]) - ((p[i] @ n[j]) / 2 + 0.5)) ** 2 for i in range(4) for j in range(4)
    ]  # by column, as released
    torch.testing.assert_close(batch(q, p, n), torch.stack(want).mean())
    torch.testing.assert_close(batch(q[:1], p[:1], n[:1]), create("arm_selfdistill")(q[:1], p[:1], n[:1]))
    distributed = create("arm_selfdistill", target="distributed")
    targets = p @ n.T / 2 + 0.5
    torch.testing.assert_close(distributed(q, p, n), (margin[None] - targets).square().mean())
    across = torch.eye(6, dtype=D)[:4]
    other = torch.eye(6, dtype=D)[[1, 2, 3, 4]]
    torch.testing.assert_close(
        create("arm_selfdistill", target=0.5)(q, across, other), create("arm_selfdistill")(q, across, other)
    )
    x = p.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: batch(q, a, n), (x,))
    free, fixed = (
        torch.autograd.grad(create("arm_selfdistill", detach_target=d)(q, x, n), x)[0] for d in (False, True)
    )
    assert not torch.allclose(free, fixed)
    with pytest.raises(LossplugError, match="don't go together"):
        create("arm_selfdistill", target="distributed", in_batch=True)


def test_lists_of_scores_and_product_quantisation():
    z, t = rand(3, 7).requires_grad_(), rand(3, 7, seed=1)
    loss = create("distill_vq")
    (grad,) = torch.autograd.grad(loss(z, t), z)
    torch.testing.assert_close(grad, (z.softmax(1) - t.softmax(1)) / 3)
    q, d = rand(2, 6), rand(5, 6, seed=1)
    torch.testing.assert_close(scores(q, d, "l2"), -torch.cdist(q, d).square())
    torch.manual_seed(0)
    quantizer = ProductQuantizer(6, parts=3, codes=4).double()
    x = rand(5, 6).requires_grad_()
    codes = quantizer.codes(x)
    words = torch.stack([quantizer.codebook[part, codes[:, part]] for part in range(3)], 1).flatten(1)
    torch.testing.assert_close(quantizer(x), words)
    loss(scores(q, quantizer(x)), scores(q, x.detach())).backward()
    assert all(p.grad.abs().sum() > 0 for p in (x, quantizer.codebook, quantizer.rotation))
    with pytest.raises(LossplugError, match="no multiple"):
        ProductQuantizer(7, parts=3)


def test_aspects():
    z, y, a = rand(5, 7).requires_grad_(), torch.arange(5) % 4, rand(5, 3, seed=1).sigmoid()
    want = F.cross_entropy(z[:, :4], y) + 2 * F.binary_cross_entropy_with_logits(z[:, 4:], a)
    torch.testing.assert_close(create("makd", classes=4, alpha=2.0)(z, y, a), want)
    (grad,) = torch.autograd.grad(create("makd", classes=4, alpha=0.0)(z, y, a), z)
    (plain,) = torch.autograd.grad(F.cross_entropy(z[:, :4], y), z)
    assert torch.equal(grad, plain)
    torch.testing.assert_close(aspects_of(z, -z), torch.stack([z, -z], 2).softmax(2)[..., 0])
    layer = nn.Linear(6, 4)
    x = torch.randn(3, 6)
    wide = widen_classifier(layer, 3)
    torch.testing.assert_close(wide(x)[:, :4], layer(x))
    torch.testing.assert_close(narrow_classifier(wide, 4)(x), layer(x))
    with pytest.raises(LossplugError, match="outside"):
        create("makd", classes=4)(z, y, 2 * a + 1)


def test_emulated_mappings():
    generator = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh()).double().requires_grad_(False)
    z_s, z_t = rand(3, 4).requires_grad_(), rand(3, 4, seed=1).requires_grad_()
    loss = create("mekd", generator=generator)
    kl = (z_t / 5).softmax(1) * ((z_t / 5).log_softmax(1) - (z_s / 5).log_softmax(1))
    generator.eval()
    images = (generator(z_s / 5) - generator(z_t / 5)).abs().mean()
    torch.testing.assert_close(loss(z_s, z_t), images + 5 * kl.sum(1).mean())
    generator.train()
    loss(z_s, z_t).backward()
    assert z_s.grad.abs().sum() > 0
    assert z_t.grad is None
    assert not list(loss.parameters())
    assert loss(z_t.detach(), z_t.detach()) == 0
    hard = F.one_hot(torch.arange(3), 4).double()
    near = create("mekd", w_f=0.0, temperature=1.0)(z_s, 200 * hard)
    torch.testing.assert_close(near, F.cross_entropy(z_s, torch.arange(3)))
    with pytest.raises(LossplugError, match="not frozen"):
        create("mekd", generator=nn.Linear(4, 2).double())(z_s, z_t)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_corrected_teachers(seed, threshold):
    p, y = (3 * rand(6, 5, seed=seed)).softmax(1), torch.arange(6) % 5
    found = corrected(p, y, threshold)
    torch.testing.assert_close(found.sum(1), torch.ones(6, dtype=D))
    others = found.scatter(1, y[:, None], 0.0).max(1).values
    lead = found.gather(1, y[:, None]).squeeze(1) - others
    wrong = p.argmax(1) != y
    torch.testing.assert_close(lead[wrong], torch.full_like(lead[wrong], threshold), atol=1e-6, rtol=0)
    right = ~wrong
    raised = (p.gather(1, y[:, None]).squeeze(1) + threshold).clamp(max=1)
    torch.testing.assert_close(found.gather(1, y[:, None]).squeeze(1)[right], raised[right])
    if threshold == 0:
        torch.testing.assert_close(found[right], p[right])


def test_minifinetuning_has_its_gradient():
    z, t, y = rand(6, 5).requires_grad_(), rand(6, 5, seed=1), torch.arange(6) % 5
    loss = create("mft", temperature=2.0)
    (grad,) = torch.autograd.grad(loss(z, t, y), z)
    want = 2 * ((z / 2).softmax(1) - corrected((t / 2).softmax(1), y)) / 6
    torch.testing.assert_close(grad, want)
