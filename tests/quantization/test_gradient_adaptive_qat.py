"""GAQAT: its statistic, its gate, the two passes against a loop by hand, and the Trainer's features."""

import copy

import pytest
import torch
import torch.nn.functional as F
from callback_runs import Manual, OrderedLoader, Plain, assert_equal, data, make_trainer, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from qat_cases import Convolutions
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import QAT, SAM, ExactResume, GradientAdaptiveQAT, NMSparsity, SwapLoss, load_plugged
from lightning_lossplug.quantization import (
    GradientAdaptiveSettings,
    GradientGate,
    QATSettings,
    QATTechnique,
    gaqat,
    gradient_disorder,
)
from lightning_lossplug.quantization.disorder_plot import draw_disorder
from lightning_lossplug.surgery import wrapped_methods


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Sgd(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


@pytest.mark.parametrize(
    ("signs", "expected"), [([1, 1, 1, 1], 0), ([1, -1, 1, -1], 1), ([1, 1, -1, -1], 1 / 3), ([1, 0], 1)]
)
def test_disorder_of_the_card(signs, expected):
    assert gradient_disorder(torch.tensor(signs)[:, None]).item() == pytest.approx(expected)


def test_disorder_of_random_streams():
    g = torch.Generator().manual_seed(0)
    for p in (0.5, 0.7, 0.9):
        signs = torch.where(torch.rand(20000, 1, generator=g) < p, 1, -1)
        assert gradient_disorder(signs).item() == pytest.approx(2 * p * (1 - p), abs=0.02)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), window=st.integers(8, 20))
def test_the_gate_counts_what_the_definition_says(seed, window):
    stream = torch.randn(3 * window, 5, generator=torch.Generator().manual_seed(seed))
    gate = GradientGate(GradientAdaptiveSettings(disorder_window=window, disorder_threshold=0.4), {"a": 2, "b": 3})
    smooth = torch.ones(5)
    frozen = torch.zeros(5, dtype=torch.bool)
    for step, task in enumerate(stream):
        combined = gate.combine(task, smooth, step)
        torch.testing.assert_close(combined, (torch.where(frozen, 0.0, task) + smooth) / 2)
        if (step + 1) % window == 0:
            disorder = gradient_disorder(stream[step + 1 - window : step + 1].sign())
            torch.testing.assert_close(gate.disorder.double(), disorder)
            frozen = disorder.float() < 0.4
            assert torch.equal(gate.frozen, frozen)
    assert set(gate.by_scale()) == {"a", "b"}


def run_gate(stream, **options):
    gate = GradientGate(GradientAdaptiveSettings(disorder_window=8, **options), {"a": stream.shape[1]})
    outputs = [gate.combine(task, torch.ones_like(task), step) for step, task in enumerate(stream)]
    return gate, outputs


def test_a_long_run_is_remembered_in_few_windows(monkeypatch):
    monkeypatch.setattr(gaqat, "HISTORY", 8)
    stream = torch.randn(8 * 41, 1, generator=torch.Generator().manual_seed(0))
    gate, _ = run_gate(stream)
    steps = [step for step, _ in gate.history]
    assert steps == list(range(64, 8 * 41 + 1, 64))  # every eighth window
    half, _ = run_gate(stream[: 8 * 20])
    twin = GradientGate(half.settings, half.sizes)
    twin.load_state_dict(half.state_dict())
    for step in range(8 * 20, 8 * 41):
        twin.combine(stream[step], stream[step], step)
    assert twin.history == gate.history


