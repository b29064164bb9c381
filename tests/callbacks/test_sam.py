"""SAM: against a loop by hand, in every setting of the Trainer that it claims to hold."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from callback_runs import Plain, data, make_trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torchmetrics import MeanMetric

from lightning_lossplug.callbacks import SAM
from lightning_lossplug.callbacks.sam import perturbation
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.surgery import wrapped_methods


class Sgd(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def by_hand(module, loader, rho, adaptive=False, clip=None, epochs=1):
    """The card's two passes on a copy, with torch alone."""
    net = copy.deepcopy(module.net)
    params = list(net.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            with torch.no_grad():
                sizes = [p.abs() if adaptive else torch.ones_like(p) for p in params]
                norm = torch.sqrt(sum(((s * p.grad) ** 2).sum() for s, p in zip(sizes, params, strict=True)))
                old = [p.clone() for p in params]
                for s, p in zip(sizes, params, strict=True):
                    p.add_(rho * s**2 * p.grad / (norm + 1e-12))
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            with torch.no_grad():
                for p, o in zip(params, old, strict=True):
                    p.copy_(o)
            if clip:
                nn.utils.clip_grad_norm_(params, clip)
            optimizer.step()
    return net.state_dict()


def assert_same(one, two, **tolerance):
    for key in two:
        torch.testing.assert_close(one[key], two[key], **tolerance)


@pytest.mark.parametrize(("rho", "adaptive", "clip"), [(0.05, False, None), (0.5, True, None), (0.2, False, 0.1)])
def test_fit_equals_the_loop_by_hand(rho, adaptive, clip):
    module, loader = Sgd(), data()
    expected = by_hand(module, loader, rho, adaptive, clip)
    plain = copy.deepcopy(module)
    options = {"max_epochs": 1, "gradient_clip_val": clip}
    make_trainer(callbacks=[SAM(rho, adaptive)], **options).fit(module, loader)
    assert_same(module.net.state_dict(), expected, rtol=1e-6, atol=1e-7)
    make_trainer(**options).fit(plain, loader)
    assert any(
        not torch.allclose(a, b, atol=1e-4) for a, b in zip(plain.parameters(), module.parameters(), strict=True)
    )
    assert wrapped_methods(module) == ()


def test_radius_zero_is_the_optimizer_bit_for_bit():
    one = Plain(dropout=0.3)
    two = copy.deepcopy(one)
    for module, callbacks in ((one, [SAM(rho=0.0)]), (two, [])):
        torch.manual_seed(5)
        make_trainer(callbacks=callbacks).fit(module, data())
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_perturbation_norm_scale_and_definition():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 4, dtype=torch.float64)), nn.Parameter(torch.randn(5, dtype=torch.float64))]
    for p in params:
        p.grad = torch.randn_like(p)
    steps, _ = perturbation(params, 0.3, adaptive=False)
    assert torch.cat([s.flatten() for s in steps]).norm() == pytest.approx(0.3)
    adaptive, norm = perturbation(params, 0.3, adaptive=True)
    expected = torch.cat([(p.abs() * p.grad).flatten() for p in params]).norm()
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(adaptive[0], 0.3 * params[0].detach() ** 2 * params[0].grad / expected)
    for p in params:
        p.grad *= 65536
    for one, two in zip(steps, perturbation(params, 0.3, adaptive=False)[0], strict=True):
        torch.testing.assert_close(one, two)
    half = nn.Parameter(torch.ones(4000, dtype=torch.float16))
    half.grad = torch.full_like(half, 6e4)
    assert perturbation([half], 0.1, adaptive=False)[1].isfinite()


class Quadratic(pl.LightningModule):
    """L = w H w / 2: the second gradient is H (w + e)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.unused = nn.Parameter(torch.tensor(3.0))
        self.h = torch.tensor([[2.0, 0.5], [0.5, 1.0]])

    def training_step(self, batch, batch_idx):
        return self.w @ self.h @ self.w / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_quadratic_and_parameters_without_gradient():
    module = Quadratic()
    w = module.w.detach().clone()
    g = module.h @ w
    make_trainer(max_steps=1, callbacks=[SAM(0.1)]).fit(module, data())
    torch.testing.assert_close(module.w.detach(), w - module.h @ (w + 0.1 * g / g.norm()))
    assert module.unused == 3


class Watched(Sgd):
    """Batch norm, metrics, logging, and a record of what each pass saw."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        self.mean = MeanMetric()
        self.passes, self.weights = [], []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.mean(loss)
        self.passes.append(float(loss.detach()))
        self.weights.append(self.net[0].weight.detach().clone())
        self.log("step_loss", loss, on_epoch=True, on_step=False)
        self.log_dict({"metric": self.mean}, on_epoch=True, on_step=False)
        return loss


