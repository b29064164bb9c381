"""The printed trace of what ran when."""

import logging

import pytest
import torch
from callback_runs import Plain, assert_equal, data, make_trainer, state_of
from callback_table import teacher

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import QAT, NMSparsity, OnlineDistillation, StepTrace, SwapLoss
from lightning_lossplug.surgery.chain import _WATCHERS


def golden():
    return [OnlineDistillation(teacher(), "bdkd"), QAT(8, 8), NMSparsity(2, 4, "nm_srste"), SwapLoss("focal")]


def run(callbacks, steps=6):
    torch.manual_seed(0)
    module = Plain(dropout=0.1)
    make_trainer(max_steps=steps, max_epochs=-1, callbacks=callbacks).fit(module, data())
    return module


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    logging.getLogger("lightning.pytorch").propagate = True
    return caplog


def test_phases_come_in_their_order_whatever_the_order_of_the_list(said):
    blocks = []
    for callbacks in (golden(), golden()[::-1]):
        said.clear()
        trace = StepTrace(1)
        run([trace, *callbacks])
        text = [record.getMessage() for record in said.records if "StepTrace" in record.getMessage()]
        blocks.append((text[0], [e for e in trace.events if e[1] == "training_step"]))
    assert blocks[0][0] == blocks[1][0]
    phases = [line.split()[0] for line in blocks[0][0].splitlines()[1:]]
    assert phases == ["loss", "sparsity", "quantization", "distillation"]
    assert blocks[0][1] == blocks[1][1] != []


def test_a_step_is_told_once_and_again_when_it_changes(said):
    trace = StepTrace(4)
    run([*golden(), trace])
    told = [r.getMessage().splitlines()[0] for r in said.records if r.getMessage().startswith("StepTrace: to step")]
    assert told[0] == "StepTrace: to step 1"
    assert "StepTrace: to step 3" not in told
    assert {step for step, *_ in trace.events} == {0, 1, 2, 3, 4, 6}
    assert "NMSparsity" in {who for _, what, who in trace.events if what == "technique.advance"}
    assert [what for step, what, _ in trace.events if step == 6] == ["on_train_end"] * 2


def test_it_changes_no_bit_and_leaves_nothing():
    callbacks = golden()
    traced = run([*callbacks, StepTrace()])
    assert_equal(state_of(traced), state_of(run(golden())))
    assert not _WATCHERS
    for callback in callbacks:
        assert not [name for name in vars(callback) if name.startswith("on_")]
        assert "advance" not in vars(getattr(callback, "technique", callback))


def test_no_step_is_refused():
    with pytest.raises(LossplugError, match="steps"):
        StepTrace(0)
