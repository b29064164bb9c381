"""Hugging Face models give the same loss, gradients and logits with the fused head as without."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import create
from lightning_lossplug.losses.fused import LazyLogits
from lightning_lossplug.losses.fused.head import attach

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CAUSAL = {
    "llama": LlamaConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2),
    "gemma2": Gemma2Config(**SIZES, final_logit_softcapping=1.5),
    "gemma3": Gemma3TextConfig(**SIZES, final_logit_softcapping=2.0),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "phi": PhiConfig(**{**SIZES, "num_key_value_heads": 2}),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
}


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    config = copy.deepcopy(CAUSAL[name])
    for key, value in vars(config).items():
        if key.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # logits that are worth capping
    return model


def batch(rows=3, length=9):
    ids = torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("items", [None, 20])
def test_loss_gradients_and_logits(name, dtype, items):
    model, data = build(name, dtype), batch()
    options = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    plain = model(**data, **options)
    expected = gradients(model, plain.loss)
    handle = attach(model)
    with handle.armed():
        fused = model(**data, **options)
    assert handle.calls == 1
    assert not handle.computed
    assert type(fused.logits) is LazyLogits
    assert fused.logits.shape == plain.logits.shape
    assert fused.logits.dtype == plain.logits.dtype
    # These models compute their loss from float32 logits, whatever their own dtype.
    torch.testing.assert_close(fused.loss.to(plain.loss.dtype), plain.loss, rtol=1e-6, atol=1e-6)
    assert_equal(gradients(model, fused.loss), expected, 1e-5 if dtype == torch.float32 else 2e-6)
    assert torch.equal(fused.logits.detach(), plain.logits.detach())
    handle.remove()
    assert "forward" not in vars(model.get_output_embeddings())
    assert type(model(**data).logits) is torch.Tensor


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_another_loss_takes_the_place_of_the_cross_entropy(name):
    model, data = build(name), batch()
    focal = create("focal", gamma=1.5)
    logits = model(input_ids=data["input_ids"]).logits.float()
    expected = focal(logits[:, :-1].reshape(-1, 61), data["labels"][:, 1:].reshape(-1))
    reference = gradients(model, expected)
    handle = attach(model, focal)
    with handle.armed():
        loss = model(**data).loss
    torch.testing.assert_close(loss, expected)
    assert_equal(gradients(model, loss), reference, 2e-6)
    torch.testing.assert_close(handle.last, expected.detach())


def test_a_mixture_of_two_losses():
    model, data = build("llama"), batch()
    focal = create("focal")
    handle = attach(model, focal, combine=lambda of: 0.3 * of(focal) + 0.7 * of(None))
    z, y = model(input_ids=data["input_ids"]).logits.float()[:, :-1].reshape(-1, 61), data["labels"][:, 1:].reshape(-1)
    expected = 0.3 * focal(z, y) + 0.7 * F.cross_entropy(z, y)
    reference = gradients(model, expected)
    with handle.armed():
        loss = model(**data).loss
    torch.testing.assert_close(loss, expected)
    assert_equal(gradients(model, loss), reference, 2e-6)


@pytest.mark.parametrize("model", ["t5", "bert"])
def test_models_with_their_loss_inline(model):
    torch.manual_seed(0)
    if model == "t5":
        config = T5Config(
            vocab_size=61,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
        net = T5ForConditionalGeneration(config).double().train()
    else:
        config = BertConfig(
            vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        net = BertForMaskedLM(config).double().train()
    data = batch()
    plain = net(**data)
    expected = gradients(net, plain.loss)
    handle = attach(net)
    with handle.armed():
        fused = net(**data)
    handle.require_calls()
    torch.testing.assert_close(fused.loss, plain.loss)
    assert_equal(gradients(net, fused.loss), expected, 1e-10)
    assert torch.equal(fused.logits.detach(), plain.logits.detach())


def test_reading_the_logits_and_differentiating_them():
    model, data = build("gemma2"), batch()
    plain = model(**data)
    penalty = plain.loss + 0.1 * plain.logits.float().logsumexp(-1).square().mean()
    expected = gradients(model, penalty)
    handle = attach(model)
    with handle.armed():
        fused = model(**data)
    assert torch.equal(fused.logits.argmax(-1), plain.logits.argmax(-1))
    assert torch.equal(fused.logits[..., -1, 5:7], plain.logits[..., -1, 5:7])
    assert fused.logits.tolist() == plain.logits.tolist()
    assert dict(handle.computed) == {"argmax": 1}  # computed once, then read
    ours = fused.loss + 0.1 * fused.logits.float().logsumexp(-1).square().mean()
    assert_equal(gradients(model, ours), expected, 2e-6)


def test_evaluation_and_generation_are_untouched():
    model = build("llama").eval()
    data = batch()
    ids = data["input_ids"][:1]
    with torch.no_grad():
        expected = model(**data)
        tokens = model.generate(ids, max_new_tokens=3, do_sample=False)
    handle = attach(model)
    with handle.armed(), torch.no_grad():
        found = model(**data)
        assert type(found.logits) is torch.Tensor
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), tokens)
    assert handle.calls == 0
    handle.disarm()
    assert type(model(**data).logits) is torch.Tensor


def test_a_model_left_in_eval_mode_is_fused_when_it_is_trained():
    model = build("llama").eval()
    handle = attach(model)
    with handle.armed():
        assert type(model(**batch()).logits) is LazyLogits


def test_gradient_checkpointing():
    model, data = build("llama"), batch()
    expected = gradients(model, model(**data).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with attach(model).armed():
        loss = model(**data).loss
    assert_equal(gradients(model, loss), expected, 2e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_autocast(name):
    model, data = build(name, torch.float32), batch(rows=8, length=17)
    exact = gradients(model, model(**data).loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(**data)
    theirs = gradients(model, plain.loss)
    handle = attach(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), handle.armed():
        fused = model(**data)
    ours = gradients(model, fused.loss)
    assert fused.logits.dtype == plain.logits.dtype == torch.bfloat16
    torch.testing.assert_close(fused.loss, plain.loss, rtol=5e-3, atol=5e-3)
    for key, value in exact.items():
        assert (ours[key] - value).norm() <= 1.2 * (theirs[key] - value).norm() + 1e-3 * value.norm(), key
    assert torch.equal(fused.logits.detach(), plain.logits.detach())


def test_frozen_head_and_frozen_body():
    model, data = build("llama"), batch()
    for frozen in (model.model, model.lm_head):
        model.requires_grad_(True)
        frozen.requires_grad_(False)
        expected = gradients(model, model(**data).loss)
        handle = attach(model)
        with handle.armed():
            loss = model(**data).loss
        assert handle.calls == 1
        assert_equal(gradients(model, loss), expected, 2e-6)
        handle.remove()


def test_found_inside_another_module():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = build("llama"), build("gpt2")

    module = Wrapper()
    handle = attach(module)
    assert handle.paths == ("student.lm_head", "teacher.lm_head")
    with handle.armed():
        with torch.no_grad():
            assert type(module.teacher(**batch()).logits) is torch.Tensor
        assert type(module.student(**batch()).logits) is LazyLogits


def test_what_cannot_be_fused_is_refused():
    with pytest.raises(LossplugError, match="no output embedding"):
        attach(nn.Linear(2, 2))
    with pytest.raises(LossplugError, match="materialised logits"):
        attach(build("llama"), create("ldr_kl"))

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = build("llama")
    model.lm_head = Scaled(16, 61)
    with pytest.raises(LossplugError, match="Scaled with a forward of its own"):
        attach(model)


def test_writing_into_the_logits_is_refused():
    model = build("llama")
    with attach(model).armed():
        logits = model(**batch()).logits
    for write in (
        lambda: logits.__setitem__((..., 0), 0.0),
        lambda: logits.masked_fill_(torch.zeros(3, 9, 61, dtype=torch.bool), 0.0),
    ):
        with pytest.raises(LossplugError, match="writes into the logits"):
            write()


def test_an_operation_before_the_loss_that_is_not_known_is_named():
    class Odd(type(build("llama"))):
        def loss_function(self, logits, labels, vocab_size, **kwargs):
            return F.cross_entropy(logits.clamp(max=3.0).view(-1, vocab_size), labels.view(-1))

    model = build("llama")
    model.__class__ = Odd
    data = batch()
    handle = attach(model)
    with handle.armed():
        loss = model(**data).loss
    expected = F.cross_entropy(
        model(input_ids=data["input_ids"]).logits.clamp(max=3.0).view(-1, 61), data["labels"].view(-1)
    )
    torch.testing.assert_close(loss, expected)
    with pytest.raises(LossplugError, match="clamp"):
        handle.require_calls()


def test_logits_after_the_step_are_not_silently_the_new_ones():
    model = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(model)
    with handle.armed():
        out = model(**batch())
    kept = out.logits.detach()
    out.loss.backward()
    optimizer.step()
    assert kept.isfinite().all()
    with pytest.raises(LossplugError, match="wrapped by another technique"):
        attach(model)
    with handle.armed():
        out = model(**batch())
    out.loss.backward()
    optimizer.step()
    with pytest.raises(LossplugError, match="after the weights of their head changed"):
        out.logits.argmax(-1)


def test_compiled_step():
    model, data = build("llama", torch.float32), batch()
    expected = gradients(model, model(**data).loss)
    handle = attach(model)
    step = torch.compile(lambda: model(**data).loss, backend="eager")
    with handle.armed():
        loss = step()
    assert handle.calls == 1
    assert_equal(gradients(model, loss), expected, 1e-5)
