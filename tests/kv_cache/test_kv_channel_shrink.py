"""The callback: calibration at the start, from training batches or at the end; checkpoints, resume, export."""

import lightning.pytorch as pl
import pytest
import torch
from families import config_of, tokens
from torch import nn
from torch.utils.data import DataLoader

from lightning_lossplug.callbacks import KVChannelShrink
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache import ChannelShrunkCache, decode_mode, load_kv_factors, shrink_kv
from lightning_lossplug.kv_cache import KVShrinkSettings
from lightning_lossplug.registry import registry

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = tokens(16, 24, seed=3)


class Module(pl.LightningModule):
    def __init__(self, family="llama"):
        super().__init__()
        import transformers

        torch.manual_seed(0)
        self.net = transformers.AutoModelForCausalLM.from_config(config_of(family))

    def training_step(self, batch, _):
        ids = batch["input_ids"] if isinstance(batch, dict) else batch
        return self.net(input_ids=ids, labels=ids).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(batches=DATA, wrap=None):
    return DataLoader(batches, 4, collate_fn=None if wrap is None else lambda rows: wrap(torch.stack(rows)))


def fit(callback, module=None, folder=None, max_epochs=1, ckpt_path=None, data=None, **options):
    module = module or Module()
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **options,
    )
    trainer.fit(module, data or loader(), ckpt_path=ckpt_path)
    if folder is not None:
        trainer.save_checkpoint(folder / "last.ckpt")
    return module


def same(one, two):
    assert set(one.layers) == set(two.layers)
    for index, layer in one.layers.items():
        for a, b in ((layer.keys, two.layers[index].keys), (layer.values, two.layers[index].values)):
            assert torch.equal(a.encode, b.encode)
            assert torch.equal(a.decode, b.decode)
            assert (a.mean is None) == (b.mean is None)


def options(when, **more):
    return {"k_ratio": 0.5, "v_ratio": 0.5, "when": when, "calib_batches": 3, **more}


@pytest.mark.parametrize("more", [{"factors": "matryoshka_kv", "steps": 2}, {"factors": "eigen_attention"}])
def test_orthogonal_bases(more):
    callback = KVChannelShrink(**options("end", **more))
    module = fit(callback)
    for layer in callback.factors.layers.values():
        through = layer.values.encode @ layer.values.decode
        torch.testing.assert_close(through @ through, through, rtol=0, atol=1e-4)
    cache = ChannelShrunkCache(module.net, callback.factors)
    module.net.eval().generate(input_ids=DATA[:1], max_new_tokens=5, do_sample=False, past_key_values=cache)
    with pytest.raises(LossplugError, match="keeps no texts, which factors='matryoshka_kv' looks at"):
        KVChannelShrink(factors="matryoshka_kv", steps=2, when="training")


