"""NMSparsity through the Trainer: every recipe, every Trainer feature, exact resume, clean teardown."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from callback_runs import Manual, OrderedLoader, Plain, assert_equal, data, make_trainer, state_of
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_lossplug import LossplugError, registry
from lightning_lossplug.callbacks import NMSparsity, SwapLoss, load_dense, load_plugged
from lightning_lossplug.sparsity import ASTAdamW, STEPAdamW, nm_mask
from lightning_lossplug.surgery import PluggedLayer, fold, latent, plugged_layers, wrapped_methods

# Every registered recipe that ends sparse with trained weights has to be here; the two others have a file of their own.
RECIPES = {
    "nm_oneshot": {},
    "nm_ste": {},
    "nm_srste": {"lambda_w": 0.01},
    "mdgf_linear": {},
    "mdgf_exponential": {},
    "sdgf_stepwise": {},
    "sdgf_geometric": {"k": 2},
    "nm_sste": {},
    "nm_cast": {"mask_update_every": 3},
    "nm_transposable": {"mask_update_every": 5},
    "nm_bimask": {"permute_every": 4, "num_candidates": 5},
    "nm_step": {},
    "nm_ast": {"lambda_w": 0.01, "increase_step": 5, "mask_update_every": 3},
}

OPTIMIZERS = {
    "nm_step": lambda p: STEPAdamW(p, lr=1e-2, weight_decay=0.1, t_max=5),
    "nm_ast": lambda p: ASTAdamW(p, lr=1e-2, weight_decay=0.1),
}


class WithOptimizer(Plain):
    """The module for a recipe, with the optimizer it asks for."""

    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe

    def configure_optimizers(self):
        build = OPTIMIZERS.get(self.recipe)
        return build(self.parameters()) if build else super().configure_optimizers()


def callback(recipe, **options):
    return NMSparsity(2, 8, recipe, **(RECIPES[recipe] | options))


def assert_pattern(module, n=2, m=8):
    layers = list(plugged_layers(module))
    assert layers
    for name, layer in layers:
        kept = (layer.weight != 0).reshape(-1, m).sum(1)
        assert int(kept.max()) <= n, name


def test_the_table_is_complete():
    assert {*RECIPES, "nm_tsrste", "nm_maskllm"} == {e.name for e in registry if e.kind == "recipe"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_ends_with_the_exact_pattern_and_leaves_no_patch(recipe):
    module, technique = WithOptimizer(recipe), callback(recipe)
    trainer = make_trainer(callbacks=[technique])
    trainer.fit(module, data(), data())
    assert_pattern(module)
    assert wrapped_methods(module) == ()
    assert not technique._handles
    for name in ("training_step", "configure_model", "optimizer_step"):
        assert name not in vars(module)
    sparse = trainer.test(module, data(), verbose=False)[0]["val_loss"]
    plain = fold(module)
    assert not list(plugged_layers(plain))
    assert make_trainer().test(plain, data(), verbose=False)[0]["val_loss"] == pytest.approx(sparse)
    assert isinstance(module.net[0], PluggedLayer)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stop", [3, 8, 13])
def test_interrupted_and_resumed_equals_straight(recipe, stop, tmp_path):
    class Record(pl.Callback):
        def __init__(self):
            self.logs = {}

        def on_train_batch_end(self, trainer, *args):
            logged = trainer.callback_metrics
            self.logs[trainer.global_step] = {k: float(v) for k, v in logged.items() if k.startswith("NMSparsity")}
            if trainer.global_step == stop and trainer.ckpt_path is None:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(ckpt_path=None):
        torch.manual_seed(0)
        module, record = WithOptimizer(recipe), Record()
        trainer = make_trainer(max_epochs=2, callbacks=[callback(recipe), record], log_every_n_steps=1)
        trainer.fit(module, OrderedLoader(), ckpt_path=ckpt_path)
        return state_of(module), record.logs

    straight, logs = run()
    resumed, later = run(tmp_path / "a.ckpt")
    assert_equal(straight, resumed)
    assert later
    for step, values in later.items():
        assert logs[step] == values


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"precision": "bf16-mixed"},
        {"plugins": "scaler"},
        {"callbacks": "ema"},
        {"callbacks": "ema_no_buffers"},
        {"callbacks": "swa"},
    ],
    ids=["accumulation", "clipping", "bf16", "grad_scaler", "ema", "ema_without_buffers", "swa"],
)
def test_trainer_features(recipe, options):
    options = dict(options)
    if options.get("plugins") == "scaler":
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]
    extra = options.pop("callbacks", None)
    callbacks = [callback(recipe)]
    if extra == "swa":
        callbacks.append(StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2))
    elif extra:
        callbacks.append(EMAWeightAveraging(decay=0.8, use_buffers=extra == "ema"))
    module = WithOptimizer(recipe)
    trainer = make_trainer(max_epochs=4, callbacks=callbacks, **options)
    trainer.fit(module, data(), data())
    assert_pattern(module)
    assert wrapped_methods(module) == ()
    if extra in ("ema", "ema_no_buffers"):
        assert wrapped_methods(callbacks[1]._average_model) == ()


def test_srste_equals_a_hand_written_loop():
    torch.manual_seed(1)
    module = Plain()
    twin = copy.deepcopy(module.net)
    make_trainer(max_epochs=1, callbacks=[NMSparsity(2, 4, "nm_srste", lambda_w=0.1)]).fit(module, data())
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    for x, y in data():
        dense = {i: twin[i].weight.detach().clone() for i in (0, 3)}
        masks = {i: nm_mask(dense[i], 2, 4) for i in dense}
        with torch.no_grad():
            for i in dense:
                twin[i].weight.mul_(masks[i])
        optimizer.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        with torch.no_grad():
            for i in dense:
                twin[i].weight.copy_(dense[i])
                twin[i].weight.grad += 0.1 * (~masks[i]) * dense[i]
        optimizer.step()
    for i in (0, 3, 4):
        assert torch.allclose(latent(module.net[i]), twin[i].weight, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_oneshot_keeps_pruned_entries_and_their_moments_at_zero(optimizer):
    class Module(Plain):
        def configure_optimizers(self):
            if optimizer == "sgd":
                return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
            return super().configure_optimizers()

    module = Module()
    trainer = make_trainer(callbacks=[NMSparsity(2, 4, "nm_oneshot")])
    trainer.fit(module, data())
    for _, layer in plugged_layers(module):
        mask = layer.weight_transforms["sparsity"].mask
        assert mask.float().mean() == 0.5
        assert latent(layer)[~mask].abs().max() == 0
        for value in trainer.optimizers[0].state[latent(layer)].values():
            if torch.is_tensor(value) and value.shape == mask.shape:
                assert value[~mask].abs().max() == 0


def test_skipped_scaler_steps_do_not_tick():
    class Overflows(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 else loss

    technique = callback("nm_ste")
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    trainer = make_trainer(max_epochs=1, callbacks=[technique], plugins=[plugin])
    trainer.fit(Overflows(), data())
    assert trainer.global_step == 8
    assert technique.step == 7


def test_layers_made_in_configure_model():
    class Late(Plain):
        def __init__(self):
            super().__init__()
            del self.net

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    module = Late()
    make_trainer(callbacks=[callback("nm_srste")]).fit(module, data())
    assert_pattern(module)
    assert "configure_model" not in vars(module)


def test_compiled_inner_model():
    module, twin = Plain(), Plain()
    twin.load_state_dict(module.state_dict())
    module.net.compile(backend="aot_eager")
    make_trainer(callbacks=[callback("mdgf_linear")]).fit(module, data())
    make_trainer(callbacks=[callback("mdgf_linear")]).fit(twin, data())
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_fit_after_fit_starts_the_schedule_anew_and_the_same_trainer_goes_on():
    module, technique = Plain(), callback("mdgf_linear")
    make_trainer(callbacks=[technique]).fit(module, data())
    trainer = make_trainer(callbacks=[technique])
    trainer.fit(module, data())
    assert technique.step == 16
    assert_pattern(module)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data())
    assert technique.step == 24
    assert_pattern(module)


def test_an_exception_leaves_no_patch_and_a_later_fit_works():
    class Fails(Plain):
        fail = True

        def training_step(self, batch, batch_idx):
            if self.fail and batch_idx == 3:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    module, technique = Fails(), callback("nm_srste")
    with pytest.raises(RuntimeError, match="boom"):
        make_trainer(callbacks=[technique]).fit(module, data())
    assert wrapped_methods(module) == ()
    assert not technique._handles
    module.fail = False
    make_trainer(callbacks=[technique]).fit(module, data())
    assert_pattern(module)


def test_dense_and_plugged_checkpoints_load_into_each_other(tmp_path):
    dense = Plain()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(dense, data())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")

    module = Plain()
    trainer = make_trainer(max_epochs=3, callbacks=[callback("nm_srste")])
    trainer.fit(module, data(), ckpt_path=tmp_path / "dense.ckpt")  # strict, no conversion
    assert_pattern(module)
    trainer.save_checkpoint(tmp_path / "plugged.ckpt")

    plain = load_dense(Plain(), tmp_path / "plugged.ckpt")
    for i in (0, 3, 4):
        assert torch.equal(plain.net[i].weight, latent(module.net[i]))
    plugged = load_plugged(Plain(), tmp_path / "plugged.ckpt")
    assert_equal(state_of(plugged), state_of(module))
    x = next(iter(data()))[0]
    assert torch.equal(fold(plugged).net(x), module.net(x))
    make_trainer(callbacks=[callback("nm_srste")]).validate(Plain(), data(), ckpt_path=tmp_path / "plugged.ckpt")


def test_mixed_patterns_per_layer():
    module = Plain()
    make_trainer(callbacks=[NMSparsity(include={"net.0": "2:4", "net.3": "1:8"})]).fit(module, data())
    assert_pattern(module.net[0], 2, 4)
    assert_pattern(module.net[3], 1, 8)
    assert not isinstance(module.net[4], PluggedLayer)


def test_two_callbacks_on_different_layers_and_a_swapped_loss_in_any_order(tmp_path):
    def callbacks():
        return [
            NMSparsity(2, 4, include=["net.0"]),
            NMSparsity(1, 8, "mdgf_linear", include=["net.3"]),
            SwapLoss("focal"),
        ]

    states = []
    for order in ((0, 1, 2), (2, 1, 0)):
        torch.manual_seed(0)
        module, made = Plain(), callbacks()
        trainer = make_trainer(callbacks=[made[i] for i in order])
        trainer.fit(module, data())
        trainer.save_checkpoint(tmp_path / "both.ckpt")
        states.append(state_of(module))
    assert_equal(*states)
    assert_equal(state_of(load_plugged(Plain(), tmp_path / "both.ckpt")), states[1])


def test_manual_optimization_is_refused_only_where_the_length_matters():
    with pytest.raises(LossplugError, match="training length is unknown"):
        make_trainer(callbacks=[callback("mdgf_linear")]).fit(Manual(), data())
    for options in ({"recipe": "nm_srste"}, {"recipe": "mdgf_linear", "total_steps": 16}):
        module = Manual()
        make_trainer(callbacks=[callback(**options)]).fit(module, data())
        assert_pattern(module)


def test_a_run_shorter_than_the_schedule_warns_and_is_not_folded():
    module = Plain()
    with pytest.warns(UserWarning, match="ended before the final pattern on 2 layers"):
        make_trainer(callbacks=[callback("mdgf_linear", total_steps=100)]).fit(module, data())
    with pytest.raises(LossplugError, match=r"net\.0\.weight: the pruned weights are still multiplied by"):
        fold(module)


def test_ema_before_the_callback_is_refused():
    with pytest.raises(LossplugError, match="Put NMSparsity before EMAWeightAveraging"):
        make_trainer(callbacks=[EMAWeightAveraging(), callback("nm_ste")]).fit(Plain(), data())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NMSparsity(recipe="nm_srst"), "unknown recipe 'nm_srst'.*Did you mean 'nm_srste'"),
        (lambda: NMSparsity(5, 4), "n"),
        (lambda: NMSparsity(0, 4), "n"),
        (lambda: NMSparsity(2, 4, "nm_ste", lambda_w=0.1), "has no parameter 'lambda_w'"),
        (lambda: NMSparsity(2, 4, lambda_w=-1.0), "lambda_w"),
        (lambda: NMSparsity(3, 8, "sdgf_stepwise"), "power of two"),
        (lambda: NMSparsity(include={"net.0": "2-4"}), "'2-4' is no N:M pattern"),
        (lambda: NMSparsity(include="*.mlp.*"), r"include is the text .*Write a list: include=\['\*\.mlp\.\*'\]"),
        (lambda: NMSparsity(exclude="head"), "exclude is the text 'head'"),
        (lambda: NMSparsity(mask_update_every=2.5), r"mask_update_every is 2\.5"),
        (lambda: NMSparsity(indivisible="warn"), "indivisible is 'warn'"),
        (lambda: NMSparsity(2, 4, "mdgf_linear", dense_fraction=0.6, finetune_fraction=0.5), "dense_fraction"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(LossplugError, match=message):
        build()


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (lambda: [NMSparsity(2, 5)], r"net\.0: M = 5 does not divide the reduction axis of 16.*exclude.*skip"),
        (lambda: [NMSparsity(include=["*.attn.*"])], r"'\*\.attn\.\*' matches no layer"),
        (lambda: [NMSparsity(2, 5, indivisible="skip")], "no layer selected"),
        (lambda: [NMSparsity(include=[])], "no layer selected.*not in include"),
        (lambda: [NMSparsity(), NMSparsity(1, 4)], "two techniques want the sparsity stage|state_key"),
    ],
)
def test_bad_runs_stop_before_training_and_lose_nothing(technique, message):
    module = Plain()
    before = state_of(module)
    with pytest.raises((LossplugError, RuntimeError), match=message):
        make_trainer(callbacks=technique()).fit(module, data())
    after = {k: v for k, v in state_of(module).items() if "transforms" not in k}
    assert_equal(before, after)


def test_non_finite_weights_are_named():
    module = Plain()
    with torch.no_grad():
        module.net[3].weight[0, 0] = float("nan")
    with pytest.raises(LossplugError, match=r"net\.3: 1 of the 1024 entries of the weight are NaN or infinite"):
        make_trainer(callbacks=[callback("nm_ste")]).fit(module, data())


def test_frozen_layers_are_refused():
    module = Plain()
    module.net.requires_grad_(False)
    module.net[4].requires_grad_(True)

    def optimizers():
        return torch.optim.SGD(module.net[4].parameters(), 0.1)

    module.configure_optimizers = optimizers
    with pytest.raises(LossplugError, match="no optimizer holds a selected weight"):
        make_trainer(callbacks=[callback("nm_ste")]).fit(module, data())
