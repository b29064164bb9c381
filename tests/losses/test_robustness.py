"""Identities of the cards ``ibp`` and ``expressive``; soundness of the interval bounds; the attack."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import create
from lightning_lossplug.losses.certified import l1_norm, margin_cross_entropy
from lightning_lossplug.losses.interval import Box, input_box, interval_bounds, margin_bounds, margins, propagate
from lightning_lossplug.losses.pgd import pgd, sabr_box
from lightning_lossplug.schedules import Linear, Progress

D = torch.float64
EXPRESSIVE = ("cc_ibp", "mtl_ibp", "exp_ibp")


class Residual(nn.Module):
    """Convolutions, batch norm, a skip connection, pooling, functional calls and an in-place activation."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.inner, self.act, self.pool = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.mean, self.head = nn.AvgPool2d(3, 1), nn.Linear(8, 5)

    def forward(self, x):
        h = self.act(self.bn(self.conv(x)))
        h = F.relu(h + self.inner(h)) * -0.5 - 0.1 * torch.tanh(h)
        h = self.mean(self.pool(torch.cat([h, h], 1)))
        return self.head(torch.flatten(h, 1))


def networks():
    torch.manual_seed(0)
    mlp = nn.Sequential(
        nn.Flatten(), nn.Linear(36, 20), nn.LeakyReLU(0.1), nn.Linear(20, 9), nn.Softplus(), nn.Linear(9, 5)
    )
    cnn = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.ELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(12, 5),
        nn.Sigmoid(),
    )
    residual = Residual()
    for net in (mlp, cnn, residual):
        net.double()
    with torch.no_grad():
        residual.bn.running_mean.normal_()
        residual.bn.running_var.uniform_(0.5, 2)
        residual.bn.weight.copy_(torch.tensor([1.0, -1.0, 0.5, -2.0]))
    return {"mlp": mlp.eval(), "cnn": cnn.eval(), "residual": residual.eval()}


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.rand(6, 1, 6, 6, dtype=D), torch.randint(5, (6,))


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual"])
def test_sampled_points_never_violate_the_bounds(name, images):
    net, (x, y) = networks()[name], images
    for eps in (0.01, 0.1, 0.4):
        lower, upper = input_box(x, eps, 0.0, 1.0)
        box, (m, clean) = interval_bounds(net, lower, upper), margin_bounds(net, lower, upper, y, x)
        torch.testing.assert_close(clean, margins(net(x), y))
        for _ in range(40):
            corner = torch.rand_like(x).round() if _ % 2 else torch.rand_like(x)
            out = net(lower + corner * (upper - lower))
            assert (out >= box.lower - 1e-9).all()
            assert (out <= box.upper + 1e-9).all()
            assert (margins(out, y) >= m - 1e-9).all()


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual"])
def test_bounds_close_at_zero_and_widen_with_the_radius(name, images):
    net, (x, y) = networks()[name], images
    point = interval_bounds(net, x, x)
    for leg in point:
        torch.testing.assert_close(leg, net(x))
    before = margin_bounds(net, x, x, y)[0]
    torch.testing.assert_close(before, margins(net(x), y))
    for eps in (0.05, 0.1, 0.2, 0.5):
        now = margin_bounds(net, *input_box(x, eps), y)[0]
        assert (now <= before + 1e-12).all()
        before = now


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_merged_last_layer_is_never_looser(name, images):
    net, (x, y) = networks()[name], images
    lower, upper = input_box(x, 0.1)
    merged = margin_bounds(net, lower, upper, y)[0]
    apart = margin_bounds(nn.Sequential(net, nn.Identity()), lower, upper, y)[0]
    assert (merged >= apart - 1e-12).all()
    assert (merged > apart + 1e-6).any()


def test_a_network_of_one_layer():
    x = torch.rand(2, 3, 4, 4)
    for net in (nn.BatchNorm2d(3).eval(), nn.Conv2d(3, 2, 3), nn.ReLU()):
        torch.testing.assert_close(interval_bounds(net, x, x).upper, net(x))


def test_linear_bounds_are_exact():
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3).double(), torch.randn(2, 4, dtype=D), torch.tensor([0, 2])
    m, _ = margin_bounds(net, x - 0.3, x + 0.3, y)
    corners = torch.cartesian_prod(*[torch.tensor([-0.3, 0.3], dtype=D)] * 4)
    worst = torch.stack([margins(net(x + c), y) for c in corners]).amin(0)
    torch.testing.assert_close(m, worst)


def test_batch_norm_takes_the_statistics_of_the_point(images):
    net, (x, y) = networks()["residual"].train(), images
    before = net.bn.running_mean.clone()
    m, clean = margin_bounds(net, x, x, y, x)
    moved, count = net.bn.running_mean.clone(), net.bn.num_batches_tracked.clone()
    assert not torch.equal(before, moved)
    assert count == 1
    torch.testing.assert_close(m, clean)
    torch.testing.assert_close(clean, margins(net(x), y))