def test_options_of_the_gate():
    calm, wild = torch.ones(16), torch.tensor([1.0, -1.0] * 8)
    stream = torch.stack([calm, wild], 1)
    gate, _ = run_gate(stream)
    assert gate.frozen.tolist() == [True, False]
    assert run_gate(stream, disorder_threshold=0.0)[0].frozen.tolist() == [False, False]
    assert run_gate(stream, disorder_threshold=1.1)[0].frozen.tolist() == [True, True]
    assert run_gate(stream, start_step=100)[0].frozen.tolist() == [False, False]
    assert run_gate(stream, freeze_fraction=0.5)[0].frozen.tolist() == [True, False]
    assert run_gate(stream, freeze_target="smooth")[1][-1].tolist() == [0.5, 0.0]
    assert run_gate(stream, freeze_target="both")[1][-1].tolist() == [0.0, 0.0]
    thaw = torch.cat([stream, torch.stack([wild, wild], 1)[:8]])
    assert run_gate(thaw)[0].frozen.tolist() == [False, False]
    assert run_gate(thaw, unfreeze=False)[0].frozen.tolist() == [True, False]
    silent = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 0.0, -1.0, 0.0])[:, None]
    assert run_gate(silent)[0].disorder.item() == pytest.approx(1 / 7)
    assert run_gate(silent, zero_sign="zero")[0].disorder.item() == pytest.approx(6 / 7)
    state = gate.state_dict()
    twin = GradientGate(gate.settings, {"a": 2})
    twin.load_state_dict(state)
    assert torch.equal(twin.frozen, gate.frozen)
    assert [step for step, _ in gate.history] == [8, 16]
    assert twin.history == gate.history == [(8, [0.5]), (16, [0.5])]
    with pytest.raises(LossplugError, match=r"GradientAdaptiveQAT: .*other scales"):
        GradientGate(gate.settings, {"b": 2}).load_state_dict(state)


def by_hand(module, sharpness, rho, alpha, perturb_scales=False, frozen=False, clip=None, accumulate=1):
    """The card's step on a copy, with torch and the quantised layers alone."""
    net = copy.deepcopy(module.net).train()
    technique = QATTechnique(QATSettings(4, 4))
    technique.attach(net)
    scales = list(technique.named_scales().values())
    ids = {id(s) for s in scales}
    params = [p for p in net.parameters() if id(p) not in ids] + scales
    optimizer = torch.optim.SGD([{"params": params[: -len(scales)]}, {"params": scales}], 0.05, momentum=0.9)
    batches = list(data())
    for i in range(0, len(batches), accumulate):
        group = batches[i : i + accumulate]

        def gradients(group=group):
            for p in params:
                p.grad = None
            for x, y in group:
                (F.cross_entropy(net(x), y) / accumulate).backward()
            return [p.grad.clone() for p in params]

        first = gradients()
        moved = [perturb_scales or id(p) not in ids for p in params]
        norm = torch.sqrt(sum((g**2).sum() for g, m in zip(first, moved, strict=True) if m))
        factor = rho / (norm + 1e-12) - (alpha if sharpness == "sagm" else 0)
        old = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, g, m in zip(params, first, moved, strict=True):
                p.add_(g * factor * m)
        second = gradients()
        with torch.no_grad():
            for p, o in zip(params, old, strict=True):
                p.copy_(o)
        for p, a, b in zip(params, first, second, strict=True):
            if id(p) in ids:
                p.grad = ((0 if frozen else a) + b) / 2
            else:
                p.grad = b if sharpness == "sam" else (a + b) / 2
        if clip:
            nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
    return net.state_dict()


@pytest.mark.parametrize(
    ("sharpness", "perturb_scales", "clip", "accumulate"),
    [("sagm", False, None, 1), ("sam", False, None, 1), ("sagm", True, 0.1, 1), ("sagm", False, None, 2)],
)
def test_fit_equals_the_loop_by_hand(sharpness, perturb_scales, clip, accumulate):
    module = Sgd()
    expected = by_hand(module, sharpness, 0.1, 0.01, perturb_scales, clip=clip, accumulate=accumulate)
    options = {"gradient_clip_val": clip, "accumulate_grad_batches": accumulate, "max_epochs": 1}
    callback = GradientAdaptiveQAT(4, 4, sharpness, 0.1, 0.01, disorder_threshold=0.0, perturb_scales=perturb_scales)
    make_trainer(callbacks=[callback], **options).fit(module, data())
    found = module.net.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    assert wrapped_methods(module) == ()
    assert callback._steps == []


