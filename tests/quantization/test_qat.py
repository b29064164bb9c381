"""QAT through the Trainer: selection, optimizer groups, every Trainer feature, resume, sparsity beside it, folding."""

import copy
import pickle

import pytest
import torch
from callback_runs import OrderedLoader, Plain, assert_equal, data, make_trainer, state_of
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from qat_cases import Convolutions
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import QAT, NMSparsity, SwapLoss, load_dense, load_plugged
from lightning_lossplug.quantization import QATSettings, QATTechnique, create, lsq
from lightning_lossplug.quantization.groups import split_groups
from lightning_lossplug.schedules import Progress
from lightning_lossplug.surgery import INPUT, PluggedLayer, fold, latent, plugged_layers, transform_of, wrapped_methods


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def quantizer(layer, parameter="weight"):
    return transform_of(layer, "quantization", parameter).quantizer


def test_a_fit_learns_scales_and_leaves_no_patch():
    module, qat = Plain(), QAT(4, 4)
    start = None

    class First(Callback):
        def on_train_batch_end(self, trainer, *args):
            nonlocal start
            start = start or {n: s.detach().clone() for n, s in qat.technique.named_scales().items()}

    trainer = make_trainer(max_epochs=4, callbacks=[qat, First()])
    trainer.fit(module, data(), data())
    assert wrapped_methods(module) == ()
    assert not qat._handles
    for name, scale in qat.technique.named_scales().items():
        assert not torch.equal(scale, start[name]), name
        assert (scale > 0).all()
    for layer, bits in ((module.net[0], 4), (module.net[3], 4), (module.net[4], 8)):
        codes = quantizer(layer).quantize(latent(layer))
        assert codes.codes.abs().max() <= 2 ** (bits - 1)
        assert torch.equal(quantizer(layer).dequantize(codes), layer.weight)
        assert quantizer(layer, INPUT).bits == bits
    assert quantizer(module.net[0], INPUT).bounds == (-8, 7)
    assert quantizer(module.net[3], INPUT).bounds == (0, 15)  # after a ReLU
    assert quantizer(module.net[0]).s.shape == (32, 1)
    groups = trainer.optimizers[0].param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert {id(p) for p in groups[1]["params"]} == {id(s) for s in qat.technique.named_scales().values()}


def test_the_step_of_images_is_measured_and_no_gradient_goes_there():
    net = Convolutions()
    technique = QATTechnique(QATSettings(4, 4))
    technique.attach(net)
    first = next(iter(technique.layers.values()))
    x = torch.randn(32, 16)
    net.net(x).square().sum().backward()
    assert first.activation.bits == 8
    assert float(first.activation.s) == pytest.approx(float((x / torch.where(x > 0, 127.0, -128.0)).max()))
    assert first.activation.s.grad is None
    assert f"{first.candidate.name}.input.s" not in technique.named_scales()


def test_the_bare_loop_is_the_callback():
    module = Plain()
    net = copy.deepcopy(module.net)
    make_trainer(max_epochs=1, callbacks=[QAT(3, 3, granularity="tensor", first_last_bits=None)]).fit(module, data())
    technique = QATTechnique(QATSettings(3, 3, granularity="tensor", first_last_bits=None))
    technique.attach(net)
    scales = list(technique.named_scales().values())
    ids = {id(s) for s in scales}
    rest = [p for p in net.parameters() if id(p) not in ids]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": scales, "weight_decay": 0.0}], 1e-2, weight_decay=0.1)
    technique.advance(Progress(0, 8))
    for step, (x, y) in enumerate(data()):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net.train()(x), y).backward()
        technique.before_step(optimizer)
        optimizer.step()
        technique.after_step(optimizer)
        technique.advance(Progress(step + 1, 8))
    assert_equal(state_of(net), state_of(module.net))
    technique.detach(net)
    assert not list(plugged_layers(net))
    assert not net[0]._forward_pre_hooks