def test_what_has_no_bounds_is_named(images):
    x, y = images
    for net, message in (
        (nn.Sequential(nn.Flatten(), nn.LayerNorm(36).double()), "LayerNorm"),
        (nn.Sequential(nn.Flatten(), nn.Dropout(0.5)), "dropout is active"),
        (nn.Sequential(nn.LeakyReLU(-0.1)), "not monotone"),
        (nn.Sequential(nn.ConvTranspose2d(1, 1, 3).double()), "transposed"),
    ):
        with pytest.raises(LossplugError, match=message) as caught:
            interval_bounds(net, x, x)
        assert "\n" not in str(caught.value)

    class Square(nn.Module):
        def forward(self, x):
            return x * x

    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    for net, message in ((Square(), "function mul"), (Branch(), "traced"), (Pair(), "expected one tensor")):
        with pytest.raises(LossplugError, match=message):
            interval_bounds(net, x, x)
    with pytest.raises(LossplugError, match="one shape"):
        interval_bounds(nn.Identity(), x, x[:2])
    with pytest.raises(LossplugError, match="labels"):
        margin_bounds(networks()["mlp"], x, x, y[:2])


def test_other_layers_can_be_registered():
    class Double(nn.Module):
        def forward(self, x):
            return x + x * x / x

    @propagate.register(Double)
    def _(layer: nn.Module, box: Box) -> Box:
        return Box(2 * box.lower, 2 * box.upper, 2 * box.point)

    x = torch.ones(2, 3)
    assert (interval_bounds(nn.Sequential(Double()), x, x + 1).upper == 4).all()


def test_input_box_per_channel_and_clipped():
    x = torch.zeros(2, 3, 4, 4)
    lower, upper = input_box(x, [0.1, 0.2, 0.3], [-0.15, -0.15, -1.0], 0.25)
    torch.testing.assert_close(lower[0, :, 0, 0], torch.tensor([-0.1, -0.15, -0.3]))
    torch.testing.assert_close(upper[0, :, 0, 0], torch.tensor([0.1, 0.2, 0.25]))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    a = 2 * torch.randn(20, 4, dtype=D)
    return a - 3 * torch.rand(20, 4, dtype=D), a


def test_ibp_is_cross_entropy_of_the_margins(pair):
    m, a = pair
    logits = F.pad(-m, (1, 0))
    torch.testing.assert_close(create("ibp")(m), F.cross_entropy(logits, torch.zeros(20, dtype=torch.long)))
    z, y = torch.randn(7, 5, dtype=D), torch.randint(5, (7,))
    torch.testing.assert_close(create("ibp")(margins(z, y)), F.cross_entropy(z, y))
    clean, worst = margin_cross_entropy(a).mean(), margin_cross_entropy(m).mean()
    torch.testing.assert_close(create("ibp", kappa=0.3)(m, a), 0.3 * clean + 0.7 * worst)


def test_ibp_from_a_model_and_its_schedules(images):
    net, (x, y) = networks()["mlp"], images
    progress = Progress(25, 100)
    loss = create("ibp", eps=0.0, kappa=0.3)
    torch.testing.assert_close(loss.from_model(net, x, y), F.cross_entropy(net(x), y))
    ramped = create("ibp", eps=0.2, eps_schedule=Linear(0, 1), kappa=Linear(1, 0.5), low=0.0, high=1.0)
    bounds, clean = margin_bounds(net, *input_box(x, 0.05, 0.0, 1.0), y, x)
    torch.testing.assert_close(ramped.from_model(net, x, y, progress), create("ibp", kappa=0.875)(bounds, clean))
    with pytest.raises(LossplugError, match="progress"):
        ramped.from_model(net, x, y)
    with pytest.raises(LossplugError, match="eps is not set"):
        create("ibp").from_model(net, x, y)
    with pytest.raises(LossplugError, match="kappa"):
        create("ibp", kappa=Linear(2, 0))(bounds, clean, progress=progress)


@pytest.mark.parametrize("name", EXPRESSIVE)
def test_expressive_ends_and_order_in_alpha(name, pair):
    m, a = pair
    adversarial, certified = margin_cross_entropy(a).mean(), margin_cross_entropy(m).mean()
    torch.testing.assert_close(create(name, alpha=0.0)(m, a), adversarial)
    torch.testing.assert_close(create(name, alpha=1.0)(m, a), certified)
    values = [float(create(name, alpha=i / 10)(m, a)) for i in range(11)]
    assert values == sorted(values)
    with pytest.raises(LossplugError, match="margins at the attack"):
        create(name)(m)
    with pytest.raises(LossplugError, match="shapes differ"):
        create(name)(m, a[:, :2])


