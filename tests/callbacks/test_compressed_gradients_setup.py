"""What CompressedGradients refuses, and what it does on one device; the rest is in tests/distributed."""

import lightning.pytorch as pl
import pytest
import torch
from callback_runs import Manual, Plain, data, make_trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from lightning_lossplug.callbacks import SAM, CompressedGradients, GradientAdaptiveQAT, LocalUpdates
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import registry


def refused(match, module=None, callbacks=(), **options):
    callback = CompressedGradients()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[callback, *callbacks],
        **options,
    )
    with pytest.raises(LossplugError, match=match):
        callback.setup(trainer, module or Plain(), "fit")


def test_one_device_is_said_and_changes_nothing(tmp_path):
    nets, kept = [], None
    for callbacks in ([], [CompressedGradients(ratio=0.1)]):
        torch.manual_seed(0)
        module = Plain()
        trainer = make_trainer(callbacks=callbacks)
        if callbacks:
            with pytest.warns(UserWarning, match="does nothing on one device"):
                trainer.fit(module, data())
            trainer.save_checkpoint(tmp_path / "plain.ckpt")
            kept = torch.load(tmp_path / "plain.ckpt", weights_only=False)["callbacks"]
        else:
            trainer.fit(module, data())
        nets.append(module.net.state_dict())
    assert all(torch.equal(value, nets[1][key]) for key, value in nets[0].items())
    assert "CompressedGradients" not in kept


def test_a_state_waits_in_the_checkpoint_while_one_device_trains(tmp_path):
    trainer = make_trainer(callbacks=[CompressedGradients()], max_epochs=1)
    trainer.fit(Plain(), data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=False)
    state = {"rule": "ef21", "ranks": 2, "tensors": {"net.0.weight": {"average": [torch.ones(2)]}}}
    checkpoint["callbacks"]["CompressedGradients"] = state
    torch.save(checkpoint, tmp_path / "b.ckpt")
    trainer = make_trainer(callbacks=[CompressedGradients()], max_epochs=2)
    trainer.fit(Plain(), data(), ckpt_path=tmp_path / "b.ckpt")
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    found = torch.load(tmp_path / "c.ckpt", weights_only=False)["callbacks"]["CompressedGradients"]
    assert torch.equal(found["tensors"]["net.0.weight"]["average"][0], torch.ones(2))


def test_other_strategies():
    refused("ModelParallelStrategy", strategy=ModelParallelStrategy())


def test_another_hook():
    refused("communication hook of its own", strategy=DDPStrategy(ddp_comm_hook=allreduce_hook))


def test_float16():
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    refused("loss scale", strategy="ddp", plugins=[scaler])
    refused("loss scale", module=Plain().half(), strategy="ddp")


def test_manual_optimization():
    refused("manual optimization", module=Manual(), strategy="ddp")


def test_what_exchanges_twice():
    refused("SAM exchanges gradients twice", callbacks=[SAM()], strategy="ddp")
    refused("GradientAdaptiveQAT exchanges gradients twice", callbacks=[GradientAdaptiveQAT(4, 8)], strategy="ddp")
    refused("is there already", callbacks=[CompressedGradients("ef14")], strategy="ddp")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rule": "ef22"}, "Did you mean 'ef21'"),
        ({"compressor": "top_k"}, "Did you mean 'topk'"),
        ({"rule": "ef14", "beta": 0.1}, "no parameter 'beta'"),
        ({"compressor": "scaled_sign", "ratio": 0.1}, "no parameter 'ratio'"),
        ({"min_numel": 0}, "min_numel"),
        ({"ratio": 2.0}, "ratio"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(LossplugError, match=match):
        CompressedGradients(**options)


def test_bad_local_updates():
    with pytest.raises(LossplugError, match="is biased"):
        LocalUpdates("scallion")
    with pytest.raises(LossplugError, match="no parameter 'alpha'"):
        LocalUpdates("scafcom", alpha=0.5)
    with pytest.raises(LossplugError, match="local_steps"):
        LocalUpdates(local_steps=0)
    callback = LocalUpdates()
    trainer = make_trainer(callbacks=[callback])
    trainer.strategy._optimizers = [torch.optim.SGD(Plain().parameters(), 0.1, momentum=0.9)]
    with pytest.raises(LossplugError, match="plain SGD"):
        callback._optimizer(trainer)
    trainer = make_trainer(callbacks=[callback], gradient_clip_val=1.0)
    trainer.strategy._optimizers = [torch.optim.SGD(Plain().parameters(), 0.1)]
    with pytest.raises(LossplugError, match="clipping"):
        callback._optimizer(trainer)


def test_everything_is_registered():
    kinds = {(entry.kind, entry.name) for entry in registry}
    names = ("identity", "topk", "block_topk", "randk", "scaled_sign", "natural", "qsgd", "lowrank")
    assert {("compressor", name) for name in names} <= kinds
    assert {("error_feedback", name) for name in ("none", "ef14", "econtrol", "ef21", "ef21_w", "ef21_sgdm")} <= kinds
    assert {("local_update", "scallion"), ("local_update", "scafcom")} <= kinds
    assert registry.create("callback", "CompressedGradients", rule="ef14").rule.name == "ef14"
