"""OnlineDistillation in unedited modules: equal to a hand-written loop, resumable, invisible to the module."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from distillation_runs import CLASSES, Plain, Split, data, network, same, samples, trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import ExactResume, OnlineDistillation, SwapLoss
from lightning_lossplug.distillation import create
from lightning_lossplug.integrations import CausalLM, ImageClassifier
from lightning_lossplug.schedules import Linear
from lightning_lossplug.surgery import wrapped_methods

pytestmark = pytest.mark.filterwarnings("ignore")


def by_hand(method, epochs=1, window=1, clip=None, scale=None, **parameters):
    """Two networks, two optimizers, one loop: what the callback has to give, bit by bit."""
    student, teacher, loss = Plain().net, network(seed=5), create(method, **parameters)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3) for n in (student, teacher)]
    batches = list(data())
    for _ in range(epochs):
        for i, (x, y) in enumerate(batches):
            z_s = student(x)
            task = F.cross_entropy(z_s, y)
            z_t = teacher(x)
            terms = loss(z_s, z_t, y)
            total = 1.0 * terms.student
            total = total + 1.0 * F.cross_entropy(z_t, y) * (1.0 if terms.learn is None else terms.learn.float())
            total = (task + (total + 1.0 * terms.teachers[0])) / window
            if i % window == 0:
                for optimizer in optimizers:
                    optimizer.zero_grad()
            (total if scale is None else scale.scale(total)).backward()
            if (i + 1) % window:
                continue
            for network_, optimizer in zip((teacher, student), optimizers[::-1], strict=True):
                if network_ is teacher and terms.learn is not None and not terms.learn:
                    continue
                if scale is not None:
                    scale.unscale_(optimizer)
                if clip is not None:
                    nn.utils.clip_grad_norm_(network_.parameters(), clip)
                optimizer.step() if scale is None else scale.step(optimizer)
            if scale is not None:
                scale.update()
    return student.state_dict(), teacher.state_dict()


@pytest.mark.parametrize(
    ("method", "window", "clip", "parameters"),
    [
        ("bdkd", 1, None, {}),
        ("bdkd", 2, 0.05, {"delta": 3.0, "temperature": 2.0}),
        ("dml", 4, None, {}),
        ("kdcl", 1, 0.05, {}),
        ("switokd", 1, None, {}),
    ],
)
@pytest.mark.parametrize("as_dict", [False, True])
def test_equals_a_hand_written_loop_bit_by_bit(method, window, clip, parameters, as_dict):
    callback = OnlineDistillation(network(seed=5), method, parameters)
    module = Plain(as_dict=as_dict)
    trainer(callback, max_epochs=2, accumulate_grad_batches=window, gradient_clip_val=clip).fit(module, data())
    student, teacher = by_hand(method, 2, window, clip, **parameters)
    assert same(module.net.state_dict(), student)
    assert same(callback.teachers[0].state_dict(), teacher)
    assert callback.teachers[0].training
    assert wrapped_methods(module) == ()
    assert not module.net._forward_hooks
    assert set(module.state_dict()) == set(Plain().state_dict())


def test_gradient_scaler_steps_both_networks():
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    callback, module = OnlineDistillation(network(seed=5)), Plain()
    trainer(callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], gradient_clip_val=0.1).fit(module, data())
    student, teacher = by_hand("bdkd", clip=0.1, scale=torch.amp.GradScaler("cpu", init_scale=64.0))
    for got, want in ((module.net.state_dict(), student), (callback.teachers[0].state_dict(), teacher)):
        for key, value in got.items():
            torch.testing.assert_close(value, want[key], rtol=2e-2, atol=2e-2)  # the loop by hand is in float32
    assert callback.step == 8


class Spike(Plain):
    """The third batch overflows."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 2 else loss


