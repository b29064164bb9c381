"""Swapped loss, N:M sparsity, QAT and online distillation in one run of an unedited module."""

import pytest
import timm
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lossplug.callbacks import QAT, ExactResume, NMSparsity, OnlineDistillation, SwapLoss
from lightning_lossplug.integrations import DigitsData, ImageClassifier
from lightning_lossplug.metrics import compliant_groups
from lightning_lossplug.surgery import plugged_layers

SMALL = {"patch_size": 2, "embed_dim": 32, "depth": 1, "num_heads": 2, "class_token": False, "global_pool": "avg"}
INPUT = {"num_classes": 10, "in_chans": 1, "img_size": 8}


def techniques():
    torch.manual_seed(1)
    teacher = timm.create_model("vit_tiny_patch16_224", **INPUT, **{**SMALL, "embed_dim": 64})
    return [
        SwapLoss("poly_loss"),
        NMSparsity(2, 4, "mdgf_linear", include=["*.mlp.*"], finetune_fraction=0.3, decay_end=0.6),
        QAT(8, 8),
        OnlineDistillation(teacher, "bdkd"),
    ]


def run(callbacks, folder, resume=None):
    seed_everything(0, verbose=False)
    module = ImageClassifier("vit_tiny_patch16_224", **INPUT, model_kwargs=SMALL)
    trainer = Trainer(
        max_steps=8,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[
            *callbacks,
            ExactResume(),
            ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}"),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=DigitsData(batch_size=64), ckpt_path=resume)
    return module


def equal(one, two):
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_order_of_the_list_and_an_interruption_change_no_bit(tmp_path):
    callbacks = techniques()
    straight = run(callbacks, tmp_path / "a")
    assert equal(straight, run(techniques()[::-1], tmp_path / "b"))
    assert equal(straight, run(techniques(), tmp_path / "a", resume=tmp_path / "a" / "step=4.ckpt"))
    named = dict(plugged_layers(straight))
    assert len(named) > 2
    folded = callbacks[1].technique.fold(straight)
    assert not list(plugged_layers(folded))
    weight = folded.get_submodule(next(name for name in named if ".mlp.fc1" in name)).weight
    met, groups = compliant_groups(weight, 2, 4, 1)
    assert met == groups
    rows = weight.detach()[:4]
    assert all(len(row.unique()) <= 256 for row in rows)  # 8 bits, a scale per tensor or row
    assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.2)