def test_steps_of_adam_change_scales_by_factors():
    for update, expected in (("auto", 0.002 * torch.e**-0.5), ("additive", 0.002 - 0.5)):
        technique = QATTechnique(QATSettings(8, None, scale_update=update, granularity="tensor"))
        layer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        technique.attach(layer)
        scale = quantizer(layer[0]).s
        scale.data.fill_(0.002)
        scale.grad = torch.ones(1)
        optimizer = torch.optim.Adam([scale], 0.5)
        technique.before_step(optimizer)
        optimizer.step()
        technique.after_step(optimizer)
        assert scale.item() == pytest.approx(expected, rel=1e-5)
    technique = QATTechnique(QATSettings(8, None, granularity="tensor"))
    technique.attach(layer := nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    scale = quantizer(layer[0]).s
    scale.data.fill_(2.0)
    scale.grad = torch.ones(1)
    optimizer = torch.optim.SGD([scale], 0.5)
    technique.before_step(optimizer)
    optimizer.step()
    technique.after_step(optimizer)
    assert scale.item() == 1.5


def test_selection_of_first_last_and_named_layers():
    module = Convolutions()
    qat = QAT(4, 4)
    make_trainer(max_epochs=1, callbacks=[qat]).fit(module, data())
    bits = {n: (q.weight.bits, q.activation.bits) for n, q in qat.technique.layers.items()}
    assert bits == {"net.1": (8, 8), "net.4": (4, 4), "net.8": (8, 8)}
    module = Convolutions()
    qat = QAT(4, 4, first_last_bits=None, exclude=["net.8"])
    make_trainer(max_epochs=1, callbacks=[qat]).fit(module, data())
    assert list(qat.technique.layers) == ["net.4"]
    qat = QAT(include={"net.4": "w2a8", "net.8": "w1.58"})
    make_trainer(max_epochs=1, callbacks=[qat]).fit(Convolutions(), data())
    layer = qat.technique.layers["net.4"]
    assert (layer.weight.name, layer.weight.bits, layer.activation.bits) == ("paretoq", 2, 8)
    assert qat.technique.layers["net.8"].activation is None


@pytest.mark.parametrize(
    "options",
    [
        {"weight": "fake_quant", "activation": "fake_quant", "bits_w": 8, "bits_a": 8},
        {"weight": "lsq_plus", "activation": "lsq_plus", "bits_w": 4, "bits_a": 4},
        {"weight": "dorefa", "activation": "pact", "bits_w": 3, "bits_a": 4},
        {"weight": "ewgs", "activation": "ewgs", "bits_w": 4, "bits_a": 4},
        {"bits_w": 1, "bits_a": None},
        {"bits_w": 2, "bits_a": 8},
        {"weight": "tbt", "bits_w": 1},
        {"weight": "reste", "bits_w": 1},
        {"weight": "biper", "bits_w": 1},
        {"weight": "binarydm", "bits_w": 2},
        {"weight": "self_compress", "bits_w": 6},
        {"weight": "mx", "activation": "mx", "bits_w": 4, "weight_options": {"elem": "fp4_e2m1"}},
        {"weight": "nvfp4", "activation": "nvfp4", "bits_w": 4, "bits_a": 4},
        {"weight": "fp_quant", "activation": "fp_quant"},
        {"granularity": "group", "group_size": 8, "bits_w": 4, "first_last_bits": None},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_every_quantizer_trains_and_folds(options):
    for module in (Plain(lr=1e-3), Convolutions()):
        qat = QAT(**options)
        make_trainer(max_epochs=1, callbacks=[qat]).fit(module, data())
        assert all(p.isfinite().all() for p in module.parameters())
        plain = qat.technique.fold(module)
        assert not list(plugged_layers(plain))
        for name, layer in plugged_layers(module):
            assert torch.equal(plain.get_submodule(name).weight, layer.weight)
            assert not plain.get_submodule(name)._forward_pre_hooks


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"plugins": "scaler"},
        {"callbacks": "ema"},
    ],
    ids=["accumulation", "clipping", "bf16", "bf16_true", "grad_scaler", "ema"],
)
def test_trainer_features(options):
    options = dict(options)
    if options.get("plugins") == "scaler":
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]
    callbacks = [QAT(4, 4)]
    if options.pop("callbacks", None):
        callbacks.append(EMAWeightAveraging(decay=0.8))
    module = Convolutions()
    make_trainer(max_epochs=3, callbacks=callbacks, **options).fit(module, data())
    assert wrapped_methods(module) == ()
    for _, layer in plugged_layers(module):
        assert quantizer(layer).s.dtype == torch.float32
        quantizer(layer).quantize(latent(layer))
        assert quantizer(layer, INPUT).ready


