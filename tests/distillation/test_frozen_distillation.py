"""Distillation and SelfDistillation: frozen and averaged teachers in unedited modules."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from distillation_runs import Plain, data, network, same, samples, trainer
from test_online_distillation import LLAMA, llama, texts
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import Distillation, ExactResume, SelfDistillation, SwapLoss
from lightning_lossplug.distillation import create
from lightning_lossplug.integrations import CausalLM, timm_teacher
from lightning_lossplug.schedules import Linear
from lightning_lossplug.surgery import wrapped_methods

pytestmark = pytest.mark.filterwarnings("ignore")


class Recorder(pl.Callback):
    """Losses as the Trainer differentiates them."""

    def __init__(self):
        self.losses = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses.append(loss.detach().clone())


def teacher():
    made = network(12, seed=5)
    with torch.no_grad():
        made(samples().tensors[0])  # running statistics that are not the initial ones
    return made


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "logit_std", "mlkd", "ttm", "wttm", "jeffreys", "akl"])
def test_first_loss_and_frozen_teacher(name):
    module, frozen, recorder = Plain(), teacher(), Recorder()
    before = copy.deepcopy(frozen.state_dict())
    x, y = next(iter(data()))
    with torch.no_grad():
        z_s, z_t = copy.deepcopy(module.net)(x), copy.deepcopy(frozen).eval()(x)
        want = 0.5 * F.cross_entropy(z_s, y) + 2 * create(name)(z_s, z_t, y)
    trainer(Distillation(frozen, name, weight=2.0, ce_weight=0.5), recorder).fit(module, data())
    torch.testing.assert_close(recorder.losses[0], want)
    assert same(frozen.state_dict(), before)  # batch statistics too
    assert all(p.requires_grad and p.grad is None for p in frozen.parameters())  # given back as it came
    assert set(module.state_dict()) == set(Plain().state_dict())
    assert wrapped_methods(module) == ()
    assert not module.net._forward_hooks


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_weight_zero_changes_nothing_and_precisions_run(precision):
    plain = Plain(dropout=0.2)
    torch.manual_seed(0)
    trainer(precision=precision).fit(plain, data())
    module, frozen = Plain(dropout=0.2), teacher()
    torch.manual_seed(0)
    trainer(Distillation(frozen, weight=0.0), precision=precision).fit(module, data())
    assert same(module.state_dict(), plain.state_dict())


def test_weights_and_temperature_follow_schedules():
    seen = []

    class Watch(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append((float(callback.logs["weight"]), callback.loss.temperature))

    callback = Distillation(teacher(), weight={0.0: 0.0, 0.5: 1.0}, temperature=Linear(4.0, 2.0))
    trainer(callback, Watch()).fit(Plain(), data())
    assert seen == [(float(i >= 4), 4 - 2 * i / 8) for i in range(8)]


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"feature_loss": "fitnet", "layers": {"2": "2"}, "feature_weight": 10.0}, True),
        ({"feature_loss": "rkd", "layers": {"input:4": "input:4"}, "loss": None}, False),
        ({"loss": "dhkd", "parameters": {"head": "nonlinear"}}, True),
    ],
)
def test_features_and_second_heads_resume_bit_by_bit(options, trained, tmp_path):
    def run(save, ckpt_path=None):
        torch.manual_seed(3)
        module, callback = Plain("adamw", dropout=0.2), Distillation(teacher(), **options)

        class Saver(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if save and trainer.current_epoch == 0:
                    trainer.save_checkpoint(tmp_path / "middle.ckpt")

        torch.manual_seed(4)
        trainer(callback, ExactResume(), Saver(), max_epochs=2).fit(module, data(), ckpt_path=ckpt_path)
        return module, callback

    straight, resumed = run(True), run(False, tmp_path / "middle.ckpt")
    assert same(straight[0].state_dict(), resumed[0].state_dict())
    assert same(straight[1].trained.state_dict(), resumed[1].trained.state_dict())
    assert bool(list(straight[1].trained.parameters())) is trained
    assert (straight[1].aux is not None) is trained
    if trained:
        assert straight[1].aux.optimizer.param_groups[0]["lr"] == 0.5 * 1e-2  # follows the module's schedule
    assert set(torch.load(tmp_path / "middle.ckpt")["state_dict"]) == set(Plain().state_dict())


def test_the_second_head_leaves_the_first_to_the_task():
    module, recorder = Plain(), {}

    class Watch(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            recorder.setdefault("grad", pl_module.net[4].weight.grad.clone())

    twin = copy.deepcopy(module.net)
    x, y = next(iter(data()))
    F.cross_entropy(twin(x), y).backward()
    trainer(Distillation(teacher(), "dhkd"), Watch()).fit(module, data())
    torch.testing.assert_close(recorder["grad"], twin[4].weight.grad)


@pytest.mark.parametrize("window", [1, 2])
def test_an_averaged_student_is_the_teacher(window):
    module = Plain()
    average, states = copy.deepcopy(module.net), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            states.append(copy.deepcopy(pl_module.net.state_dict()))

    callback = SelfDistillation(decay=0.9)
    trainer(callback, Watch(), accumulate_grad_batches=window).fit(module, data())
    want = average.state_dict()
    for state in states[window - 1 :: window]:
        for key, value in state.items():
            want[key] = want[key].lerp(value, 1 - 0.9) if key.endswith(("weight", "bias")) else value
    for key, value in callback.teacher.state_dict().items():
        if "running" not in key:  # copied when the step is taken, before the batch ends
            torch.testing.assert_close(value, want[key])
    assert not callback.teacher.training
    assert not callback.teacher._forward_hooks
    assert set(module.state_dict()) == set(Plain().state_dict())


def test_an_averaged_teacher_resumes_bit_by_bit(tmp_path):
    def run(save, ckpt_path=None):
        module = Plain(dropout=0.2)
        callback = SelfDistillation(
            decay=0.9, weight=3.0, feature_loss="fitnet", feature_parameters={"always": True}, layers=["2"]
        )

        class Saver(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if save and trainer.current_epoch == 0:
                    trainer.save_checkpoint(tmp_path / "middle.ckpt")

        torch.manual_seed(4)
        trainer(callback, ExactResume(), Saver(), max_epochs=2).fit(module, data(), ckpt_path=ckpt_path)
        return module.state_dict(), callback.teacher.state_dict()

    straight, resumed = run(True), run(False, tmp_path / "middle.ckpt")
    assert same(straight[0], resumed[0])
    assert same(straight[1], resumed[1])


@pytest.mark.parametrize(("name", "vocabulary"), [("gkd", 32), ("distillm", 32), ("minillm", 32), ("uld", 40)])
def test_language_models(name, vocabulary):
    torch.manual_seed(0)
    module, frozen = CausalLM(from_config=LLAMA), llama(vocab=vocabulary)
    batch = next(iter(texts()))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    keep = mask[:, 1:].bool()
    with torch.no_grad():
        z_s = module.model(ids, attention_mask=mask).logits[:, :-1]
        z_t = frozen.eval()(ids, attention_mask=mask).logits[:, :-1]
        want = create(name)(z_s, z_t, mask=keep)
    callback = Distillation(frozen, name)
    trainer(callback, max_steps=1).fit(module, texts())
    torch.testing.assert_close(callback.logs["kd"], want)


def test_hidden_states_of_language_models_with_a_fused_loss():
    torch.manual_seed(0)
    module, frozen = CausalLM(from_config={**LLAMA, "hidden_size": 16}), llama(2)
    layers = {"model.layers.0": "model.layers.1"}
    callback = Distillation(frozen, "gkd", feature_loss="hidden_cosine", layers=layers)
    trainer(callback, SwapLoss("poly_loss", fused=True), max_steps=2).fit(module, texts())
    assert callback.logs["features"] > 0
    assert callback.step == 2


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("kd", {"temperature": 2.0}), ("gkd", {"beta": 0.3}), ("gkd", {"beta": 1.0}), ("minillm", {})],
)
def test_a_fused_loss_trains_the_same_without_logits(name, parameters):
    def run(fused):
        torch.manual_seed(0)
        module, frozen, recorder = CausalLM(from_config=LLAMA), llama(2), Recorder()
        calls = []
        frozen.lm_head.register_forward_hook(lambda *a: calls.append(1))
        swap = [SwapLoss("cross_entropy", fused=True)] if fused else []
        callback = Distillation(frozen, name, parameters, fused=fused)
        trainer(callback, recorder, *swap, max_epochs=2).fit(module, texts())
        return torch.stack(recorder.losses), module.state_dict(), calls

    (plain, weights, asked), (fused, twin, never) = run(False), run(True)
    assert asked
    assert not never  # the teacher's head never ran
    torch.testing.assert_close(fused, plain)
    for key, value in weights.items():
        torch.testing.assert_close(twin[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("part", "message"), [("lm_head", "output embeddings"), ("model.layers.0.mlp", "hidden")])
def test_a_fused_loss_refuses_nan(part, message):
    frozen = llama(2)
    nn.init.constant_(next(frozen.get_submodule(part).parameters()), float("nan"))
    with pytest.raises(LossplugError, match=f"the {message}.* of .*LlamaForCausalLM hold NaN. Check its weights"):
        trainer(Distillation(frozen, "gkd", fused=True)).fit(CausalLM(from_config=LLAMA), texts())


class Stubborn(nn.Sequential):
    """Can't be put in eval mode."""

    def train(self, mode=True):
        return super().train(True)


