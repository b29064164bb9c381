"""Teachers from checkpoints and exported folders, and the agreement with them."""

import pytest
import torch
from distillation_runs import Plain, data, network, samples, trainer
from torch.utils.data import DataLoader

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import Distillation, OnlineDistillation
from lightning_lossplug.integrations import ImageClassifier, artifact_teacher, checkpoint_teacher
from lightning_lossplug.integrations.artifact import export_artifact
from lightning_lossplug.metrics import TeacherAgreement

OPTIONS = {"model": "test_resnet", "num_classes": 4, "in_chans": 1}


def images():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 1, 32, 32, generator=g), torch.randint(4, (8,), generator=g)
    return DataLoader(list(zip(x, y, strict=True)), 4)


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_and_artifact(tmp_path):
    module = ImageClassifier(**OPTIONS)
    t = trainer()
    t.fit(module, images())
    t.save_checkpoint(tmp_path / "teacher.ckpt")
    export_artifact(module, tmp_path / "folder")
    want = module.model.eval().state_dict()
    for got in (checkpoint_teacher(str(tmp_path / "teacher.ckpt")), artifact_teacher(str(tmp_path / "folder"))):
        assert all(torch.equal(value, want[key]) for key, value in got.state_dict().items())
    callback = Distillation(f"checkpoint:{tmp_path / 'teacher.ckpt'}")
    trainer(callback).fit(ImageClassifier(**OPTIONS), images())
    assert callback.step == 2


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("checkpoint:/nowhere.ckpt", "there is no such checkpoint file"),
        ("artifact:/nowhere", "holds no lossplug.json"),
        ("hf:/nowhere/else", "no such folder"),
    ],
)
def test_missing_files_are_one_line(teacher, message):
    with pytest.raises(LossplugError, match=message) as error:
        Distillation(teacher)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("online", [False, True])
def test_agreement_is_logged_in_validation(online):
    module, frozen = Plain(), network(12, seed=5)
    kind = OnlineDistillation if online else Distillation
    callback = kind(frozen, agreement=True)
    t = trainer(callback)
    t.fit(module, data(), data())
    x, y = samples().tensors
    with torch.no_grad():
        ours, theirs = module.net.eval()(x).argmax(1), frozen.eval()(x).argmax(1)
    name = type(callback).__name__
    assert t.callback_metrics[f"{name}/val_agreement"] == (ours == theirs).float().mean()
    assert t.callback_metrics[f"{name}/val_teacher_accuracy"] == (theirs == y).float().mean()
    assert not module.net._forward_hooks


def test_agreement():
    metric = TeacherAgreement()
    student = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]])
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 9.0], [0.0, 2.0]])
    metric.update(student, teacher)
    assert metric.compute() == 0.5
    metric.update(student, teacher, torch.tensor([True, False, False, True]))
    assert metric.compute() == pytest.approx(4 / 6)
    with pytest.raises(LossplugError, match="same shape"):
        metric.update(student, teacher[:, :1])