@pytest.mark.parametrize("stop", [3, 11])
def test_interrupted_and_resumed_equals_straight(stop, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == stop and trainer.ckpt_path is None:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(ckpt_path=None):
        torch.manual_seed(0)
        module = Convolutions()
        trainer = make_trainer(callbacks=[QAT(4, 4, init_batches=4), Save()])
        trainer.fit(module, OrderedLoader(), ckpt_path=ckpt_path)
        return state_of(module)

    assert_equal(run(), run(tmp_path / "a.ckpt"))


def test_with_sparsity_in_any_order():
    states = []
    for first in (True, False):
        torch.manual_seed(0)
        module = Plain()
        made = [QAT(4, 4), NMSparsity(2, 4)]
        make_trainer(callbacks=made if first else made[::-1]).fit(module, data())
        states.append(state_of(module))
        for i in (0, 3):
            layer = module.net[i]
            assert ((layer.weight != 0).reshape(-1, 4).sum(1) <= 2).all()
            q = quantizer(layer)
            masked = transform_of(layer, "sparsity")(latent(layer))
            assert torch.equal(layer.weight, lsq(masked, q.s, 4))
            assert torch.equal(fold(module).net[i].weight, layer.weight)
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key])
    for order in ([QAT(2, 8), NMSparsity(2, 4)], [NMSparsity(2, 4), QAT(2, 8)]):
        with pytest.raises(LossplugError, match="paretoq at 2 bits has no level at 0"):
            make_trainer(callbacks=order).fit(Plain(), data())


def test_checkpoints_copies_and_pickles(tmp_path):
    module, qat = Convolutions(), QAT(4, 4)
    trainer = make_trainer(callbacks=[SwapLoss("focal"), qat])
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    x = next(iter(data()))[0]
    module.eval()
    want = module.net(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module.net))):
        twin.eval()
        net = twin.net if hasattr(twin, "net") else twin
        assert torch.equal(net(x), want)
        quantizer(net[4], INPUT).s.data.mul_(3)  # the copy has a stack of its own
        assert not torch.equal(net(x), want)
    assert torch.equal(module.net(x), want)
    plugged = load_plugged(Convolutions(), tmp_path / "a.ckpt").eval()
    assert torch.equal(plugged.net(x), want)
    dense = load_dense(Convolutions(), tmp_path / "a.ckpt")
    assert torch.equal(dense.net[4].weight, latent(module.net[4]))
    # a dense checkpoint loads strictly, and the scales follow its weights
    big = Convolutions()
    with torch.no_grad():
        big.net[4].weight.mul_(100)
    technique = QATTechnique(QATSettings(4, 4))
    other = Convolutions()
    technique.attach(other)
    other.load_state_dict(big.state_dict(), strict=True)
    expected = create("lsq", bits=4, per_channel=True, init="mse").initialize(big.net[4].weight)
    torch.testing.assert_close(other.net[4].weight, expected(big.net[4].weight))