def broken():
    made = network(seed=5)
    nn.init.constant_(made[-1].bias, float("nan"))
    return made


def constant():
    made = network(seed=5)
    nn.init.zeros_(made[-1].weight)
    return made


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distillation(network(classes=7)), "has 4 outputs, the teacher .Sequential. 7"),
        (lambda: Distillation(constant()), "the same for every sample"),
        (lambda: Distillation(Stubborn(*network())), "stays in training mode after eval"),
        (lambda: Distillation(teacher(), None, feature_loss="rkd", layers={"3": "nope"}), "no sub-module 'nope'"),
        (lambda: Distillation(teacher(), None, feature_loss="rkd", layers={"nope": "3"}), "no sub-module 'nope'"),
        (lambda: Distillation(teacher(), "dkd", targets=lambda batch: None), "needs class indices"),
        (lambda: Distillation(teacher(), "bdkd"), "Use OnlineDistillation"),
        (lambda: Distillation(teacher(), "at"), "Give it as feature_loss"),
        (lambda: Distillation(teacher(), feature_loss="kd", layers={"0": "0"}), "no loss of features"),
        (lambda: Distillation(teacher(), feature_loss="at"), "go together"),
        (lambda: Distillation(teacher(), None), "neither"),
        (lambda: Distillation(teacher(), "ttm", temperature=2.0), "no temperature"),
        (lambda: Distillation(teacher(), "kd", {"temperature": 0.0}), "temperature is 0.0"),
        (lambda: Distillation(teacher(), "kd", temperature=-1.0), "temperature is -1.0"),
        (lambda: Distillation(broken()), "the logits of the teacher Sequential hold NaN"),
        (lambda: Distillation(teacher(), teacher_kwargs={"a": 1}), "given by name"),
        (lambda: Distillation(teacher(), "dkd", fused=True), "DKD has no fused form"),
        (lambda: Distillation(teacher(), "kd", fused=True), "has no output embedding"),
        (lambda: SelfDistillation(decay=1.5), "decay is 1.5"),
        (lambda: Distillation(teacher(), weight=-1.0), r"weight is -1.0, allowed is \[0, inf"),
        (lambda: Distillation(teacher(), ce_weight={0.0: 1.0, 0.5: -0.1}), "ce_weight is -0.1"),
        (
            lambda: Distillation(teacher(), feature_loss="rkd", layers={"3": "3"}, feature_weight=-2),
            "feature_weight is -2",
        ),
        (
            lambda: Distillation(broken(), None, feature_loss="rkd", layers={"4": "4"}),
            "the features '4' of the teacher Sequential hold NaN",
        ),
        (lambda: Distillation(teacher(), "kd", temperature={0.0: 2.0, 0.5: 0.0}), "temperature is 0.0"),
    ],
)
def test_mistakes_are_one_line(make, message):
    module = Plain()
    with pytest.raises(LossplugError, match=message) as error:
        trainer(make()).fit(module, data())
    assert "\n" not in str(error.value)
    assert wrapped_methods(module) == ()
    assert not module.net._forward_hooks


