"""Quantised attention: torch's attention to rounding where nothing is quantised, in timm and transformers models."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from callback_runs import assert_equal, make_trainer, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from tiny_models import LLAMA, Wrapped, train
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import QAT, GradientAdaptiveQAT, load_plugged
from lightning_lossplug.quantization import (
    QATSettings,
    QATTechnique,
    binary_weights,
    bivit_attention,
    create,
    explicit_attention,
    integer_model,
)
from lightning_lossplug.quantization.attention import Probabilities
from lightning_lossplug.surgery import attending_layers, attention_of, find_attention, fold

VIT = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **(VIT | options))


def llama(**options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LLAMA, **options)


def operands(dtype=torch.float64, heads=(4, 4), length=5, keys=7):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads[0], length, 6), (2, heads[1], keys, 6), (2, heads[1], keys, 3))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


BOOL = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(2)) > 0.4
EMPTY = BOOL.clone()
EMPTY[0, :, 2] = False  # a row that sees nothing
ADDED = torch.randn(5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((4, 4), {}),
        ((4, 4), {"scale": 0.3}),
        ((4, 4), {"is_causal": True}),
        ((4, 4), {"attn_mask": BOOL}),
        ((4, 4), {"attn_mask": EMPTY}),
        ((4, 4), {"attn_mask": ADDED}),
        ((4, 4), {"attn_mask": torch.where(EMPTY, 0.0, -torch.inf).double()}),
        ((4, 2), {"enable_gqa": True}),
        ((4, 1), {"enable_gqa": True, "is_causal": True}),
    ],
    ids=["plain", "scale", "causal", "bool", "empty_row", "added", "minus_infinity", "gqa", "gqa_causal"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_quantisers_it_is_torchs(heads, options, dtype):
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options = options | {"attn_mask": options["attn_mask"].to(dtype)}
    ours, theirs = operands(dtype, heads), operands(dtype, heads)
    got, want = explicit_attention(*ours, **options), F.scaled_dot_product_attention(*theirs, **options)
    torch.testing.assert_close(got, want)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    for out in (got, want):
        (out * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_precision_and_dropout():
    half = operands(torch.bfloat16)
    assert explicit_attention(*half).dtype == torch.bfloat16
    torch.testing.assert_close(explicit_attention(*half), F.scaled_dot_product_attention(*half), rtol=2e-2, atol=2e-2)
    single = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert explicit_attention(*single).dtype == F.scaled_dot_product_attention(*single).dtype == torch.bfloat16
    torch.manual_seed(0)
    wide = [torch.ones(1, 1, 200, 4), torch.ones(1, 1, 200, 4), torch.ones(1, 1, 200, 1)]
    dropped = explicit_attention(*wide, dropout_p=0.25)
    assert dropped.std() > 0
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.floats(0.05, 1.0), st.integers(0, 99))
def test_binary_weights_keep_the_mass_of_what_they_keep(keys, ratio, seed):
    scores = torch.randn(3, keys, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    made, kept, p = binary_weights(scores, ratio), bivit_attention(scores, ratio), scores.softmax(-1)
    assert torch.equal(made != 0, kept != 0)
    torch.testing.assert_close(made.sum(-1), (p * kept).sum(-1))
    assert all(row[row != 0].unique().numel() == 1 for row in made)
    torch.testing.assert_close(binary_weights(scores + 5.0, ratio), made)


def test_the_gradient_of_binary_weights():
    scores = torch.tensor([[0.5, 0.2, -1.5, -4.0]], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([[1.0, -2.0, 3.0, 0.5]], dtype=torch.float64)
    (binary_weights(scores) * g).sum().backward()
    p = scores.detach().softmax(-1)
    bits = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    mean = (p * bits).sum() / 2
    jacobian = torch.diag(p[0]) - p.T @ p
    through_mean = (g * bits).sum() * (bits[0] / 2) @ jacobian
    torch.testing.assert_close(scores.grad, g * mean * (scores.detach().abs() < 1) + through_mean)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_probabilities_have_codes_from_zero_within_one(bits):
    p = (torch.randn(2, 3, 40, 40) * 4).softmax(-1)
    quantizer = Probabilities(bits)
    torch.testing.assert_close(quantizer(p), p, rtol=0, atol=0.55)
    assert quantizer.bounds == (0, 2**bits - 1)
    assert 0 < quantizer.s.item() <= 1 / (2**bits - 1) + 1e-6
    codes = quantizer.eval().quantize(p)
    assert codes.zero_point is None
    assert codes.codes.min() == 0
    nearest = create("lsq", bits=bits, signed=False, init="lsq", role="activation").train()
    assert (quantizer(p) - p).square().mean() <= (nearest(p) - p).square().mean() * 1.01


@pytest.mark.parametrize(
    ("make", "batch", "paths"),
    [(vit, IMAGES, "model.blocks.{}.attn"), (llama, TOKENS, "model.model.layers.{}.self_attn")],
    ids=["timm", "llama"],
)
def test_training_folding_and_loading(make, batch, paths, tmp_path):
    qat = QAT(8, 8, attention_bits=8)
    torch.manual_seed(0)
    module = Wrapped(make(), 1e-3)
    trainer = make_trainer(max_steps=3, max_epochs=-1, callbacks=[qat])
    trainer.fit(module, DataLoader([batch] * 3, batch_size=None))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = dict(attending_layers(module))
    assert list(found) == [paths.format(i) for i in range(2)]
    scales = {
        n: s
        for n, s in qat.technique.named_scales().items()
        if "attn." in n and n.rpartition(".")[0].endswith(("query", "key", "value", "probabilities"))
    }
    assert len(scales) == 8
    groups = trainer.optimizers[0].param_groups
    assert {id(s) for s in scales.values()} <= {id(p) for p in groups[-1]["params"]}
    assert groups[-1]["weight_decay"] == 0
    module.eval()
    want = module.model(batch)
    want = want if isinstance(want, torch.Tensor) else want.logits
    for name, layer in found.items():
        for operand, quantizer in attention_of(layer).quantizers():
            assert quantizer.ready, (name, operand)
    plain = fold(module)
    assert not list(attending_layers(plain))
    assert not any("attention_transforms" in key for key in plain.state_dict())
    assert type(plain.get_submodule(paths.format(0))) is type(make().get_submodule(paths.format(0).partition(".")[2]))
    got = plain.model(batch)
    got = got if isinstance(got, torch.Tensor) else got.logits
    assert not torch.equal(got, want)  # in 8 bits near, not the same
    torch.testing.assert_close(got, want, rtol=0, atol=0.05 * float(want.detach().abs().max()))
    loaded = load_plugged(Wrapped(make(), 1e-3), tmp_path / "a.ckpt").eval().model(batch)
    assert torch.equal(loaded if isinstance(loaded, torch.Tensor) else loaded.logits, want)
    for twin in (copy.deepcopy(module.model), pickle.loads(pickle.dumps(module.model))):
        out = twin.eval()(batch)
        assert torch.equal(out if isinstance(out, torch.Tensor) else out.logits, want)
    integers, _ = integer_model(module)
    out = integers.model(batch)
    out = out if isinstance(out, torch.Tensor) else out.logits
    torch.testing.assert_close(out, want, rtol=0, atol=0.02 * float(want.detach().abs().max()))


def test_masks_reach_the_quantised_attention():
    model = llama().eval()
    padded = torch.cat([TOKENS.new_zeros(2, 3), TOKENS], 1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 8)], 1).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    technique = QATTechnique(QATSettings(None, 8, attention_bits=8))
    technique.attach(model)
    model.train()(input_ids=TOKENS)
    model.eval()
    with torch.no_grad():
        alone = model(input_ids=TOKENS).logits
        beside = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
        torch.testing.assert_close(beside, alone)
        changed = TOKENS.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 64
        torch.testing.assert_close(model(input_ids=changed).logits[:, :-1], alone[:, :-1])  # causal
        cached = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
        plain = model.generate(TOKENS, max_new_tokens=4, do_sample=False, use_cache=False)
        assert torch.equal(cached, plain)
    technique.detach(model)
    assert not list(attending_layers(model))


@pytest.mark.parametrize("bits", [(1, None), (4, 1), (2, 8)])
def test_few_bits_train(bits):
    module = train(vit(), IMAGES, QAT(8, 8, attention_bits=bits[0], softmax_bits=bits[1]), lr=1e-3)
    transform = attention_of(module.model.blocks[0].attn)
    assert transform.query.bits == bits[0]
    assert (transform.probabilities is None) == (1 in (bits[0] if bits[1] is None else bits[1],))
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("callback", [QAT, GradientAdaptiveQAT])
def test_interrupted_and_resumed_equals_straight(options, callback, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2 and not trainer.fit_loop._should_accumulate() and trainer.ckpt_path is None:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(ckpt_path=None):
        module = Wrapped(vit(attn_drop_rate=0.0), 1e-3)
        batches = DataLoader([IMAGES] * 2, batch_size=None)
        trainer = make_trainer(max_epochs=6, callbacks=[callback(8, 8, attention_bits=4), Save()], **options)
        trainer.fit(module, batches, ckpt_path=ckpt_path)
        return state_of(module)

    assert_equal(run(), run(tmp_path / "a.ckpt"))


def test_averaged_weights_have_the_scales():
    average, seen = EMAWeightAveraging(decay=0.5), []

    class Look(Callback):
        def on_train_batch_end(self, trainer, *args):
            transform = attention_of(average._average_model.module.model.blocks[0].attn)
            seen.append([quantizer.ready for _, quantizer in transform.quantizers()])

    train(vit(), IMAGES, QAT(8, 8, attention_bits=8), average, Look(), lr=1e-3)
    assert seen[-1] == [True] * 4


def test_gradient_checkpointing_changes_nothing():
    made = []
    for checkpointed in (False, True):
        model = vit()
        model.set_grad_checkpointing(checkpointed)
        made.append(train(model, IMAGES, QAT(8, 8, attention_bits=8), lr=1e-3))
    for a, b in zip(*(module.parameters() for module in made), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_attention():
    model = train(vit(), IMAGES, QAT(8, 8, attention_bits=8), lr=1e-3).model.eval()
    want = model(IMAGES)
    model.blocks[0].attn.compile(backend="eager")
    torch.testing.assert_close(model(IMAGES), want)


class Helper(nn.Module):
    """Attention of one's own, in a function beside the module."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        return _attend(self.qkv(x))