def test_skipped_steps_of_a_scaler_are_not_counted():
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    callback, module = OnlineDistillation(network(seed=5)), Spike()
    trainer(callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(module, data())
    assert callback.step == 7
    assert all(p.isfinite().all() for p in [*module.parameters(), *callback.teachers.parameters()])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weight_zero_changes_nothing(precision):
    plain = Plain()
    trainer(max_epochs=2, precision=precision).fit(plain, data())
    module = Plain()
    callback = OnlineDistillation(network(seed=5), weight=0.0)
    trainer(callback, max_epochs=2, precision=precision).fit(module, data())
    assert same(module.state_dict(), plain.state_dict())
    before = network(seed=5).state_dict()
    assert not same(callback.teachers[0].state_dict(), before)  # its own task loss goes on


@pytest.mark.parametrize(("method", "optimizer"), [("bdkd", "adamw"), ("switokd", "sgd"), ("dml", "sgd")])
def test_resumed_equals_straight_bit_by_bit(method, optimizer, tmp_path):
    def run(epochs, ckpt_path=None):
        torch.manual_seed(3)
        callback = OnlineDistillation(network(seed=5, dropout=0.3), method, weight=Linear(0.0, 1.0))
        module = Plain(optimizer, dropout=0.2)
        torch.manual_seed(4)
        t = trainer(callback, ExactResume(), max_epochs=2, accumulate_grad_batches=2)
        t.fit_loop.epoch_progress  # noqa: B018
        t.limit_train_batches = 1.0
        saver = Saver(tmp_path / "middle.ckpt", epochs)
        t.callbacks.append(saver)
        t.fit(module, data(), ckpt_path=ckpt_path)
        return module, callback

    class Saver(pl.Callback):
        def __init__(self, path, epoch):
            self.path, self.epoch = path, epoch

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch + 1 == self.epoch:
                trainer.save_checkpoint(self.path)

    straight = run(1)
    resumed = run(99, tmp_path / "middle.ckpt")
    for a, b in zip(straight, resumed, strict=True):
        ours, theirs = (
            x.state_dict() if isinstance(x, pl.LightningModule) else x.teachers.state_dict() for x in (a, b)
        )
        assert same(ours, theirs)
    assert straight[1].step == resumed[1].step == 8
    for mine, other in zip(
        *(r[1].aux.optimizer.state_dict()["state"].values() for r in (straight, resumed)), strict=True
    ):
        for key, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key]))


def test_gradients_of_an_unfinished_window_are_in_the_checkpoint():
    callback, module = OnlineDistillation(network(seed=5)), Plain()
    found = {}

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx in (2, 3):
                found[batch_idx] = trainer._checkpoint_connector.dump_checkpoint()

    trainer(callback, Save(), accumulate_grad_batches=2).fit(module, data())
    open_, closed = (found[i]["callbacks"][callback.state_key] for i in (2, 3))
    assert "gradients" not in closed
    held = open_["gradients"][0]
    assert len(held) == len(list(callback.teachers.parameters()))
    assert all(g is not None and g.isfinite().all() for g in held)
    again = OnlineDistillation(network(seed=6))
    t = trainer(again)
    again.setup(t, module, "fit")
    again.load_state_dict(open_)
    t.strategy.connect(module)
    t.strategy._optimizers = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)]
    again.on_fit_start(t, module)
    assert all(torch.equal(p.grad, g) for p, g in zip(again.teachers.parameters(), held, strict=True))
    again.teardown(t, module, "fit")


def test_several_peers_and_a_swapped_loss():
    callback = OnlineDistillation([network(seed=5), network(12, seed=6)], "kdcl", temperature=3.0)
    module = Plain()
    trainer(callback, SwapLoss("focal"), max_epochs=2).fit(module, data())
    assert callback.loss.temperature == 3.0
    assert set(callback.logs) >= {"kd", "weight", "teacher_loss"}
    assert not same(callback.teachers[0].state_dict(), network(seed=5).state_dict())


@pytest.mark.parametrize("how", ["compiled", "checkpointed", "compiled step"])
def test_compiled_and_checkpointed_students_learn_the_same(how):
    class Checkpointed(Plain):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(checkpoint(self.net, batch[0], use_reentrant=False), batch[1])

    module, callback = (Checkpointed() if how == "checkpointed" else Plain()), OnlineDistillation(network(seed=5))
    if how == "compiled":
        module.net.compile(backend="eager")
    fitted = torch.compile(module, backend="eager") if how == "compiled step" else module
    trainer(callback).fit(fitted, data())
    student, teacher = by_hand("bdkd")
    if how == "checkpointed":  # the recomputed pass moves the running statistics once more
        student = {k: v for k, v in student.items() if "running" not in k and "num_batches" not in k}
    assert all(torch.equal(module.net.state_dict()[k], v) for k, v in student.items())
    assert same(callback.teachers[0].state_dict(), teacher)


def test_a_module_of_two_parts_gives_the_teacher_its_first_input():
    x, y = samples().tensors
    loader = DataLoader([{"x": a, "label": b} for a, b in zip(x, y, strict=True)], 8)
    callback = OnlineDistillation(network(seed=5), student="head", inputs_from="net")
    trainer(callback).fit(Split(), loader)
    assert callback.step == 8


def test_image_classifier_with_a_timm_teacher_by_name():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 1, 32, 32, generator=g), torch.randint(CLASSES, (8,), generator=g)
    options = {"num_classes": CLASSES, "in_chans": 1}
    module = ImageClassifier("test_resnet", **options)
    callback = OnlineDistillation("timm:test_vit", teacher_kwargs={**options, "pretrained": False, "img_size": 32})
    keys = set(module.state_dict())
    trainer(callback, max_epochs=1).fit(module, DataLoader(list(zip(x, y, strict=True)), 4))
    assert callback.step == 2
    assert set(module.state_dict()) == keys


