"""DeepSpeed: what can't reach its gradients says so in one line, before training.

Lightning runs it on CUDA only and needs the package; the class of its strategy, which the callbacks ask for, is there
without both.
"""

import pytest
from callback_runs import Plain, make_trainer
from callback_table import CALLBACKS, LANGUAGE, run_of
from lightning.pytorch.strategies import DeepSpeedStrategy

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import CompressedGradients, LocalUpdates, MoEBalancing
from lightning_lossplug.callbacks.sharded import keeps_all_on_every_rank

LOSS_ALONE = {  # they change the loss, or look, and take no part in the step
    "SwapLoss",
    "ActivationDensity",
    "Distillation",
    "DistillationReport",
    "StepTrace",
}
MORE = {"MoEBalancing": MoEBalancing, "CompressedGradients": CompressedGradients, "LocalUpdates": LocalUpdates}
REFUSED = [name for name in (*CALLBACKS, *LANGUAGE, *MORE) if name not in LOSS_ALONE]


def bare():
    """Lightning's strategy without the package: its class is what the callbacks ask for."""
    return DeepSpeedStrategy.__new__(DeepSpeedStrategy)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_reach_the_gradients_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callbacks = [MORE[name]()] if name in MORE else [LANGUAGE[name]()] if name in LANGUAGE else run_of(name)
    trainer, module = make_trainer(callbacks=callbacks), Plain()
    trainer._accelerator_connector.strategy = bare()
    with pytest.raises(LossplugError, match=r"DeepSpeed") as caught:
        for callback in callbacks:
            callback.setup(trainer, module, "fit")
            callback.on_fit_start(trainer, module)
    assert len(str(caught.value).splitlines()) == 1


def test_its_class_is_not_taken_for_ddp():
    assert not keeps_all_on_every_rank(bare())
    assert keeps_all_on_every_rank(make_trainer().strategy)