def test_without_a_radius_it_is_qat_bit_for_bit():
    states = []
    for callback in (QAT(4, 4), GradientAdaptiveQAT(4, 4, rho=0.0, alpha=0.0, disorder_threshold=0.0)):
        torch.manual_seed(3)
        module = Convolutions()
        module.net.insert(4, nn.Dropout(0.3))
        make_trainer(callbacks=[callback]).fit(module, data())
        states.append(state_of(module))
    assert_equal(*states)


def test_frozen_scales_follow_the_flatness_gradient_alone():
    module = Sgd()
    callback = GradientAdaptiveQAT(4, 4, rho=0.1, alpha=0.0, disorder_window=8, disorder_threshold=2.0)
    seen = []
    combine = callback.technique.combine

    def watch(task, smooth):
        out = combine(task, smooth)
        seen.append((callback.technique.gate.frozen.clone(), task, smooth, out))
        return out

    callback.technique.combine = watch
    make_trainer(max_epochs=2, callbacks=[callback]).fit(module, data())
    assert len(seen) == 16
    for step, (_, task, smooth, out) in enumerate(seen):
        for name in out:
            expected = smooth[name] / 2 if step >= 8 else (task[name] + smooth[name]) / 2
            torch.testing.assert_close(out[name], expected)


class Watched(Convolutions):
    def __init__(self):
        super().__init__()
        self.passes = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("mean_loss", loss, on_step=False, on_epoch=True)
        self.passes.append((self.net[1]._parameters["weight"].detach().clone(), float(loss.detach())))
        return loss


def test_weights_are_restored_exactly_and_only_the_first_pass_is_seen():
    module = Watched()
    before = []

    class Check(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            before.append(pl_module.net[1]._parameters["weight"].detach().clone())

    trainer = make_trainer(max_epochs=1, callbacks=[GradientAdaptiveQAT(4, 4, rho=0.5), Check()])
    trainer.fit(module, data())
    assert len(module.passes) == 16
    for i, after in enumerate(before):
        assert torch.equal(module.passes[2 * i][0], after)
        assert not torch.equal(module.passes[2 * i + 1][0], after)
    assert module.net[2].num_batches_tracked == 8
    mean = sum(loss for _, loss in module.passes[::2]) / 8
    assert float(trainer.callback_metrics["mean_loss"]) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
        {"callbacks": "others"},
    ],
    ids=["bf16", "accumulation_with_a_rest", "sparsity_and_loss"],
)
def test_trainer_features(options):
    options = dict(options)
    callbacks = [GradientAdaptiveQAT(4, 4, disorder_window=8, layer_logs=True)]
    if options.pop("callbacks", None):
        callbacks += [NMSparsity(2, 4), SwapLoss("focal")]
    module = Plain()
    trainer = make_trainer(max_epochs=3, callbacks=callbacks, log_every_n_steps=1, **options)
    trainer.fit(module, data())
    logged = trainer.callback_metrics
    assert 0 <= logged["GradientAdaptiveQAT/frozen"] <= 1
    assert 0 <= logged["GradientAdaptiveQAT/sign_conflict"] <= 1
    assert 0 <= logged["GradientAdaptiveQAT/disorder"] <= 1
    assert "GradientAdaptiveQAT/disorder/net.0.weight.s" in logged
    assert all(p.isfinite().all() for p in module.parameters())