def test_expressive_order_between_the_losses(pair):
    m, a = pair
    for alpha in (0.1, 0.5, 0.9):
        cc, mtl = (create(n, alpha=alpha, reduction="none")(m, a) for n in ("cc_ibp", "mtl_ibp"))
        exp = create("exp_ibp", alpha=alpha, per_sample=True, reduction="none")(m, a)
        assert (cc <= mtl + 1e-12).all()
        assert (exp <= mtl + 1e-12).all()
        assert create("exp_ibp", alpha=alpha)(m, a) <= create("mtl_ibp", alpha=alpha)(m, a)


def test_exp_ibp_means_then_powers(pair):
    m, a = pair
    means = margin_cross_entropy(m).mean() ** 0.3 * margin_cross_entropy(a).mean() ** 0.7
    torch.testing.assert_close(create("exp_ibp", alpha=0.3)(m, a), means)
    assert not torch.isclose(create("exp_ibp", alpha=0.3, per_sample=True)(m, a), means)
    for reduction in ("none", "sum"):
        with pytest.raises(LossplugError, match="per_sample"):
            create("exp_ibp", reduction=reduction)
        with pytest.raises(LossplugError, match="per_sample"):
            create("exp_ibp")(m, a, reduction=reduction)
    sure = torch.full((3, 4), 1e4, requires_grad=True)
    value = create("exp_ibp")(sure, sure)
    assert torch.autograd.grad(value, sure)[0].isfinite().all()
    nothing = create("exp_ibp")(m, a, sample_weight=torch.zeros(20))
    assert nothing == 0
    empty = m[:0].requires_grad_()
    assert torch.autograd.grad(create("exp_ibp")(empty, a[:0]), empty)[0].shape == (0, 4)


def test_attack_stays_in_the_box_and_raises_the_loss(images):
    net, (x, y) = networks()["residual"].train(), images
    lower, upper = input_box(x, 0.1, 0.0, 1.0)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    net.head.eval()
    found = pgd(net, y, lower, upper, generator=torch.Generator().manual_seed(0))
    assert ((found >= lower) & (found <= upper)).all()
    assert not found.requires_grad
    assert net.training
    assert not net.head.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    net.eval()
    assert F.cross_entropy(net(found), y) > F.cross_entropy(net(x), y)
    with torch.no_grad():
        assert pgd(net, y, lower, upper).shape == x.shape


def test_margins_at_an_attack_in_the_box_are_never_below_the_bounds(images):
    net, (x, y) = networks()["residual"], images
    lower, upper = input_box(x, 0.1)
    m, a = margin_bounds(net, lower, upper, y, pgd(net, y, lower, upper))
    assert (m <= a).all()
    small = sabr_box(pgd(net, y, lower, upper), lower, upper, 0.3)
    assert (small[0] >= lower - 1e-12).all()
    assert (small[1] <= upper + 1e-12).all()
    torch.testing.assert_close(small[1] - small[0], 0.3 * (upper - lower))
    assert (margin_bounds(net, *small, y)[0] >= m - 1e-9).all()


@pytest.mark.parametrize("name", EXPRESSIVE)
def test_expressive_from_a_model_trains_it(name, images):
    x, y = images
    net = networks()["residual"].train()
    twin = copy.deepcopy(net)  # the first call moves the running statistics that the next attack would see
    loss = create(name, alpha=0.3, l1=1e-4, eps=0.05, low=0.0, high=1.0, steps=2)
    torch.manual_seed(0)
    value = loss.from_model(net, x, y)
    without = create(name, alpha=0.3, eps=0.05, low=0.0, high=1.0, steps=2)
    torch.manual_seed(0)
    torch.testing.assert_close(value - without.from_model(twin, x, y), 1e-4 * l1_norm(net))
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    with pytest.raises(LossplugError, match="no linear"):
        l1_norm(nn.ReLU())


def test_certified_training_raises_the_certified_margin():
    torch.manual_seed(0)
    y = torch.randint(2, (128,))
    x = torch.randn(128, 2) * 0.3 + torch.where(y[:, None] == 1, 1.0, -1.0)
    net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    loss = create("ibp", eps=0.2, eps_schedule=Linear(0, 1, 0.1, 0.6), kappa=Linear(1, 0.5))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)

    def certified():
        return (margin_bounds(net, x - 0.2, x + 0.2, y)[0] > 0).all(1).double().mean()

    start = certified()
    for step in range(120):
        optimizer.zero_grad()
        loss.from_model(net, x, y, Progress(step, 120)).backward()
        optimizer.step()
    assert start < 0.6
    assert certified() > 0.9