def llama(layers=1, seed=0, vocab=32):
    torch.manual_seed(seed)
    config = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=vocab, num_hidden_layers=layers, **config))


LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
}


def texts(n=8):
    ids = torch.randint(0, 32, (n, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, 4:] = 0
    return DataLoader([{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)], 4)


def test_language_models_are_shifted_and_masked():
    torch.manual_seed(0)
    module, teacher = CausalLM(from_config=LLAMA), llama()
    callback = OnlineDistillation(teacher, "bdkd", parameters={"reduction": "tokenmean"})
    batch = next(iter(texts()))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        z_s, z_t = module.model(ids, attention_mask=mask).logits, teacher(ids, attention_mask=mask).logits
        keep = mask[:, 1:].bool()
        want = create("bdkd")(z_s[:, :-1][keep], z_t[:, :-1][keep])
        task = F.cross_entropy(z_t[:, :-1][keep], ids[:, 1:][keep])
    trainer(callback, max_steps=1).fit(module, texts())
    torch.testing.assert_close(callback.logs["kd"], want.student)
    torch.testing.assert_close(callback.logs["teacher_loss"], task)
    assert callback.step == 1


class Broken(Plain):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        raise RuntimeError("mid-fit")


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Weightless(Plain):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(F.linear(batch[0], self.net[0].weight[:CLASSES]), batch[1])


def nan_teacher():
    made = network(seed=5)
    nn.init.constant_(made[-1].weight, float("nan"))
    return made


@pytest.mark.parametrize(
    ("module", "make", "message"),
    [
        (Plain, lambda m: OnlineDistillation(network(classes=7)), "student 'net' .Sequential. has 4 outputs, .* 7"),
        (Plain, lambda m: OnlineDistillation(network(), student="nett"), "no sub-module 'nett'. Did you mean 'net'"),
        (Split, lambda m: OnlineDistillation(network()), "2 children with parameters .net, head."),
        (Plain, lambda m: OnlineDistillation(m.net), "shares parameters"),
        (Plain, lambda m: OnlineDistillation(nan_teacher()), "logits of the teacher Sequential hold NaN"),
        (Plain, lambda m: OnlineDistillation(network(), targets="label"), "batch .list. has no 'label'"),
        (Plain, lambda m: OnlineDistillation(nn.Flatten()), "no parameter to train"),
        (Manual, lambda m: OnlineDistillation(network()), "needs automatic optimization"),
        (Weightless, lambda m: OnlineDistillation(network()), "'net' .Sequential. was never called in the step"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(module, make, message):
    module = module()
    with pytest.raises(LossplugError, match=message) as error:
        trainer(make(module)).fit(module, data())
    assert "\n" not in str(error.value)
    assert wrapped_methods(module) == ()
    assert not module.net._forward_hooks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OnlineDistillation(network(), "kd"), "Use bdkd, dml, kdcl or switokd"),
        (lambda: OnlineDistillation(network(), "bdkdd"), "Did you mean"),
        (lambda: OnlineDistillation(network(), "bdkd", {"delta": 0.1}), "delta is 0.1"),
        (lambda: OnlineDistillation(network(), "bdkd", {"temperature": -1}), "temperature is -1"),
        (lambda: OnlineDistillation([network(), network()], "switokd"), "takes one"),
        (lambda: OnlineDistillation(network(), weight=-0.5), "weight is -0.5"),
        (lambda: OnlineDistillation(network(), teacher_ce_weight=-1), "teacher_ce_weight is -1"),
        (lambda: OnlineDistillation("resnet18"), "has no kind. Write timm:NAME"),
        (lambda: OnlineDistillation("tim:resnet18"), "Did you mean 'timm'"),
        (lambda: OnlineDistillation("timm:resnet1888", teacher_kwargs={"pretrained": False}), "no model"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(LossplugError, match=message):
        make()


def test_an_exception_takes_everything_off():
    module = Broken()
    with pytest.raises(RuntimeError, match="mid-fit"):
        trainer(OnlineDistillation(network())).fit(module, data())
    assert wrapped_methods(module) == ()
    assert not module.net._forward_hooks


def test_a_twin_teacher_warns_and_a_second_fit_goes_on():
    callback, module = OnlineDistillation(Plain().net), Plain()
    with pytest.warns(UserWarning, match="starts with the student's weights"):
        trainer(callback).fit(module, data())
    trainer(callback).fit(module, data())
    assert callback.step == 8
