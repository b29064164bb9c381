"""NMSparsity with scores, and the recipes that end dense or learn masks alone, through the Trainer."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from callback_runs import OrderedLoader, Plain, assert_equal, data, make_trainer, state_of
from lightning.pytorch.plugins import MixedPrecision

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import NMSparsity, load_plugged
from lightning_lossplug.sparsity import nm_mask, wanda_scores
from lightning_lossplug.surgery import fold, latent, plugged_layers

CASES = {
    "wanda": {"recipe": "nm_ste", "score": "wanda", "score_ema": 0.5},
    "gradient": {"recipe": "nm_srste", "score": "gradient", "calibration_steps": 3},
    "oneshot": {"recipe": "nm_oneshot", "score": "wanda", "calibration_steps": 4},
    "tsrste": {"recipe": "nm_tsrste", "alpha": 0.01, "mask_update_every": 3},
    "maskllm": {"recipe": "nm_maskllm", "weight_reg": 1e-3, "prior_strength": 1.0},
}


class SeedPerStep(pl.Callback):
    """Gumbel noise as a function of the step, so that a resumed run draws the same."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop", [2, 9, 15])
def test_interrupted_and_resumed_equals_straight(case, stop, tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == stop and trainer.ckpt_path is None:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(ckpt_path=None):
        torch.manual_seed(0)
        module = Plain()
        callbacks = [NMSparsity(2, 4, **CASES[case]), Save(), SeedPerStep()]
        make_trainer(callbacks=callbacks).fit(module, OrderedLoader(), ckpt_path=ckpt_path)
        return state_of(module)

    assert_equal(run(), run(tmp_path / "a.ckpt"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("feature", ["accumulation", "bf16", "grad_scaler", "clipping"])
def test_trainer_features(case, feature, tmp_path):
    options = {
        "accumulation": {"accumulate_grad_batches": 2},
        "bf16": {"precision": "bf16-mixed"},
        "grad_scaler": {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]},
        "clipping": {"gradient_clip_val": 0.05},
    }[feature]
    module = Plain()
    trainer = make_trainer(callbacks=[NMSparsity(2, 4, **CASES[case])], **options)
    if case == "tsrste":
        with pytest.warns(UserWarning, match="folding gives a dense model"):
            trainer.fit(module, data(), data())
        return
    trainer.fit(module, data(), data())
    plain = fold(module)
    for i in (0, 3):
        assert torch.equal((plain.net[i].weight != 0).reshape(-1, 4).sum(1).unique(), torch.tensor([2]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert_equal(state_of(load_plugged(Plain(), tmp_path / "a.ckpt")), state_of(module))


def test_wanda_masks_are_those_of_the_inputs_seen():
    class Watch(pl.Callback):
        inputs = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.inputs.append(batch[0])

    module, sparse = Plain(), NMSparsity(2, 4, "nm_oneshot", ["net.0"], score="wanda", calibration_steps=3)
    trainer = make_trainer(max_steps=3, max_epochs=None, callbacks=[sparse, Watch()])
    trainer.fit(module, data())
    norm = torch.cat(Watch.inputs).square().mean(0).sqrt()
    layer = module.net[0]
    assert torch.equal(layer.weight_transforms["sparsity"].mask, nm_mask(layer.weight, 2, 4))
    seen = layer.weight_transforms["sparsity"].signals(latent(layer))["input_norm"][0]
    assert torch.allclose(seen, norm, rtol=1e-5)
    assert wanda_scores(latent(layer), seen).shape == (32, 16)


def test_calibrated_before_the_fit_the_first_step_is_sparse():
    class First(pl.Callback):
        zeros = None

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                self.zeros = float((pl_module.net[0].weight == 0).float().mean())

    module, first = Plain(), First()
    sparse = NMSparsity(2, 4, "nm_oneshot", score="wanda")
    sparse.technique.attach(module)
    sparse.technique.calibrate(module.net, data())
    make_trainer(max_epochs=1, callbacks=[sparse, first]).fit(module, data())
    assert first.zeros == 0.5


@pytest.mark.filterwarnings("ignore:.*ended before the final pattern")
def test_gradient_scores_do_not_depend_on_the_loss_scale():
    states = []
    for options in ({}, {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]}):
        torch.manual_seed(0)
        module = Plain()
        sparse = NMSparsity(2, 4, "nm_oneshot", ["net.0"], score="gradient", calibration_steps=50)
        make_trainer(max_epochs=1, callbacks=[sparse], **options).fit(module, data())
        states.append(module.net[0].weight_transforms["sparsity"].grad_square.clone())
    assert float(states[0].sum()) > 0
    assert torch.allclose(*states, rtol=0.05, atol=float(states[0].max()) * 1e-2)


def test_maskllm_moves_masks_and_no_weights():
    torch.manual_seed(0)
    module = Plain()
    before = {i: module.net[i].weight.detach().clone() for i in (0, 3)}
    start = {i: nm_mask(w, 2, 4) for i, w in before.items()}
    sparse = NMSparsity(2, 4, "nm_maskllm", prior_strength=0.5, kappa_range=[10.0, 50.0])
    trainer = make_trainer(max_epochs=6, callbacks=[sparse])
    trainer.fit(module, data())
    for i in (0, 3):
        assert torch.equal(latent(module.net[i]), before[i])
    module.eval()
    moved = sum(int((module.net[i].weight_transforms["sparsity"].mask != start[i]).sum()) for i in (0, 3))
    assert moved > 0
    x, y = next(iter(data()))
    assert torch.equal(fold(module).net(x), module.net(x))
    assert F.cross_entropy(module.net(x), y).isfinite()


def test_tsrste_folds_dense():
    module = Plain()
    with pytest.warns(UserWarning, match="ends dense"):
        make_trainer(callbacks=[NMSparsity(2, 4, "nm_tsrste")]).fit(module, data())
    for _, layer in plugged_layers(module):
        assert torch.equal(layer.weight, latent(layer))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NMSparsity(recipe="nm_ste", solver="greedy"), "has no parameter 'solver'"),
        (lambda: NMSparsity(recipe="nm_transposable", solver="best"), "solver is 'best'"),
        (lambda: NMSparsity(recipe="nm_maskllm", n=8, m=16), "patterns, allowed are 256"),
        (lambda: NMSparsity(score="wandb"), "unknown score 'wandb'"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(LossplugError, match=message):
        build()


def test_the_wrong_optimizer_stops_at_the_first_step():
    with pytest.raises(LossplugError, match="nm_ast needs the optimizer ASTAdamW, the weights are in AdamW"):
        make_trainer(callbacks=[NMSparsity(2, 4, "nm_ast")]).fit(Plain(), data())