class Outputs(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def test_first_pass_alone_is_seen_by_logs_metrics_batch_norm_and_callbacks():
    module, outputs = Watched(), Outputs()
    trainer = make_trainer(max_epochs=1, callbacks=[SAM(0.3), outputs])
    trainer.fit(module, data())
    first, second = module.passes[::2], module.passes[1::2]
    assert len(first) == len(second) == 8
    assert all(b > a for a, b in zip(first, second, strict=True))  # uphill, as it should be
    assert outputs.losses == pytest.approx(first)
    mean = sum(first) / 8
    assert float(trainer.callback_metrics["step_loss"]) == pytest.approx(mean)
    assert float(trainer.callback_metrics["metric"]) == pytest.approx(mean)
    assert module.net[1].num_batches_tracked == 8


def test_batch_norm_statistics_are_those_of_the_first_pass():
    module = Watched()
    bn, first = copy.deepcopy(module.net[1]), copy.deepcopy(module.net[0])
    batch = next(iter(data()))
    bn(first(batch[0]))
    make_trainer(max_steps=1, callbacks=[SAM(0.5)]).fit(module, data())
    assert torch.equal(module.net[1].running_mean, bn.running_mean)
    assert torch.equal(module.net[1].running_var, bn.running_var)


class Failing(Sgd):
    """Fails in the second pass of the second step."""

    calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        if self.calls == 4:
            raise RuntimeError("on purpose")
        if self.calls == 3:
            self.before = [p.detach().clone() for p in self.parameters()]
        return super().training_step(batch, batch_idx)


def test_an_exception_in_the_second_pass_leaves_weights_and_methods():
    module = Failing()
    with pytest.raises(RuntimeError, match="on purpose"):
        make_trainer(max_epochs=1, callbacks=[SAM(0.5)]).fit(module, data())
    for p, old in zip(module.parameters(), module.before, strict=True):
        assert torch.equal(p, old)
    assert wrapped_methods(module) == ()


def test_with_a_gradient_scaler_and_a_non_finite_step():
    class Spike(Sgd):
        seen = 0

        def training_step(self, batch, batch_idx):
            self.seen += 1
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 2 else loss

    module, loader = Spike(), data(n=40)
    start = copy.deepcopy(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    make_trainer(max_epochs=1, callbacks=[SAM(0.05)], plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(
        module, loader
    )
    assert module.seen == 9  # two passes each, one for the step that is skipped
    assert scaler.get_scale() == 128.0
    batches = [b for i, b in enumerate(loader) if i != 2]
    assert_same(module.net.state_dict(), by_hand(start, batches, 0.05), rtol=0, atol=5e-3)


def test_what_it_refuses():
    with pytest.raises(LossplugError, match="rho"):
        SAM(rho=-0.1)
    for trainer, message in (
        (make_trainer(callbacks=[SAM()], accumulate_grad_batches=2), "accumulate_grad_batches is 2"),
        (make_trainer(callbacks=[SAM(), SAM(0.1)]), "two SAM"),
        (make_trainer(callbacks=[SAM(), GradientAccumulationScheduler({1: 2})]), "accumulate_grad_batches is 2"),
    ):
        module = Sgd()
        with pytest.raises(LossplugError, match=message):
            trainer.fit(module, data())
        assert wrapped_methods(module) == ()
    manual = Sgd()
    manual.automatic_optimization = False
    with pytest.raises(LossplugError, match="automatic"):
        make_trainer(callbacks=[SAM()]).fit(manual, data())


def test_a_second_fit_and_validation_leave_nothing():
    module, sam = Sgd(), SAM()
    trainer = make_trainer(max_epochs=1, callbacks=[sam])
    trainer.fit(module, data())
    trainer.validate(module, data(), verbose=False)
    make_trainer(max_epochs=1, callbacks=[sam]).fit(module, data())
    assert wrapped_methods(module) == ()
