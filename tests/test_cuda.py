"""What differs on CUDA: masks equal the CPU's, real gradient scaling, fused optimizers, exact resume."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_lossplug.callbacks import ExactResume, NMSparsity, SwapLoss
from lightning_lossplug.integrations import ResumableLoader
from lightning_lossplug.losses import ClassificationLoss, create
from lightning_lossplug.registry import registry
from lightning_lossplug.sparsity import nm_mask
from lightning_lossplug.surgery import latent, plugged_layers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Net(pl.LightningModule):
    def __init__(self, fused=False):
        super().__init__()
        self.fused = fused
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.Linear(64, 8))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2, fused=self.fused)


def loader():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 32, generator=generator)
    return ResumableLoader(torch.utils.data.TensorDataset(x, (x[:, :8]).argmax(1)), 16, seed=1)


def trainer(**options):
    defaults = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(**(defaults | {"enable_model_summary": False, "accelerator": "gpu", "devices": 1} | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (1, 16), (3, 12), (8, 16), (1, 32), (16, 128), (31, 32)])
def test_masks_equal_those_of_the_cpu_ties_included(pattern, dtype):
    for shape, dim in (((64, 384), "in"), ((384, 20), 0), ((8, 384, 3, 3), "in")):
        weight = torch.randn(shape).mul(2).round().to(dtype)  # many ties
        assert torch.equal(nm_mask(weight.cuda(), *pattern, dim=dim).cpu(), nm_mask(weight, *pattern, dim=dim))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("recipe", ["nm_oneshot", "nm_srste", "mdgf_exponential", "sdgf_geometric"])
def test_precisions(recipe, precision):
    torch.manual_seed(0)
    module = Net()
    trainer(precision=precision, callbacks=[SwapLoss("focal"), NMSparsity(2, 8, recipe)]).fit(module, loader())
    for _, layer in plugged_layers(module):
        assert int((layer.weight != 0).reshape(-1, 8).sum(1).max()) <= 2


@pytest.mark.parametrize("decoupled", [False, True])
def test_the_penalty_is_the_same_under_a_fused_optimizer_that_unscales_by_itself(decoupled):
    torch.manual_seed(0)
    plain = Net()
    plain.net[2].p = 0.0
    fused = copy.deepcopy(plain)
    fused.fused = True
    for module in (plain, fused):
        technique = NMSparsity(2, 4, "nm_srste", lambda_w=0.1, decoupled=decoupled)
        trainer(max_epochs=1, precision="16-mixed", callbacks=[technique]).fit(module, loader())
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-3), (a - b).abs().max()


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_resumed_equals_straight(precision, tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 11 and trainer.ckpt_path is None:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(ckpt_path=None):
        torch.manual_seed(0)
        module = Net()
        callbacks = [SwapLoss("poly_loss"), NMSparsity(1, 4, "mdgf_linear"), Save(), ExactResume()]
        trainer(precision=precision, callbacks=callbacks).fit(module, loader(), ckpt_path=ckpt_path)
        return module.state_dict()

    straight, resumed = run(), run(tmp_path / "a.ckpt")
    for key in straight:
        assert torch.equal(straight[key], resumed[key]), key


def test_classification_losses_agree_with_the_cpu():
    z, y = torch.randn(16, 10, dtype=torch.float64), torch.randint(0, 10, (16,))
    checked = 0
    for entry in registry:
        if entry.kind != "loss" or entry.signature != "logits_index" or entry.facts.get("stateful"):
            continue
        loss = create(entry.name)
        if not isinstance(loss, ClassificationLoss) or type(loss).row_inputs:
            continue
        got = copy.deepcopy(loss).cuda()(z.cuda(), y.cuda())
        assert torch.allclose(got.cpu().double(), loss(z, y).double(), rtol=1e-6), entry.name
        checked += 1
    assert checked > 12


def test_latent_weights_follow_the_device():
    module = Net()
    trainer(max_steps=1, callbacks=[NMSparsity(2, 4)]).fit(module, loader())
    for _, layer in plugged_layers(module):
        assert latent(layer).device == layer.weight_transforms["sparsity"].mask.device
