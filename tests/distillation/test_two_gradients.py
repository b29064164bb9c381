"""DOT and gradient alignment: identities in float64, the callback against a hand-written loop, resume, mistakes."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from distillation_runs import Plain, data, network, same, trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import SAM, Distillation, ExactResume
from lightning_lossplug.distillation import DOT, align_gradients, create

pytestmark = pytest.mark.filterwarnings("ignore")


def problem(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    extra = nn.Parameter(torch.randn(3, dtype=torch.float64))  # of the task alone
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
    teacher = torch.randn(8, 3, dtype=torch.float64)

    def losses():
        z = net(x)
        return F.cross_entropy(z + extra, y), create("kd", temperature=2.0)(z, teacher)

    return [*net.parameters(), extra], losses


def dot_steps(delta, steps=6, mu=0.9, decay=0.01, lr=0.1, weight=1.0):
    parameters, losses = problem()
    sgd = torch.optim.SGD(parameters, lr=lr, momentum=mu, weight_decay=decay)
    dot = DOT(sgd, delta)
    for _ in range(steps):
        task, kd = losses()
        kd = weight * kd
        sgd.zero_grad()
        parts = torch.autograd.grad(kd, parameters, retain_graph=True, allow_unused=True)
        (task + kd).backward()
        dot.prepare(parts)
        sgd.step()
        dot.restore()
        assert sgd.param_groups[0]["momentum"] == mu
        assert sgd.param_groups[0]["weight_decay"] == decay
    return [p.detach() for p in parameters], dot


def test_delta_0_is_sgd_of_the_sum():
    parameters, losses = problem()
    sgd = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(6):
        sgd.zero_grad()
        sum(losses()).backward()
        sgd.step()
    for got, want in zip(dot_steps(0.0)[0], parameters, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=1e-15)


def test_two_buffers_by_hand():
    parameters, losses = problem()
    mu, delta, decay = 0.9, 0.075, 0.01
    v_task, v_kd = [None] * len(parameters), [None] * len(parameters)
    for _ in range(6):
        task, kd = losses()
        g_kd = torch.autograd.grad(kd, parameters, retain_graph=True, allow_unused=True)
        g_task = torch.autograd.grad(task, parameters)
        with torch.no_grad():
            for i, p in enumerate(parameters):
                g = g_task[i] + decay * p
                alone = g_kd[i] is None
                v_task[i] = g if v_task[i] is None else (mu if alone else mu - delta) * v_task[i] + g
                if not alone:
                    v_kd[i] = g_kd[i] if v_kd[i] is None else (mu + delta) * v_kd[i] + g_kd[i]
                p -= 0.1 * (v_task[i] + (0 if alone else v_kd[i]))
    for got, want in zip(dot_steps(delta)[0], parameters, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-13, atol=1e-14)


def test_no_distillation_is_less_momentum():
    parameters, losses = problem()
    sgd = torch.optim.SGD(parameters[:-1], lr=0.1, momentum=0.9 - 0.075, weight_decay=0.01)
    alone = torch.optim.SGD(parameters[-1:], lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(6):
        for optimizer in (sgd, alone):
            optimizer.zero_grad()
        losses()[0].backward()
        for optimizer in (sgd, alone):
            optimizer.step()
    for got, want in zip(dot_steps(0.075, weight=0.0)[0], parameters, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-13, atol=1e-14)


def test_velocities_are_restored():
    _, dot = dot_steps(0.075, 3)
    other = DOT(dot.optimizer, 0.075)
    other.load_state_dict(copy.deepcopy(dot.state_dict()))
    parts = [torch.ones_like(p) for p in dot.parameters]
    for p in dot.parameters:
        p.grad = torch.ones_like(p)
    for i in range(len(parts)):
        mu = 0.9
        got = dot._velocity(i, dot.parameters[i], parts[i], mu, 0.0)
        assert torch.equal(got, other._velocity(i, dot.parameters[i], parts[i], mu, 0.0))


@pytest.mark.parametrize("align_scope", ["all", "shared"])
def test_alignment(align_scope):
    g = torch.Generator().manual_seed(0)
    task = [torch.randn(n, generator=g, dtype=torch.float64) for n in (4, 3, 2)]
    kd = [-task[0] + 0.1 * torch.randn(4, generator=g, dtype=torch.float64), None, -0.5 * task[2]]
    out = align_gradients(kd, task, align_scope)
    product = (kd[0] * task[0]).sum() + (kd[2] * task[2]).sum()
    assert product < 0
    if align_scope == "shared":
        assert out[1] is None
        rest = (out[0] * task[0]).sum() + (out[2] * task[2]).sum()
        square = task[0].square().sum() + task[2].square().sum()
    else:
        rest = sum((a * b).sum() for a, b in zip(out, task, strict=True))
        square = sum(t.square().sum() for t in task)
        torch.testing.assert_close(out[1], -product / square * task[1])  # the main head gets more of the task
    torch.testing.assert_close(rest, torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(out[0], kd[0] - product / square * task[0])
    friendly = [task[0] * 2, None, task[2]]
    for a, b in zip(align_gradients(friendly, task, "shared"), friendly, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def by_hand(option, window, epochs=2):
    """SGD of a student and a frozen teacher, every gradient taken by itself."""
    student, teacher, loss = Plain().net, network(seed=5).eval(), create("kd")
    parameters = list(student.parameters())
    sgd = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)
    dot = DOT(sgd, 0.075) if option == "dot" else None
    batches = list(data())
    for _ in range(epochs):
        for i in range(0, len(batches), window):
            sums = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
            for x, y in batches[i : i + window]:
                z = student(x)
                with torch.no_grad():
                    z_t = teacher(x)
                for value, total in ((F.cross_entropy(z, y), sums[0]), (3.0 * loss(z, z_t), sums[1])):
                    for t, g in zip(total, torch.autograd.grad(value, parameters, retain_graph=True), strict=True):
                        t += g / window
            task, kd = sums
            for p, a, b in zip(parameters, task, kd if dot else align_gradients(kd, task, option), strict=True):
                p.grad = a + b
            if dot:
                dot.prepare(kd)
            sgd.step()
            if dot:
                dot.restore()
    return student.state_dict()


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("option", ["dot", "all", "shared"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_callback_equals_a_loop(option, window, scaled):
    options = {"dot_delta": 0.075} if option == "dot" else {"align": option}
    module = Plain()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    precision = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]} if scaled else {}
    callback = Distillation(network(seed=5), weight=3.0, **options)
    trainer(callback, max_epochs=2, accumulate_grad_batches=window, **precision).fit(module, data())
    tolerance = {"rtol": 5e-2, "atol": 3e-2} if scaled else {"rtol": 1e-4, "atol": 1e-5}
    for key, want in by_hand(option, window).items():
        torch.testing.assert_close(module.net.state_dict()[key], want, **tolerance)


def test_dot_resumes_bit_by_bit_within_a_window(tmp_path):
    def run(save, ckpt_path=None):
        module = Plain(dropout=0.2)

        class Saver(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if save and trainer.current_epoch == 0:
                    trainer.save_checkpoint(tmp_path / "middle.ckpt")

        torch.manual_seed(4)
        callback = Distillation(network(seed=5), dot_delta=0.05)
        trainer(callback, ExactResume(), Saver(), max_epochs=2).fit(module, data(), ckpt_path=ckpt_path)
        return module.state_dict()

    assert same(run(True), run(False, tmp_path / "middle.ckpt"))
    states = torch.load(tmp_path / "middle.ckpt")["callbacks"]
    split = next(state["split"] for key, state in states.items() if "Distillation" in key)
    assert len(split["dot"]["kd"]) == len(list(Plain().parameters()))


class NoMomentum(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True)


@pytest.mark.parametrize(
    ("options", "module", "run", "message"),
    [
        ({"dot_delta": 0.1}, Plain, {}, "delta is 0.1, the optimizer's momentum 0.9"),
        ({"dot_delta": -0.1}, Plain, {}, "delta is -0.1"),
        ({"dot_delta": 0.05}, lambda: Plain("adamw"), {}, "needs SGD with momentum, got AdamW"),
        ({"dot_delta": 0.05}, NoMomentum, {}, "SGD without nesterov"),
        ({"dot_delta": 0.05}, Plain, {"gradient_clip_val": 1.0}, "gradient_clip_val would clip"),
        ({"dot_delta": 0.05, "align": "all"}, Plain, {}, "dot_delta and align"),
        ({"align": "some"}, Plain, {}, "align is 'some'"),
        ({"align": "all"}, Plain, {"callbacks": SAM()}, "align and SAM"),
    ],
)
def test_mistakes_are_one_line(options, module, run, message):
    run = dict(run)
    more = [run.pop("callbacks")] if "callbacks" in run else []
    with pytest.raises(LossplugError, match=message) as error:
        trainer(Distillation(network(seed=5), **options), *more, **run).fit(module(), data())
    assert "\n" not in str(error.value)