class Idle(nn.Module):
    """Has a layer it never calls."""

    def __init__(self):
        super().__init__()
        self.inner, self.unused = network(), nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("layers", [{"unused": "3"}, {"2": "unused"}])
def test_a_hook_that_never_fires_is_an_error(layers):
    module, frozen = Plain(), teacher()
    if "unused" in layers:
        module.net = Idle()
    else:
        frozen = Idle()
    with pytest.raises(LossplugError, match=r"'unused' .Linear. was never called in the step"):
        trainer(Distillation(frozen, None, feature_loss="rkd", layers=layers)).fit(module, data())


def test_features_changed_in_place_are_an_error():
    class InPlace(Plain):
        def __init__(self):
            super().__init__()
            self.net[2] = nn.ReLU(inplace=True)

    with pytest.raises(LossplugError, match="'1' was changed in place"):
        trainer(Distillation(teacher(), None, feature_loss="fitnet", layers={"1": "1"})).fit(InPlace(), data())


def test_another_teacher_on_resume_is_an_error(tmp_path):
    path = tmp_path / "one.ckpt"
    first = trainer(Distillation(teacher()))
    first.fit(Plain(), data())
    first.save_checkpoint(path)
    with pytest.raises(LossplugError, match=r"started with the teacher Sequential 184 \w+, this one is"):
        trainer(Distillation(network(12, seed=6)), max_epochs=2).fit(Plain(), data(), ckpt_path=path)


def test_a_named_teacher_draws_no_random_numbers():
    torch.manual_seed(0)
    want = torch.rand(2)
    torch.manual_seed(0)
    options = {"num_classes": 4, "in_chans": 1, "pretrained": False}
    callback = Distillation("timm:test_resnet", teacher_kwargs=options)
    assert torch.equal(torch.rand(2), want)
    assert type(callback.teacher) is type(timm_teacher("test_resnet", **options))