def test_second_fit_goes_on_with_its_scales():
    module, qat = Plain(), QAT(4, 4)
    make_trainer(callbacks=[qat]).fit(module, data())
    before = quantizer(module.net[0]).s.detach().clone()
    make_trainer(max_steps=1, callbacks=[qat]).fit(module, data())
    assert not torch.equal(quantizer(module.net[0]).s, before)
    torch.testing.assert_close(quantizer(module.net[0]).s, before, rtol=0.5, atol=1e-2)
    make_trainer(callbacks=[QAT(4, 4)]).test(Plain(), data(), verbose=False)


def test_tied_weights_share_one_quantizer():
    class Tied(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))
            self.net[2].weight = self.net[0].weight

    module = Tied()
    make_trainer(callbacks=[QAT(4, None)]).fit(module, data())
    assert quantizer(module.net[0]) is quantizer(module.net[2])
    assert torch.equal(module.net[0].weight, module.net[2].weight)
    plain = fold(module)
    assert plain.net[0].weight is plain.net[2].weight
    torch.testing.assert_close(plain.net[0].weight, module.net[0].weight)


def test_multihead_attention_weights_are_quantised_where_it_reads_them():
    class Attention(Plain):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.net = nn.Sequential(nn.Unflatten(1, (1, 16)), layer, nn.Flatten(), nn.Linear(16, 4))

    module, qat = Attention(), QAT(4, 8)
    make_trainer(max_epochs=1, callbacks=[qat]).fit(module, data())
    layers = qat.technique.layers
    assert layers["net.1.self_attn.out_proj"].activation is None
    assert layers["net.1.self_attn.in_proj_weight"].weight.ready
    assert layers["net.1.linear1"].activation.ready
    assert qat.technique.finish() == []


def test_compiled_inner_model():
    module, twin = Plain(), Plain()
    twin.load_state_dict(module.state_dict())
    module.net.compile(backend="eager")
    for each in (module, twin):
        make_trainer(max_epochs=1, callbacks=[QAT(4, 4)]).fit(each, data())
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_groups_are_split_before_schedulers_count_them():
    w, b, s, t = (nn.Parameter(torch.ones(1)) for _ in range(4))
    owners = [(w, [s, t])]
    defaults = {"lr": 0.1, "weight_decay": 0.2}
    one = split_groups([w, b, s], defaults, owners, 0.5, 0.0)
    assert [[id(p) for p in g["params"]] for g in one] == [[id(w), id(b)], [id(s), id(t)]]
    assert one[1]["lr"] == 0.05
    assert one[1]["weight_decay"] == 0.0
    two = split_groups([{"params": [w], "lr": 1.0}, {"params": [b]}], defaults, owners, 2.0, 0.3)
    assert [len(g["params"]) for g in two] == [1, 1, 2]
    assert (two[2]["lr"], two[2]["weight_decay"]) == (2.0, 0.3)
    named = split_groups([("w", w), ("b", b), ("s", s)], defaults, owners, 1.0, 0.0)
    assert [n for n, _ in named[1]["params"]] == ["s", "scale.0.1"]

    class OneCycle(Plain):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.net[:4].parameters(), 0.1, momentum=0.9)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=16)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    build = torch.optim.Optimizer.__init__
    make_trainer(callbacks=[QAT(4, 4, exclude=["net.4"])]).fit(OneCycle(), data())
    assert torch.optim.Optimizer.__init__ is build

    class PerGroup(Plain):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0])]

    with pytest.raises(LossplugError, match=r"groups of their own: Expected 2 lr_lambdas.*scale_group=False"):
        make_trainer(callbacks=[QAT(4, 4)]).fit(PerGroup(), data())
    make_trainer(callbacks=[QAT(4, 4, scale_group=False)]).fit(PerGroup(), data())