@pytest.mark.parametrize("when", ["start", "training", "end"])
def test_factors_for_generate_and_for_the_folder(when, tmp_path):
    callback = KVChannelShrink(**options(when, output=str(tmp_path / "model")))
    module = fit(callback)
    assert callback.factors.tokens == (16 if when == "training" else 12) * (24 - 4)
    cache = ChannelShrunkCache(module.net, callback.factors)  # the fingerprint is that of the trained weights
    out = module.net.eval().generate(input_ids=DATA[:1], max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert out.shape == (1, 29)
    assert cache.nbytes() == cache.expected_bytes()
    same(load_kv_factors(tmp_path / "model"), callback.factors)


def test_training_is_not_changed():
    plain = fit(pl.Callback())
    for when in ("start", "training", "end"):
        module = fit(KVChannelShrink(**options(when)), data=DataLoader(DATA, 4, shuffle=False))
        for a, b in zip(plain.parameters(), module.parameters(), strict=True):
            assert torch.equal(a, b)
        assert not any(m._forward_pre_hooks for m in module.modules())


def test_the_order_of_shuffled_batches_is_not_changed():
    def run(callback):
        torch.manual_seed(7)
        return fit(callback, Module(), data=DataLoader(DATA, 4, shuffle=True))

    plain, module = run(pl.Callback()), run(KVChannelShrink(**options("start")))
    for a, b in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_end_is_the_function_on_the_final_weights():
    callback = KVChannelShrink(**options("end", k_bits=8, window=5, means=True))
    module = fit(callback)
    settings = KVShrinkSettings(k_ratio=0.5, v_ratio=0.5, k_bits=8, window=5, means=True)
    same(callback.factors, shrink_kv(module.net, [DATA[:4], DATA[4:8], DATA[8:12]], settings))
    assert callback.factors.settings == settings


@pytest.mark.parametrize("when", ["start", "training"])
def test_resumed_equals_straight(when, tmp_path):
    straight = KVChannelShrink(**options(when))
    fit(straight, max_epochs=2)
    first = KVChannelShrink(**options(when))
    fit(first, folder=tmp_path)
    if when == "start":
        state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["KVChannelShrink"]
        assert state["factors"] is not None
    second = KVChannelShrink(**options(when))
    fit(second, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    same(straight.factors, second.factors)
    assert straight.factors.fingerprint == second.factors.fingerprint


def test_a_second_fit_starts_anew():
    callback = KVChannelShrink(**options("start"))
    fit(callback)
    first = callback.factors
    torch.manual_seed(5)
    other = Module()
    nn.init.normal_(other.net.model.layers[0].self_attn.k_proj.weight)
    fit(callback, other)
    assert not torch.equal(first.layers[0].keys.decode, callback.factors.layers[0].keys.decode)


@pytest.mark.parametrize("wrap", [lambda ids: {"input_ids": ids}, lambda ids: {"input_ids": ids, "labels": ids}])
def test_batches_are_dicts_too(wrap):
    callback = KVChannelShrink(**options("start"))
    fit(callback, data=loader(wrap=wrap))
    assert callback.factors.tokens == 12 * (24 - 4)


def test_it_is_registered():
    made = registry.create("callback", "KVChannelShrink", budget=0.3, when="end")
    assert made.settings.budget == 0.3


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"when": "later"}, "when is 'later'"),
        ({"calib_batches": 0}, "calib_batches is 0"),
        ({"k_bits": 5}, "bits is 5"),
    ],
)
def test_bad_arguments(bad, words):
    with pytest.raises(LossplugError, match=words):
        KVChannelShrink(**bad)


def test_too_little_text_and_batches_without_ids():
    with pytest.raises(LossplugError, match=r"has 8 tokens, at least 32 are needed"):
        fit(KVChannelShrink(**options("start")), data=loader(DATA[:4, :6]))

    class Odd(Module):
        def training_step(self, batch, _):
            return super().training_step(batch["text"], _)

    with pytest.raises(LossplugError, match="a training batch of type dict has no input_ids"):
        fit(KVChannelShrink(**options("start")), Odd(), data=loader(wrap=lambda ids: {"text": ids}))


def test_a_module_without_a_language_model():
    class Plain(Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)

    with pytest.raises(LossplugError, match="has no layer with full attention"):
        fit(KVChannelShrink(), Plain())


def test_adapted_weights_live_better_with_their_codes():
    losses = {}
    for adapt in (False, True):
        settings = {"k_ratio": 0.85, "v_ratio": 0.85, "when": "start", "window": 2, "sinks": 0}
        callback = KVChannelShrink(**settings, adapt=adapt)
        module = fit(callback, max_epochs=10).eval()
        assert not any("_hook.<locals>" in str(m._forward_pre_hooks) for m in module.modules())
        assert ChannelShrunkCache(module.net, callback.factors).factors is callback.factors
        with torch.no_grad(), decode_mode(module.net, callback.factors, 1):
            losses[adapt] = float(module.training_step(DATA, 0))
    assert losses[True] < losses[False] - 0.02
    with pytest.raises(LossplugError, match="adapt needs factors before the first step, and when is 'end'"):
        KVChannelShrink(adapt=True)
    with pytest.raises(LossplugError, match="records no gradients"):
        KVChannelShrink(when="training", allocation="sensitivity")
