"""SwapLoss: every place a loss may live, and nothing left behind."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from callback_runs import Manual, Plain, data, make_trainer
from timm.loss import LabelSmoothingCrossEntropy
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import SwapLoss
from lightning_lossplug.losses import Loss, create
from lightning_lossplug.schedules import Linear
from lightning_lossplug.surgery import wrapped_methods


def tiny_llama():
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


class Recorder(pl.Callback):
    """Losses as the Trainer differentiates them."""

    def __init__(self):
        self.losses = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses.append(loss.detach().clone())


def first_loss(module, loader, callback, **options):
    recorder = Recorder()
    make_trainer(max_steps=1, callbacks=[callback, recorder], **options).fit(module, loader)
    assert wrapped_methods(module) == ()
    return recorder.losses[0]


class AttributeCriterion(Plain):
    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion

    def training_step(self, batch, batch_idx):
        return self.criterion(self.net(batch[0]), batch[1])


class FunctionAttribute(AttributeCriterion):
    def __init__(self, function):
        super().__init__(nn.Identity())
        self.function = function

    def training_step(self, batch, batch_idx):
        return self.function(self.net(batch[0]), batch[1])


def expected(module, loader, loss):
    x, y, *_ = next(iter(loader))
    return loss(module.net(x), y).detach()


@pytest.mark.parametrize(
    ("module", "where"),
    [
        (Plain(), "auto"),
        (Plain(), "functional"),
        (AttributeCriterion(nn.CrossEntropyLoss()), "auto"),
        (AttributeCriterion(nn.CrossEntropyLoss()), "criterion"),
        (AttributeCriterion(LabelSmoothingCrossEntropy(0.1)), "auto"),
        (AttributeCriterion(LabelSmoothingCrossEntropy(0.1)), "criterion"),
        (FunctionAttribute(lambda z, y: -z.log_softmax(1).gather(1, y[:, None]).mean()), "function"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_finds_the_loss_wherever_it_is(module, where):
    loader = data()
    want = expected(module, loader, create("focal", gamma=3.0))
    before = dict(vars(module))
    got = first_loss(module, loader, SwapLoss("focal", {"gamma": 3.0}, where=where))
    assert got == want
    assert set(vars(module)) - set(before) <= {"_trainer", "_fabric"} | set(before)


def test_weight_ignore_index_and_reduction_of_the_replaced_call_are_kept():
    class Weighted(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            y = torch.where(torch.arange(len(y)) % 3 == 0, 7, y)
            weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
            return F.cross_entropy(self.net(x), y, weight, ignore_index=7, reduction="none").sum() / 5

    module, loader = Weighted(), data()
    x, y = next(iter(loader))
    y = torch.where(torch.arange(len(y)) % 3 == 0, 7, y)
    loss = create("focal", weight=[1.0, 2.0, 3.0, 4.0], ignore_index=7, reduction="sum")
    want = loss(module.net(x), y).detach() / 5
    assert torch.allclose(first_loss(module, loader, SwapLoss("focal")), want)


@pytest.mark.parametrize("where", ["auto", "loss_function"])
def test_hugging_face_causal_lm_keeps_shift_and_masking(where):
    class LM(Plain):
        def __init__(self):
            super().__init__()
            self.model = tiny_llama()

        def training_step(self, batch, batch_idx):
            ids = batch[0]
            labels = ids.masked_fill(ids % 5 == 0, -100)
            return self.model(input_ids=ids, labels=labels).loss

    ids = torch.randint(0, 32, (8, 12))
    module = LM()
    labels = ids.masked_fill(ids % 5 == 0, -100)
    with torch.no_grad():
        logits = module.model(input_ids=ids).logits
    want = create("poly_loss", epsilon=2.0)(logits[:, :-1].reshape(-1, 32), labels[:, 1:].reshape(-1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), 8)
    got = first_loss(module, loader, SwapLoss("poly_loss", {"epsilon": 2.0}, where=where))
    assert torch.allclose(got, want)


@pytest.mark.parametrize("options", [{}, {"weight": 0.25}, {"mode": "add", "weight": 0.5}])
def test_fused_head_gives_the_same_loss_and_weights(options):
    class LM(Plain):
        def __init__(self):
            super().__init__()
            self.model = tiny_llama()

        def training_step(self, batch, batch_idx):
            return self.model(input_ids=batch[0], labels=batch[0].masked_fill(batch[0] % 5 == 0, -100)).loss

    ids = torch.randint(0, 32, (16, 12))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), 4)
    plain = LM()
    fused = LM()
    fused.load_state_dict(plain.state_dict())
    recorders = []
    for module, flag in ((plain, False), (fused, True)):
        recorders.append(Recorder())
        callbacks = [SwapLoss("poly_loss", fused=flag, **options), recorders[-1]]
        make_trainer(max_epochs=1, callbacks=callbacks).fit(module, loader)
        assert wrapped_methods(module) == wrapped_methods(module.model.lm_head) == ()
    for a, b in zip(recorders[0].losses, recorders[1].losses, strict=True):
        assert torch.allclose(a, b, rtol=1e-5)
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    fused.eval()
    assert fused.model(ids[:1]).logits.shape == (1, 12, 32)


def test_fused_needs_a_language_model_and_a_fusable_loss():
    with pytest.raises(LossplugError, match="fused=True doesn't go with the loss 'nfl'"):
        SwapLoss("nfl", fused=True)
    with pytest.raises(LossplugError, match="has no output embedding"):
        make_trainer(callbacks=[SwapLoss("focal", fused=True)]).fit(Plain(), data())


def test_hugging_face_head_with_the_loss_inline():
    config = BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )

    class Bert(Plain):
        def __init__(self):
            super().__init__()
            self.model = BertForSequenceClassification(config).eval()

        def training_step(self, batch, batch_idx):
            return self.model(input_ids=batch[0], labels=batch[1]).loss

    module = Bert()
    ids, labels = torch.randint(0, 32, (4, 6)), torch.randint(0, 3, (4,))
    module.model.eval()
    want = create("gce")(module.model(input_ids=ids).logits, labels).detach()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids, labels), 4)
    module.model.config.problem_type = "single_label_classification"
    for m in module.model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    assert torch.allclose(first_loss(module, loader, SwapLoss("gce")), want)


def test_dense_prediction_and_soft_targets():
    class Dense(Plain):
        def __init__(self, soft):
            super().__init__()
            self.soft, self.conv = soft, nn.Conv1d(1, 4, 1)

        def training_step(self, batch, batch_idx):
            z = self.conv(batch[0][:, None])
            y = (batch[0] > 0).long()
            return F.cross_entropy(z, F.one_hot(y, 4).movedim(-1, 1).float() if self.soft else y)

    loader = data()
    x = next(iter(loader))[0]
    for soft in (False, True):
        module = Dense(soft)
        want = create("poly_loss")(module.conv(x[:, None]), (x > 0).long()).detach()
        assert torch.allclose(first_loss(module, loader, SwapLoss("poly_loss")), want)


def test_weights_schedules_and_modes():
    loader, module = data(), Plain()
    old, new = expected(module, loader, F.cross_entropy), expected(module, loader, create("focal"))
    state = {k: v.clone() for k, v in module.state_dict().items()}
    cases = [
        ({"mode": "add", "weight": 0.5}, old + 0.5 * new),
        ({"weight": 0.25}, 0.25 * new + 0.75 * old),
        ({"weight": {0: 0.0, 0.5: 1.0}}, old),
        ({"weight": Linear(0.5, 1.0, 0, 1, unit="epochs")}, 0.5 * new + 0.5 * old),
    ]
    for options, want in cases:
        module.load_state_dict(state)
        assert torch.allclose(first_loss(module, loader, SwapLoss("focal", **options)), want)


def test_two_added_terms_compose_in_any_order():
    loader, module = data(), Plain()
    want = sum(expected(module, loader, f) for f in (F.cross_entropy, create("focal"), create("gce")))
    state = {k: v.clone() for k, v in module.state_dict().items()}
    for names in (("focal", "gce"), ("gce", "focal")):
        module.load_state_dict(state)
        recorder = Recorder()
        callbacks = [*(SwapLoss(n, mode="add") for n in names), recorder]
        make_trainer(max_steps=1, callbacks=callbacks).fit(module, loader)
        assert torch.allclose(recorder.losses[0], want)


def test_validation_keeps_the_modules_own_loss():
    module, loader = Plain(lr=0.0), data()
    trainer = make_trainer(max_epochs=1, callbacks=[SwapLoss("focal")])
    trainer.fit(module, loader, loader)
    plain = make_trainer()
    own = plain.validate(module, loader, verbose=False)[0]["val_loss"]
    assert trainer.callback_metrics["val_loss"] == pytest.approx(own)


def test_manual_optimization_works_since_the_swap_is_inside_the_step():
    module, loader = Manual(), data()
    want = expected(module, loader, create("focal"))
    assert first_loss(module, loader, SwapLoss("focal")) == want


@pytest.mark.parametrize(
    "options",
    [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=["accumulation", "clipping", "bf16"],
)
def test_same_weights_as_a_module_written_with_the_loss(options):
    class Written(Plain):
        def training_step(self, batch, batch_idx):
            return create("focal")(self.net(batch[0]), batch[1])

    torch.manual_seed(1)
    swapped = Plain()
    written = Written()
    written.load_state_dict(swapped.state_dict())
    make_trainer(callbacks=[SwapLoss("focal")], **options).fit(swapped, data())
    make_trainer(**options).fit(written, data())
    for a, b in zip(swapped.parameters(), written.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_modules(whole):
    module, loader = Plain(), data()
    want = expected(module, loader, create("focal"))
    if whole:
        compiled = torch.compile(module, backend="aot_eager")
        recorder = Recorder()
        make_trainer(max_steps=1, callbacks=[SwapLoss("focal"), recorder]).fit(compiled, loader)
        got = recorder.losses[0]
    else:
        module.net.compile(backend="aot_eager")
        got = first_loss(module, loader, SwapLoss("focal"))
    assert torch.allclose(got, want)


def test_a_loss_with_parameters_trains_and_is_saved(tmp_path):
    class Scaled(Loss):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, logits, target, *, reduction="mean"):
            return F.cross_entropy(logits * self.scale, target, reduction=reduction)

    module, loss = Plain(), Scaled()
    trainer = make_trainer(callbacks=[SwapLoss(loss)])
    trainer.fit(module, data())
    assert loss.scale != 1
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = Scaled()
    make_trainer(max_epochs=3, callbacks=[SwapLoss(other)]).fit(Plain(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert other.scale not in (1, loss.scale)


def test_an_exception_in_the_step_leaves_no_patch():
    class Fails(Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    module = AttributeFails = Fails()
    module.criterion = LabelSmoothingCrossEntropy()
    with pytest.raises(RuntimeError, match="boom"):
        make_trainer(callbacks=[SwapLoss("focal")]).fit(module, data())
    assert wrapped_methods(module) == wrapped_methods(AttributeFails.criterion) == ()
    assert "training_step" not in vars(module)


def test_fit_after_fit_and_validate_after_fit():
    module, callback = Plain(), SwapLoss("focal")
    for _ in range(2):
        trainer = make_trainer(callbacks=[callback])
        trainer.fit(module, data(), data())
        trainer.validate(module, data(), verbose=False)
        assert wrapped_methods(module) == ()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SwapLoss("focall"), r"unknown loss 'focall'.*Did you mean 'focal'"),
        (lambda: SwapLoss("focal", {"gama": 1}), r"has no parameter 'gama'.*gamma"),
        (lambda: SwapLoss("focal", {"gamma": -1}), r"gamma is -1"),
        (lambda: SwapLoss("focal", mode="mix"), r"mode is 'mix'.*'replace' or 'add'"),
        (lambda: SwapLoss(create("focal"), {"gamma": 1}), "parameters go with a loss given by name"),
        (lambda: SwapLoss("focal", sample_index=2), "takes no sample index"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(LossplugError, match=message):
        build()


@pytest.mark.parametrize(
    ("callbacks", "module", "message"),
    [
        ([SwapLoss("focal", where="criterium")], AttributeCriterion(nn.CrossEntropyLoss()), "Did you mean 'criterion'"),
        ([SwapLoss("focal", where="loss_function")], Plain(), "no sub-module has a loss_function"),
        ([SwapLoss("focal"), SwapLoss("gce")], Plain(), "'focal' and 'gce' both replace the loss"),
        (
            [SwapLoss("focal")],
            FunctionAttribute(lambda z, y: z.square().mean()),
            r"computed no loss that could be swapped; looked for calls of F\.cross_entropy.*where='criterion'",
        ),
    ],
)
def test_bad_runs_stop_before_training(callbacks, module, message):
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(LossplugError, match=message):
        make_trainer(callbacks=callbacks).fit(module, data())
    assert wrapped_methods(module) == ()
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


class TwoHeads(Plain):
    """Two classifications and a regression in one step."""

    def training_step(self, batch, batch_idx):
        z = self.net(batch[0])
        first, second = F.cross_entropy(z, batch[1]), F.cross_entropy(-z, batch[1])
        return first + 10 * second + 100 * F.mse_loss(z, torch.ones_like(z))


@pytest.mark.parametrize("order", [1, -1])
def test_heads_of_their_own(order):
    loader, module = data(), TwoHeads()
    x, y, *_ = next(iter(loader))
    z = module.net(x)
    want = create("focal")(z, y) + 10 * (create("gce")(-z, y) + create("poly_loss")(-z, y))
    want = want + 100 * create("pseudo_huber")(z, torch.ones_like(z)) + create("poly_loss")(z, y)
    callbacks = [
        SwapLoss("focal", call=0),
        SwapLoss("gce", call=1),
        SwapLoss("poly_loss", mode="add"),
        SwapLoss("pseudo_huber"),
    ][::order]
    recorder = Recorder()
    make_trainer(max_steps=1, callbacks=[*callbacks, recorder]).fit(module, loader)
    assert torch.allclose(recorder.losses[0], want.detach())
    assert wrapped_methods(module) == ()


def test_a_call_that_never_comes_and_calls_taken_twice():
    with pytest.raises(LossplugError, match="only 1 losses"):
        make_trainer(max_steps=1, callbacks=[SwapLoss("focal", call=1)]).fit(Plain(), data())
    with pytest.raises(LossplugError, match="both replace"):
        make_trainer(max_steps=1, callbacks=[SwapLoss("focal", call=1), SwapLoss("gce")]).fit(TwoHeads(), data())
    with pytest.raises(LossplugError, match="counts functional calls"):
        SwapLoss("focal", call=0, where="criterion")


class HomeMadeLoss(nn.Module):
    """A criterion that calls torch's function inside."""

    def forward(self, z, y):
        return 2 * F.cross_entropy(z, y)


