"""ImageClassifier on real, tiny timm models and the embedded digits."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations import DigitsData, ImageClassifier
from lightning_lossplug.integrations.schedule import warmup_cosine
from lightning_lossplug.integrations.vision import images_and_labels

VIT = {
    "model": "vit_tiny_patch16_224",
    "num_classes": 10,
    "in_chans": 1,
    "img_size": 16,
    "model_kwargs": {"depth": 1, "patch_size": 8, "embed_dim": 24, "num_heads": 2},
}


def trainer(folder, **options):
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "default_root_dir": folder,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "max_epochs": 1,
            "limit_train_batches": 4,
            "limit_val_batches": 2,
            "limit_test_batches": 2,
            **options,
        }
    )


@pytest.mark.parametrize(
    "options",
    [
        VIT,
        {"model": "test_resnet", "num_classes": 10, "in_chans": 1, "img_size": 16},
        {"model": "test_vit", "num_classes": 10, "in_chans": 1, "img_size": 16, "model_kwargs": {"patch_size": 8}},
    ],
    ids=["vit_tiny of one block", "resnet", "test_vit"],
)
def test_trains_validates_and_tests(tmp_path, options):
    module = ImageClassifier(**options, lr=1e-3)
    before = {name: value.clone() for name, value in module.model.named_parameters()}
    run = trainer(tmp_path)
    data = DigitsData(img_size=16, batch_size=16)
    run.fit(module, datamodule=data)
    assert {"train_loss", "val_loss", "val_accuracy", "val_calibration_error"} <= set(run.callback_metrics)
    assert any(not torch.equal(before[name], value) for name, value in module.model.named_parameters())
    results = run.test(module, datamodule=data, verbose=False)[0]
    assert set(results) == {"test_loss", "test_accuracy", "test_calibration_error"}
    assert run.lr_scheduler_configs == [] or run.lr_scheduler_configs[0].scheduler.get_last_lr()[0] == 0


def test_learns_digits(tmp_path):
    pl.seed_everything(0, verbose=False)
    module = ImageClassifier("test_resnet", num_classes=10, in_chans=1, lr=5e-3)
    run = trainer(tmp_path, limit_train_batches=1.0, limit_test_batches=1.0, limit_val_batches=0, max_epochs=2)
    data = DigitsData(img_size=16, batch_size=64)
    run.fit(module, datamodule=data)
    assert run.test(module, datamodule=data, verbose=False)[0]["test_accuracy"] > 0.6


def test_metrics_are_those_of_all_test_images(tmp_path):
    module = ImageClassifier(**VIT)
    data = DigitsData(img_size=16, batch_size=64)
    results = trainer(tmp_path, limit_test_batches=1.0).test(module, datamodule=data, verbose=False)[0]
    x, y = data.test_set.__getitems__(list(range(270)))
    with torch.no_grad():
        logits = module.eval()(x)
    assert results["test_loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert results["test_accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item(), abs=1e-6)


def test_checkpoint_loads_by_itself(tmp_path):
    module = ImageClassifier(**VIT, label_smoothing=0.1)
    run = trainer(tmp_path)
    run.fit(module, datamodule=DigitsData(img_size=16))
    run.save_checkpoint(tmp_path / "x.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert loaded.label_smoothing == 0.1
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_weight_decay_spares_vectors_and_rate_is_cosine(tmp_path):
    module = ImageClassifier(**VIT, lr=2e-3, weight_decay=0.1, warmup_fraction=0.5)
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    run = trainer(tmp_path, callbacks=[Rates()])
    run.fit(module, datamodule=DigitsData(img_size=16))
    assert rates == pytest.approx([2e-3 * warmup_cosine(step, 4, 0.5) for step in range(4)])
    decay = {id(p): group["weight_decay"] for group in run.optimizers[0].param_groups for p in group["params"]}
    for name, parameter in module.model.named_parameters():
        spared = parameter.ndim < 2 or name in ("pos_embed", "cls_token")
        assert decay[id(parameter)] == (0.0 if spared else 0.1), name


def test_warmup_cosine():
    factors = [warmup_cosine(step, 10, 0.2) for step in range(12)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[6] == pytest.approx(0.5)
    assert factors[10] == factors[11] == pytest.approx(0.0)
    assert warmup_cosine(0, 1, 0.0) == 1.0


@pytest.mark.parametrize(
    "batch",
    [(1, 2), [1, 2, 3], {"image": 1, "label": 2}, {"pixel_values": 1, "labels": 2}, {"x": 1, "y": 2, "other": 0}],
)
def test_batch_forms(batch):
    assert images_and_labels(batch) == (1, 2)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((1,), "the batch is 1 parts"),
        (torch.zeros(2), "the batch is Tensor"),
        ({"image": 1}, r"keys \['image'\]"),
    ],
)
def test_other_batch_forms(batch, message):
    with pytest.raises(LossplugError, match=message):
        images_and_labels(batch)


def test_predict_uses_the_test_split(tmp_path):
    out = trainer(tmp_path, limit_predict_batches=1).predict(ImageClassifier(**VIT), DigitsData(img_size=16))
    assert out[0].shape == (64, 10)


def test_works_with_a_loader_of_dicts(tmp_path):
    items = [{"image": torch.randn(1, 16, 16), "label": i % 10} for i in range(32)]
    run = trainer(tmp_path, limit_train_batches=2)
    run.fit(ImageClassifier(**VIT), DataLoader(items, batch_size=8))
    assert run.global_step == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vit_tiny_patch16_225"}, "no model 'vit_tiny_patch16_225'. Did you mean 'vit_tiny_patch16_224'"),
        ({**VIT, "optimizer": "adamww"}, "no optimizer 'adamww'. Did you mean 'adamw'"),
        ({"model": "test_resnet", "model_kwargs": {"depht": 1}}, "does not take these arguments.*'depht'"),
        ({**VIT, "model_kwargs": {"depht": 1}}, "does not take these arguments.*'depht'"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(LossplugError, match=message) as error:
        ImageClassifier(**options)
    assert "\n" not in str(error.value)


def test_pretrained_weights_out_of_reach(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LossplugError, match="test_resnet: the pretrained weights cannot be loaded") as error:
        ImageClassifier("test_resnet", pretrained=True)
    assert "\n" not in str(error.value)


def test_schedule_without_an_end(tmp_path):
    with pytest.raises(LossplugError, match="needs an end"):
        trainer(tmp_path, max_epochs=-1).fit(ImageClassifier(**VIT), datamodule=DigitsData(img_size=16))
    with pytest.raises(LossplugError, match="warmup_fraction is 2"):
        trainer(tmp_path).fit(ImageClassifier(**VIT, warmup_fraction=2.0), datamodule=DigitsData(img_size=16))
