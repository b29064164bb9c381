"""After a fit, or an exception in it, the user's objects are as they were; long runs hold on to nothing.

``LOSSPLUG_LEAK_STEPS=10000 pytest -m slow -s tests/faults/test_leaves_nothing.py`` is the long form, with a table, of
the cases in ``LOSSPLUG_LEAK_CASES`` (default: all).
"""

import gc
import os
from pathlib import Path

import pytest
import torch
from callback_runs import Plain, data, make_trainer
from callback_table import CALLBACKS, LANGUAGE, run_of
from lightning.pytorch import Callback
from tiny_models import LLAMA, Wrapped
from tiny_moe import MoE
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_lossplug.callbacks import MoEBalancing, TechniqueCallback
from lightning_lossplug.surgery.chain import _CHAINS

HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_kwargs", "_always_called"))]
GLOBALS = [(nn.functional, "cross_entropy"), (nn.functional, "linear"), (nn.CrossEntropyLoss, "forward")]
GLOBALS += [(nn.Module, "__call__"), (nn.Linear, "forward"), (torch.Tensor, "backward"), (torch, "save")]
TABLE = [*CALLBACKS, *LANGUAGE, "MoEBalancing", "together"]
LIGHTNINGS = ("_trainer", "_current_fx_name")  # what Lightning itself leaves on a module
STEPS = int(os.environ.get("LOSSPLUG_LEAK_STEPS", "200"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tokens(batches):
    return DataLoader([torch.randint(0, 64, (2, 16))] * batches, batch_size=None)


def made(name, batches=8):
    """A module, its loader, and the callbacks."""
    torch.manual_seed(0)
    ids = tokens(batches)
    if name == "MoEBalancing":
        return MoE("deepseek_v3", 0.01), ids, [MoEBalancing()]
    if name in LANGUAGE:
        return Wrapped(AutoModelForCausalLM.from_config(LLAMA)), ids, [LANGUAGE[name]()]
    if name == "together":
        many = (
            "SwapLoss",
            "NMSparsity",
            "SparsityHealth",
            "ActivationDensity",
            "QAT",
            "OnlineDistillation",
            "ExactResume",
        )
        return Plain(dropout=0.1), data(8 * batches), [CALLBACKS[one]() for one in many]
    return Plain(dropout=0.1), data(8 * batches), run_of(name)


def described(value):
    """What an attribute is, without its contents where those may change by training."""
    if isinstance(value, (nn.Parameter, nn.Module)):
        return id(value)
    if isinstance(value, dict):
        return {key: described(inner) for key, inner in value.items()}
    return type(value).__name__ if isinstance(value, torch.Tensor) or not callable(value) else repr(value)


def portrait(module):
    """Class, attributes, hooks, parameters and buffers of every module below, and what Python shares with others."""
    found = {}
    for name, inner in module.named_modules():
        attributes = {k: described(v) for k, v in vars(inner).items() if k not in LIGHTNINGS}
        hooks = {hook: list(getattr(inner, hook)) for hook in HOOKS if hasattr(inner, hook)}
        found[name] = type(inner), type(inner).forward, attributes, hooks
    return found, [getattr(owner, name) for owner, name in GLOBALS]


def fitted_once(module):
    """Lightning itself leaves names on a module that it has fitted; an empty fit puts them there first."""
    make_trainer(max_steps=0).fit(module, data() if isinstance(module, Plain) else tokens(1))


class Fails(Callback):
    def __init__(self, hook, step):
        self.step = step
        setattr(self, hook, self.fail)

    def fail(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("in the middle")


def loosened(module, callbacks):
    for callback in callbacks:
        if isinstance(callback, TechniqueCallback):  # its layers stay plugged for tests and exports, until asked
            callback.technique.detach(module)


def compare(module, before, shared):
    after, shared_after = portrait(module)
    assert after.keys() == before.keys()
    for name in before:
        for one, two, what in zip(before[name], after[name], ("class", "forward", "attributes", "hooks"), strict=True):
            assert one == two, (name, what)
    assert shared_after == shared
    assert module not in _CHAINS


@pytest.mark.parametrize("name", TABLE)
def test_teardown_leaves_the_module_as_found(name):
    module, loader, callbacks = made(name)
    fitted_once(module)
    before, shared = portrait(module)
    trainer = make_trainer(max_steps=6, max_epochs=-1, callbacks=list(callbacks))
    theirs = {key: type(value) for key, value in vars(trainer.strategy).items()}
    trainer.fit(module, loader)
    assert {key: type(value) for key, value in vars(trainer.strategy).items() if key in theirs}.keys() == theirs.keys()
    for optimizer in trainer.optimizers:
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks
    loosened(module, callbacks)
    compare(module, before, shared)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step", "on_train_start"])
@pytest.mark.parametrize("name", TABLE)
def test_an_exception_leaves_the_module_as_found(name, hook):
    module, loader, callbacks = made(name)
    fitted_once(module)
    before, shared = portrait(module)
    fails = Fails(hook, 0 if hook == "on_train_start" else 3)
    trainer = make_trainer(max_steps=6, max_epochs=-1, callbacks=[*callbacks, fails])
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.fit(module, loader)
    loosened(module, callbacks)
    compare(module, before, shared)


class Watch(Callback):
    """Objects that the garbage collector knows, hooks and attributes of the module, and memory, now and then."""

    def __init__(self, every):
        self.every, self.seen = every, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step and trainer.global_step % self.every == 0:
            gc.collect()
            modules = list(pl_module.modules())
            hooks = sum(len(getattr(m, hook)) for m in modules for hook in HOOKS if hasattr(m, hook))
            attributes = sum(len(vars(m)) for m in modules)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.seen.append((len(gc.get_objects()), hooks + attributes, pages * os.sysconf("SC_PAGE_SIZE")))


def growth(name, steps):
    module, loader, callbacks = made(name, batches=20)
    watch = Watch(steps // 4)
    trainer = make_trainer(max_steps=steps, max_epochs=-1, callbacks=[*callbacks, watch])
    trainer.fit(module, loader)
    assert len(watch.seen) == 4
    objects, attributes, memory = (b - a for a, b in zip(watch.seen[1], watch.seen[-1], strict=True))
    return objects, attributes, memory


@pytest.mark.parametrize("name", TABLE)
def test_a_run_holds_on_to_nothing(name):
    objects, attributes, memory = growth(name, STEPS)
    assert attributes == 0
    assert objects < 100, f"{objects} objects more after {STEPS // 2} steps"
    assert memory < 8 << 20, f"{memory / 2**20:.1f} MB more after {STEPS // 2} steps"


@pytest.mark.slow
@pytest.mark.timeout(36_000)
def test_long_runs_hold_on_to_nothing(capsys):
    steps = max(STEPS, 10_000)
    rows = {}
    for name in os.environ.get("LOSSPLUG_LEAK_CASES", ",".join(TABLE)).split(","):
        rows[name] = growth(name, steps)
        with capsys.disabled():
            objects, attributes, memory = rows[name]
            print(f"{name}: {objects:+} objects, {attributes:+} attributes, {memory / 2**20:+.1f} MB", flush=True)
    for name, (objects, attributes, memory) in rows.items():
        assert attributes == 0, name
        assert objects < 200, name
        assert memory < 32 << 20, name
