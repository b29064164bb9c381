"""bitsandbytes modules: trained codes kept in int8, the error of NF4 told, loaded by transformers, used as teachers."""

import pytest
import torch
from callback_runs import make_trainer
from tiny_models import Wrapped, train
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import QAT, Distillation
from lightning_lossplug.integrations import export_quantized, save_bitsandbytes
from lightning_lossplug.surgery import fold

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes (extra: bitsandbytes)")

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
TOKENS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))


def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG)


@pytest.fixture(scope="module")
def trained():
    return train(llama(), TOKENS, QAT(8, 8), lr=1e-3).model.eval()


def values(layer):
    """What a bitsandbytes layer holds, in float."""
    weight = layer.weight
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.data.float() * weight.SCB[:, None] / 127


def test_trained_codes_are_kept_in_int8(trained, tmp_path):
    written = save_bitsandbytes(trained, tmp_path / "a")
    assert all(entry == {"exact": True, "error": pytest.approx(0, abs=1e-6)} for entry in written["layers"].values())
    assert set(written["inputs"]) == set(written["layers"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    want = fold(trained)
    for name in written["layers"]:
        layer = loaded.get_submodule(name)
        assert isinstance(layer, bitsandbytes.nn.Linear8bitLt)
        torch.testing.assert_close(values(layer), want.get_submodule(name).weight, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        a, b = loaded(TOKENS).logits, want(TOKENS).logits
    assert (a - b).abs().max() <= 0.03 * (b.max() - b.min())  # inputs are quantised by row
    assert loaded.generate(TOKENS, max_new_tokens=2, do_sample=False).shape == (2, 10)


def test_nf4_rounds_again_and_says_how_much(trained, tmp_path):
    written = save_bitsandbytes(trained, tmp_path / "a", "nf4")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    want = fold(trained)
    for name, entry in written["layers"].items():
        assert entry["exact"] is False
        assert 0.03 < entry["error"] < 0.15
        layer = loaded.get_submodule(name)
        assert isinstance(layer, bitsandbytes.nn.Linear4bit)
        weight = want.get_submodule(name).weight
        assert float(((values(layer) - weight).norm() / weight.norm()).detach()) == pytest.approx(
            entry["error"], rel=1e-3
        )
    with torch.no_grad():
        assert loaded(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_plain_models(kind, tmp_path):
    model = llama().eval()
    written = save_bitsandbytes(model, tmp_path / "a", kind)
    assert len(written["layers"]) == 14
    assert "lm_head" not in written["layers"]
    assert written["inputs"] == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    with torch.no_grad():
        a, b = loaded(TOKENS).logits, model(TOKENS).logits
    assert (a - b).abs().max() <= (0.03 if kind == "int8" else 0.4) * (b.max() - b.min())


def test_groups_are_rounded_again(tmp_path):
    options = {"granularity": "group", "group_size": 32}
    model = train(llama(), TOKENS, QAT(4, None, **options), lr=1e-3).model.eval()
    written = save_bitsandbytes(model, tmp_path / "a")
    assert all(not entry["exact"] and 0 < entry["error"] < 0.02 for entry in written["layers"].values())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_as_a_frozen_teacher(kind, tmp_path):
    save_bitsandbytes(llama(), tmp_path / "a", kind)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    before = {key: value.clone() for key, value in teacher.state_dict().items() if isinstance(value, torch.Tensor)}
    torch.manual_seed(1)
    student = Wrapped(AutoModelForCausalLM.from_config(CONFIG), 1e-3)
    trainer = make_trainer(max_steps=2, max_epochs=-1, callbacks=[Distillation(teacher, "kd")], precision="bf16-mixed")
    trainer.fit(student, DataLoader([TOKENS] * 2, batch_size=None))
    assert all(p.isfinite().all() for p in student.parameters())
    assert not any("teacher" in key for key in student.state_dict())
    for key, value in teacher.state_dict().items():
        if isinstance(value, torch.Tensor) and kind == "int8":  # NF4 packs itself anew at its first product
            assert torch.equal(value, before[key]), key


def test_the_command_says_what_changes(trained, tmp_path):
    made = export_quantized(trained, tmp_path / "a", "bitsandbytes_int8")
    assert (made["exact_layers"], made["layers"], made["dropped_input_steps"]) == (15, 15, 15)
    assert made["largest_error"] < 1e-6
    made = export_quantized(llama(), tmp_path / "b", "bitsandbytes_nf4")
    assert (made["exact_layers"], made["layers"], made["dropped_input_steps"]) == (0, 14, 0)
    attending = train(llama(), TOKENS, QAT(8, 8, attention_bits=8), lr=1e-3).model.eval()
    assert export_quantized(attending, tmp_path / "c", "bitsandbytes_int8")["float_attention"] == 2


def test_mistakes(trained, tmp_path):
    with pytest.raises(LossplugError, match="kind is 'fp4'"):
        save_bitsandbytes(trained, tmp_path / "a", "fp4")
    with pytest.raises(LossplugError, match="Linear is no transformers model"):
        save_bitsandbytes(torch.nn.Linear(4, 4), tmp_path / "a")
    broken = train(llama(), TOKENS, QAT(8, 8), lr=1e-3).model
    layer = broken.model.layers[0].mlp.up_proj
    layer.weight_transforms["quantization"].quantizer.s.data[3] = -1.0
    with pytest.raises(LossplugError, match=r"up_proj.weight: 1 of 128 values of s are zero, negative or not finite"):
        save_bitsandbytes(broken, tmp_path / "a")
    assert not (tmp_path / "a").exists()
