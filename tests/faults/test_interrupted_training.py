"""Steps that are not finite, Ctrl-C, a clock that jumps: a run goes on, or leaves what another can go on from."""

import math
import signal
import time

import pytest
import torch
from callback_runs import OrderedLoader, Plain, assert_equal, data, make_trainer, state_of
from callback_table import CALLBACKS, run_of
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import (
    QAT,
    ExactResume,
    NMSparsity,
    OnlineDistillation,
    SwapLoss,
    TechniqueCallback,
    read_checkpoint,
)
from lightning_lossplug.distillation import cache_teacher
from lightning_lossplug.surgery.chain import wrapped_methods

BAD = 3  # the batch at which something happens


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # SparsityHealth writes its file


class Spiked(Plain):
    """Its loss is not finite at one batch."""

    def __init__(self, factor=math.inf):
        super().__init__()
        self.factor = factor

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.factor if batch_idx == BAD else loss


class Steps(Callback):
    """Weights and the clocks of techniques after every batch."""

    def __init__(self):
        self.weights, self.clocks = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
        ours = [callback.step for callback in trainer.callbacks if isinstance(callback, TechniqueCallback)]
        self.clocks.append(ours)


def half(growth=2000):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth)
    return MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.parametrize("factor", [math.inf, math.nan])
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_scaler_skips_a_step_and_no_state_moves(name, factor):
    torch.manual_seed(0)
    module, steps = Spiked(factor), Steps()
    trainer = make_trainer(max_epochs=1, plugins=[half()], callbacks=[*run_of(name), steps])
    trainer.fit(module, data())
    assert_equal(steps.weights[BAD], steps.weights[BAD - 1])
    assert steps.clocks[BAD] == steps.clocks[BAD - 1]
    assert all(clock == [len(steps.clocks) - 1] * len(clock) for clock in steps.clocks[-1:])
    for name, value in module.state_dict().items():
        assert not value.is_floating_point() or value.isfinite().all(), name
    assert not torch.equal(steps.weights[-1]["net.0.weight"], steps.weights[BAD]["net.0.weight"])


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_loss_that_is_nan_without_a_scaler_ends_in_nan_or_one_line(name):
    torch.manual_seed(0)
    module = Spiked(math.nan)
    try:
        make_trainer(max_epochs=1, callbacks=run_of(name)).fit(module, data())
    except LossplugError as error:
        assert len(str(error).splitlines()) == 1
    assert not module.net[0].weight.isfinite().all()


class Press(Callback):
    """Ctrl-C in the middle of a batch."""

    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


def together(folder, *extra):
    torch.manual_seed(1)
    saver = ModelCheckpoint(folder, filename="last", every_n_train_steps=3, enable_version_counter=False)
    techniques = [SwapLoss("focal"), NMSparsity(2, 4, "mdgf_linear"), QAT(8, 8)]
    return [*techniques, OnlineDistillation(Plain().net, "bdkd"), saver, *extra, ExactResume()]


def run(folder, *extra, resume=None):
    torch.manual_seed(0)
    module = Plain(dropout=0.1)
    trainer = make_trainer(max_epochs=2, enable_checkpointing=True, callbacks=together(folder, *extra))
    trainer.fit(module, OrderedLoader(), ckpt_path=resume)
    return module


@pytest.mark.parametrize("step", [4, 6, 11])
def test_ctrl_c_leaves_a_state_to_go_on_from(step, tmp_path):
    straight = run(tmp_path / "a")
    # Started in the background (as CI may be), a process inherits an ignored SIGINT; a terminal gives the default one.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.manual_seed(0)
    module = Plain(dropout=0.1)
    extra = Press(step)
    trainer = make_trainer(max_epochs=2, enable_checkpointing=True, callbacks=together(tmp_path / "b", extra))
    own = trainer.strategy.checkpoint_io
    try:
        with pytest.raises(SystemExit):
            trainer.fit(module, OrderedLoader())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert trainer.interrupted
    assert wrapped_methods(module) == ()
    assert trainer.strategy.checkpoint_io is own
    saved = read_checkpoint(tmp_path / "b" / "last.ckpt")
    assert saved["global_step"] == step // 3 * 3
    assert_equal(state_of(run(tmp_path / "b", resume=tmp_path / "b" / "last.ckpt")), state_of(straight))


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    straight = run(tmp_path / "a")
    cache_teacher(straight.net, data(), tmp_path / "one")
    jumps = iter(range(10**9))
    real = time.time

    def skips():
        return real() + (-1) ** next(jumps) * 10 * 365 * 86400

    monkeypatch.setattr(time, "time", skips)
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "b", PowerCut(7))
    resumed = run(tmp_path / "b", resume=tmp_path / "b" / "last.ckpt")
    assert_equal(state_of(resumed), state_of(straight))
    cache_teacher(resumed.net, data(), tmp_path / "two")
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]


class PowerCut(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("power")