def test_with_a_gradient_scaler_and_a_step_that_overflows():
    class Spike(Sgd):
        seen = 0

        def training_step(self, batch, batch_idx):
            self.seen += 1
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 2 else loss

    module = Spike()
    plain = Sgd()
    plain.load_state_dict(module.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    callback = GradientAdaptiveQAT(4, 4, rho=0.05)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    make_trainer(max_epochs=1, callbacks=[callback], plugins=[plugin]).fit(module, data(n=40))
    assert module.seen == 9  # two passes each, one for the step that is skipped
    assert callback.technique.gate.fill == 4
    assert scaler.get_scale() == 128.0
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("stop", [5, 19])
def test_interrupted_and_resumed_equals_straight(stop, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == stop and trainer.ckpt_path is None:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(ckpt_path=None):
        torch.manual_seed(0)
        module = Plain(dropout=0.3)
        callback = GradientAdaptiveQAT(3, 3, disorder_window=8, disorder_threshold=0.45)
        trainer = make_trainer(max_epochs=3, callbacks=[callback, Save(), ExactResume()])
        trainer.fit(module, OrderedLoader(), ckpt_path=ckpt_path)
        return state_of(module), callback.technique.gate.state_dict()

    straight, gate = run()
    resumed, other = run(tmp_path / "a.ckpt")
    assert_equal(straight, resumed)
    assert gate["fill"] == other["fill"]
    for name in ("flips", "last", "frozen", "disorder"):
        torch.testing.assert_close(gate[name], other[name], equal_nan=True)
    assert_equal(load_plugged(Plain(), tmp_path / "a.ckpt").state_dict(), torch.load(tmp_path / "a.ckpt")["state_dict"])


def test_a_frozen_scale_of_target_both_stands_still():
    module = Plain()
    callback = GradientAdaptiveQAT(4, 4, disorder_window=8, disorder_threshold=2.0, freeze_target="both")
    make_trainer(max_epochs=1, callbacks=[callback]).fit(module, data())
    before = {n: s.detach().clone() for n, s in callback.technique.named_scales().items()}
    weights = module.net[0]._parameters["weight"].detach().clone()
    trainer = make_trainer(max_epochs=1, callbacks=[callback])
    callback.technique.reset = lambda: None
    trainer.fit(module, data())
    for name, scale in callback.technique.named_scales().items():
        assert torch.equal(scale, before[name])
    assert not torch.equal(module.net[0]._parameters["weight"], weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disorder_window": 7}, "disorder_window is 7"),
        ({"disorder_threshold": -0.1}, "disorder_threshold is -0.1"),
        ({"rho": -1.0}, "rho is -1.0"),
        ({"bits_w": 9}, "bits is 9"),
        ({"freeze_target": "all"}, "freeze_target is 'all'"),
        ({"sharpness": "asam"}, "sharpness is 'asam'"),
        ({"freeze_fraction": 1.5}, "freeze_fraction is 1.5"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(LossplugError, match=message):
        GradientAdaptiveQAT(**options)


def test_what_it_refuses():
    with pytest.raises(LossplugError, match="needs automatic optimization"):
        make_trainer(callbacks=[GradientAdaptiveQAT()]).fit(Manual(), data())
    with pytest.raises(LossplugError, match="another callback makes a second pass"):
        make_trainer(callbacks=[SAM(), GradientAdaptiveQAT()]).fit(Plain(), data())
    with pytest.raises(LossplugError, match="no learned scale"):
        callback = GradientAdaptiveQAT(weight="dorefa", activation="dorefa", first_last_bits=None)
        make_trainer(callbacks=[callback]).fit(Plain(), data())


def test_a_picture_of_the_disorder(tmp_path):
    path = tmp_path / "new" / "disorder.png"
    callback = GradientAdaptiveQAT(4, 4, disorder_window=8, picture=str(path))
    make_trainer(max_epochs=3, callbacks=[callback]).fit(Plain(), data())
    assert [step for step, _ in callback.technique.gate.history] == [8, 16, 24]
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LossplugError, match="there is no full window to draw"):
        draw_disorder([], [], path)