def _attend(qkv):
    return F.scaled_dot_product_attention(*qkv.chunk(3, -1))


def test_which_modules_are_found():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Helper()
            self.other = nn.MultiheadAttention(16, 2)

    found = find_attention(Own())
    assert found["inner"][1] is None
    assert "nn.MultiheadAttention attends inside" in found["other"][1]
    assert list(found) == ["inner", "other"]
    assert list(find_attention(llama())) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    names = find_attention(timm.create_model("swin_tiny_patch4_window7_224"))
    assert len(names) == 12
    assert all(name.endswith("attn") and "TIMM_FUSED_ATTN=2" in reason for name, (_, reason) in names.items())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: llama(attn_implementation="eager"), "self_attn.*'eager'; load the model with attn_implementation"),
        (lambda: timm.create_model("resnet10t", num_classes=4), "no module calls F.scaled_dot_product_attention"),
    ],
)
def test_what_has_no_such_attention_says_so(model, message):
    model = model()
    batch = TOKENS if hasattr(model, "lm_head") else IMAGES
    with pytest.raises(LossplugError, match=message):
        train(model, batch, QAT(8, 8, attention_bits=8))


def test_left_out_modules():
    model = vit()
    model.blocks[0].attn.fused_attn = False
    technique = QATTechnique(QATSettings(8, 8, attention_bits=8, exclude=["blocks.1.*"]))
    technique.attach(model)
    assert not technique.attention
    assert "fused_attn is False" in technique.attention_left["blocks.0.attn"]
    assert technique.attention_left["blocks.1.attn"] == "excluded"


def test_bad_bits():
    for options, message in (
        ({"attention_bits": 9}, "bits is 9, allowed is 1 to 8"),
        ({"attention_bits": 0}, "bits is 0, allowed is 1 to 8"),
        ({"attention_bits": 4, "softmax_bits": 16}, "bits is 16"),
        ({"softmax_bits": 4}, "softmax_bits is 4 and attention_bits null"),
    ):
        with pytest.raises(LossplugError, match=message):
            QAT(8, 8, **options)


def test_a_second_technique_is_refused_and_others_resume_with_other_bits_are(tmp_path):
    model = vit()
    QATTechnique(QATSettings(None, 8, attention_bits=8)).attach(model)
    first = QATTechnique(QATSettings(None, 8, attention_bits=8))
    first.attach(vit())
    other = QATTechnique(QATSettings(None, 8, attention_bits=4))
    other.attach(vit())
    with pytest.raises(LossplugError, match=r"blocks.0.attn \(attention\): the checkpoint has bits \[8, 8\]"):
        other.load_state_dict(first.state_dict())