@pytest.mark.parametrize("order", [1, -1])
def test_a_replacement_and_an_added_term_in_any_order(order):
    for module, scale in ((Plain(), 1.0), (AttributeCriterion(HomeMadeLoss()), 2.0)):
        loader = data()
        state = {k: v.clone() for k, v in module.state_dict().items()}
        want = expected(module, loader, create("gce")) + expected(module, loader, create("focal"))
        callbacks = [SwapLoss("gce"), SwapLoss("focal", mode="add")][::order]
        recorder = Recorder()
        make_trainer(max_steps=1, callbacks=[*callbacks, recorder]).fit(module, loader)
        assert torch.allclose(recorder.losses[0], want)
        module.load_state_dict(state)
        old = scale * expected(module, loader, F.cross_entropy)
        callbacks = [SwapLoss("gce", weight=0.5), SwapLoss("focal", mode="add")][::order]
        recorder = Recorder()
        make_trainer(max_steps=1, callbacks=[*callbacks, recorder]).fit(module, loader)
        want = 0.5 * old + 0.5 * expected_at(state, module, loader, "gce") + expected_at(state, module, loader, "focal")
        assert torch.allclose(recorder.losses[0], want)


def expected_at(state, module, loader, name):
    module.load_state_dict(state)
    return expected(module, loader, create(name))