def test_an_exception_leaves_no_patch():
    class Fails(Plain):
        def configure_optimizers(self):
            raise RuntimeError("boom")

    module, build = Fails(), torch.optim.Optimizer.__init__
    with pytest.raises(RuntimeError, match="boom"):
        make_trainer(callbacks=[QAT()]).fit(module, data())
    assert wrapped_methods(module) == ()
    assert torch.optim.Optimizer.__init__ is build


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QAT(9), "bits is 9, allowed is 2 to 8"),
        (lambda: QAT("8"), "the bits of weights are '8', allowed is 1, 1.58 or 2 to 8"),
        (lambda: QAT(float("nan")), "the bits of weights are nan"),
        (lambda: QAT(8, True), "the bits of inputs are True, allowed is 2 to 8"),
        (lambda: QAT(8, 8, first_last_bits=17), r"first_last_bits is 17, allowed is \[1, 8\]"),
        (lambda: create("lsq", bits=float("inf")), "bits is inf, allowed is 2 to 8"),
        (lambda: QAT(4, 1), "bits is 1.*allowed is 2 to 8"),
        (lambda: QAT(None, None), "nothing is to be quantised"),
        (lambda: QAT(weight="lsqq"), "unknown quantizer 'lsqq'"),
        (lambda: QAT(weight="pact"), "pact is no quantiser of weights"),
        (lambda: QAT(weight="mx", bits_w=4), "mx makes 8 bits, 4"),
        (lambda: QAT(granularity="group"), "granularity is 'group' and group_size None"),
        (lambda: QAT(weight_options={"bitz": 3}), "no parameter 'bitz'"),
        (lambda: QAT(include={"*": "4"}), "'4' says no bits"),
        (lambda: QAT(scale_lr=-1.0), "scale_lr is -1.0"),
        (
            lambda: make_trainer(callbacks=[QAT(granularity="group", group_size=5)]).fit(Plain(), data()),
            "net.0: group_size 5 does not divide the 16 weights",
        ),
        (
            lambda: make_trainer(callbacks=[QAT(), QAT(4, 4, exclude=["net.4"])]).fit(Plain(), data()),
            "two techniques want the quantization stage",
        ),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(LossplugError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_non_finite_inputs_and_optimizers_without_the_scales():
    loader = data()
    loader.dataset.tensors[0][3, 2] = float("nan")
    with pytest.raises(LossplugError, match=r"net\.0 \(input\): 1 of 128 entries of the activation are NaN"):
        make_trainer(callbacks=[QAT()]).fit(Plain(), loader)

    class Early(Plain):
        def __init__(self):
            super().__init__()
            self.early = torch.optim.SGD(self.net.parameters(), 0.1)

        def configure_optimizers(self):
            return self.early

    with pytest.raises(LossplugError, match="no optimizer holds the scale"):
        make_trainer(callbacks=[QAT()]).fit(Early(), data())
    with pytest.raises(LossplugError, match="no training batch has set its scales"):
        create("lsq", role="activation").quantize(torch.ones(2))
    module = Plain()
    make_trainer(callbacks=[QAT(4, 4)]).fit(module, data())
    quantizer(module.net[3]).s.data[2] = -1.0
    with pytest.raises(LossplugError, match=r"net\.3\.weight: 1 of 32 values of s are zero, negative"):
        fold(module)
    assert isinstance(module.net[3], PluggedLayer)


def test_resuming_with_other_bits_is_refused(tmp_path):
    trainer = make_trainer(max_epochs=1, callbacks=[QAT(4, 4)])
    trainer.fit(Plain(), data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(LossplugError, match=r"the checkpoint has bits \[4, 4\] there, this run \[3, 4\]"):
        make_trainer(callbacks=[QAT(3, 4)]).fit(Plain(), data(), ckpt_path=tmp_path / "a.ckpt")


def test_many_bits_start_from_the_range_few_from_the_mean():
    x = torch.randn(64, 64)
    x[0, 0] = 1000.0  # a large activation, as language models have them
    for bits, start in ((8, "minmax"), (5, "minmax"), (4, "lsq"), (2, "lsq")):
        found, expected = (create("lsq", bits=bits, init=init, role="activation").train() for init in ("auto", start))
        assert torch.equal(found(x), expected(x))
    assert float(create("lsq", bits=8, role="activation").train()(x).max()) == 1000.0
