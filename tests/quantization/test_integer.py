"""Packed codes and integer models: exact round trips, equality with the fake-quantised model, corrupt files."""

import copy
import json
import pickle

import pytest
import torch
from callback_runs import Plain, data, make_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from qat_cases import Convolutions
from safetensors import safe_open
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import QAT, NMSparsity
from lightning_lossplug.integrations.packed import KEY, load_packed, save_packed
from lightning_lossplug.quantization import (
    IntegerLayer,
    QATSettings,
    QATTechnique,
    QuantTransform,
    bits_for,
    create,
    integer_model,
    pack_codes,
    unpack_codes,
)
from lightning_lossplug.surgery import INPUT, fold, plug, plug_input, plugged_layers, transform_of
from lightning_lossplug.untrusted import digest_tensors, seal


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@settings(max_examples=40, deadline=None)
@given(low=st.integers(-128, 0), span=st.integers(1, 255), n=st.integers(0, 70), seed=st.integers(0, 9))
def test_pack_and_unpack(low, span, n, seed):
    high = low + span
    codes = torch.randint(low, high + 1, (n,), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, low, high)
    assert torch.equal(unpack_codes(packed, low, high, (n,)), codes.to(torch.int32))
    assert packed.numel() <= n * bits_for(low, high) / 8 + 1


def test_packing_refuses_what_is_corrupt():
    assert bits_for(-1, 1) == 1.6
    with pytest.raises(LossplugError, match="codes reach from 0 to 9, allowed is 0 to 7"):
        pack_codes(torch.tensor([0, 9]), 0, 7)
    with pytest.raises(LossplugError, match=r"3 bytes of torch\.uint8 for 4 codes, 2"):
        unpack_codes(torch.zeros(3, dtype=torch.uint8), 0, 15, (4,))
    for high in (2, 4):
        with pytest.raises(LossplugError, match="file is corrupt"):
            unpack_codes(torch.full((1,), 255, dtype=torch.uint8), 0, high, (2,))
    with pytest.raises(LossplugError, match="more than 8 bits"):
        pack_codes(torch.zeros(2), -200, 200)


def trained(module, *callbacks):
    make_trainer(max_epochs=1, callbacks=list(callbacks)).fit(module, data())
    return module.eval()


def assert_close(a, b):
    assert (a - b).abs().max() <= 1e-5 * (b.max() - b.min())


MODELS = {
    "w8a8": (Convolutions, [QAT(8, 8)]),
    "w4a4": (Plain, [QAT(4, 4)]),
    "w2a8": (Plain, [QAT(2, 8)]),
    "w1.58a8_per_tensor": (Convolutions, [QAT(1.58, 8, granularity="tensor")]),
    "observer": (Plain, [QAT(8, 8, weight="fake_quant", weight_options={"symmetric": True}, activation="fake_quant")]),
    "offset": (Convolutions, [QAT(4, 8, activation="lsq_plus")]),
    "pact": (Plain, [QAT(4, 4, activation="pact", activation_options={"alpha_init": None})]),
    "dynamic": (Convolutions, [QAT(8, 8, activation="dynamic")]),
    "dynamic 4 bits": (Plain, [QAT(4, 4, activation="dynamic")]),
    "sparse": (Plain, [QAT(8, 8), NMSparsity(2, 4)]),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_integer_model_is_the_trained_model(name, backend):
    cls, callbacks = MODELS[name]
    module = trained(cls(), *copy.deepcopy(callbacks))
    x = next(iter(data()))[0]
    with torch.no_grad():
        want = module.net(x)
        made, left = integer_model(module, backend=backend)
        assert not left
        assert not list(plugged_layers(made))
        assert_close(made.net(x), want)
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made.net))):
            assert torch.equal(getattr(twin, "net", twin)(x), made.net(x))
    layers = [m for m in made.modules() if isinstance(m, IntegerLayer)]
    assert len(layers) == 3
    assert all(m.codes.dtype == torch.int8 for m in layers)
    assert torch.equal(module.net(x), want)  # the live model is as it was


def test_convolutions_with_stride_groups_and_dilation():
    for layer in (
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8),
        nn.Conv1d(8, 4, 3, padding=1, bias=False),
    ):
        x = torch.randn(3, 8, *[9] * (layer.weight.ndim - 2))
        plug(layer, QuantTransform(create("lsq", bits=4, per_channel=True)))
        plug_input(layer, QuantTransform(create("lsq", bits=8, role="activation")))
        layer(x)
        net = nn.Sequential(layer).eval()
        made, _ = integer_model(net)
        with torch.no_grad():
            assert_close(made(x), net(x))


def test_layers_without_an_integer_form_stay_fake_quantised():
    module = trained(Plain(), QAT(include={"net.0": "w4a8", "net.3": "w4"}))
    made, left = integer_model(module)
    assert left == {"net.3": "its weight or input is not quantised"}
    x = next(iter(data()))[0]
    assert_close(made.net(x).detach(), module.net(x).detach())
    with pytest.raises(LossplugError, match=r"net\.0: no layer can be put in integers: binarydm has no integer codes"):
        integer_model(trained(Plain(), QAT(2, 8, weight="binarydm", first_last_bits=None)))
    with pytest.raises(LossplugError, match="it has no quantised layer"):
        integer_model(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("bits_w", "bits"),
    [(8, 8), (4, 4), (3, 3), (2, 2), (1, 1), (1.58, 1.6)],
)
def test_packed_files_hold_the_trained_model(bits_w, bits, tmp_path):
    module = trained(Plain(), QAT(bits_w, 8, first_last_bits=None, granularity="tensor"))
    report = save_packed(module, tmp_path / "a.safetensors")
    weights = 16 * 32 + 32 * 32
    codes = report["bytes"] - 2 * 4 * 2  # two weights, a scale and an input scale each
    assert weights * bits / 16 < codes <= weights * bits / 8 + 2  # fewer where the largest codes are unused
    x = next(iter(data()))[0]
    loaded = load_packed(Plain(), tmp_path / "a.safetensors")
    assert isinstance(loaded.net[0], IntegerLayer)
    assert_close(loaded.net(x).detach(), module.net(x).detach())
    plain = load_packed(Plain(), tmp_path / "a.safetensors", integers=False)
    for key, value in fold(module).state_dict().items():
        torch.testing.assert_close(plain.state_dict()[key], value)


def test_packed_files_keep_dynamic_inputs(tmp_path):
    module = trained(Convolutions(), QAT(8, 8, activation="dynamic"))
    save_packed(module, tmp_path / "a.safetensors")
    loaded = load_packed(Convolutions(), tmp_path / "a.safetensors")
    assert [m.dynamic for m in loaded.modules() if isinstance(m, IntegerLayer)] == [True] * 3
    x = next(iter(data()))[0]
    for factor in (1.0, 1000.0):  # the steps follow what arrives
        assert_close(loaded.net(factor * x).detach(), module.net(factor * x).detach())


@pytest.mark.parametrize(("n", "m", "bits_w"), [(2, 4, 8), (1, 8, 8), (2, 4, 4), (2, 4, 3)])
def test_sparse_codes_take_a_bit_per_weight_and_their_own(n, m, bits_w, tmp_path):
    module = Plain()
    sparse = NMSparsity(n, m, "nm_ste", exclude=["net.4"])
    quantised = QAT(bits_w, 8, first_last_bits=None, granularity="tensor")
    make_trainer(max_steps=3, callbacks=[quantised, sparse]).fit(module, data())
    report = save_packed(module.eval(), tmp_path / "a.safetensors")
    weights = 16 * 32 + 32 * 32
    assert report["bytes"] - 2 * 4 * 2 <= weights * min(bits_w, 1 + bits_w * n / m) / 8 + 4
    x = next(iter(data()))[0]
    loaded = load_packed(Plain(), tmp_path / "a.safetensors", fuse=False)
    assert_close(loaded.net(x).detach(), module.net(x).detach())
    for key, value in fold(module).state_dict().items():
        plain = load_packed(Plain(), tmp_path / "a.safetensors", integers=False)
        torch.testing.assert_close(plain.state_dict()[key], value)
    assert (plain.net[0].weight == 0).float().mean() >= 1 - n / m


def test_packed_groups_batch_norm_and_weights_alone(tmp_path):
    module = trained(Convolutions(), QAT(4, None, granularity="group", group_size=1, first_last_bits=None))
    save_packed(module, tmp_path / "a.safetensors")
    loaded = load_packed(Convolutions(), tmp_path / "a.safetensors")
    x = next(iter(data()))[0]
    torch.testing.assert_close(loaded.net(x), module.net(x))


def test_corrupt_files_are_refused_in_one_line(tmp_path):
    module, path = trained(Plain(), QAT(4, 4)), tmp_path / "a.safetensors"
    save_packed(module, path)
    whole = path.read_bytes()

    def refused(message, target=None):
        with pytest.raises(LossplugError, match=message) as caught:
            load_packed(target or Plain(), path)
        assert "\n" not in str(caught.value)

    path.write_bytes(whole[: len(whole) // 2])
    refused("may be truncated")
    path.write_bytes(b"junk")
    refused("may be truncated")
    path.write_bytes(whole)
    refused("no such weight", nn.Linear(2, 2))
    wide = Plain()
    wide.net[3] = nn.Linear(32, 64)
    refused(r"net\.3\.weight: the file has a weight of shape \[32, 32\], the module \[64, 32\]", wide)
    more = Plain()
    more.extra = nn.Linear(2, 2)
    refused("lacks 2 tensors, the first is extra.bias", more)
    path.unlink()
    refused("no such file")
    from safetensors.torch import load_file, save_file

    save_file({"a": torch.zeros(1)}, path)
    refused("no packed model")
    save_packed(module, path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    tensors["net.0.weight.scale"][0] = -1
    save_file(tensors, path, header)
    refused("another checksum")
    about = json.loads(header[KEY]) | {"tensors": digest_tensors(tensors)}
    about.pop("sha256")
    save_file(tensors, path, {KEY: json.dumps(seal(about))})
    refused("a scale is not a number above 0")
    transform_of(module.net[0], "quantization", INPUT).quantizer.s.data.fill_(0)
    with pytest.raises(LossplugError, match="1 of 1 values of s are zero, negative"):
        save_packed(module, path)
    with pytest.raises(LossplugError, match="no weight with integer codes"):
        save_packed(Plain(), path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, h: h.pop("layers"), "doesn't say which weights it holds"),
        (
            lambda t, h: h["layers"]["net.0.weight"].pop("low"),
            r"net\.0\.weight: its description can't",
        ),
        (lambda t, h: h["layers"]["net.0.weight"].update(low="x"), r"codes from x to \d in steps of 1 are no codes"),
        (lambda t, h: h["layers"]["net.0.weight"].update(bounds=[1]), "IndexError"),
        (lambda t, h: t.pop("net.0.weight.codes"), r"lacks net\.0\.weight\.codes"),
        (lambda t, h: t.update({"net.0.weight.codes": t["net.0.weight.codes"][:3].clone()}), r"net\.0\.weight: "),
        (lambda t, h: t.update({"net.0.weight.scale": torch.ones(3, 1)}), "RuntimeError.*the file is corrupt"),
        (lambda t, h: t.pop("net.0.weight.input_scale"), "KeyError"),
        (lambda t, h: t["net.0.weight.input_scale"].neg_(), "the input's scale is not above 0"),
        (lambda t, h: t.update({"net.0.bias": torch.ones(3)}), r"net\.0\.bias: the file has a weight of shape \[3\]"),
        (
            lambda t, h: h["layers"]["net.3.weight"].update(kept=5),
            r"net\.3\.weight: .* torch\.uint8 for 5 codes",
        ),
        (lambda t, h: h["layers"]["net.3.weight"].update(kept=-1), "-1 codes other than 0 are no number of codes"),
        (lambda t, h: t["net.3.weight.kept"].zero_(), r"\d+ codes for 0 places: the file is corrupt"),
        (lambda t, h: t.pop("net.3.weight.kept"), r"KeyError|lacks net\.3\.weight\.kept"),
        (lambda t, h: h["layers"]["net.3.weight"].pop("kept"), r"net\.3\.weight: .* for 1024 codes"),
    ],
    ids=range(15),
)
def test_corrupt_descriptions_are_refused_in_one_line(edit, message, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path, (key, module) = tmp_path / "a.safetensors", ("lossplug_quantized", Plain())
    sparse = NMSparsity(2, 4, "nm_oneshot", include=["net.3"])
    make_trainer(max_steps=1, callbacks=[QAT(4, 4), sparse]).fit(module, data())
    save_packed(module.eval(), path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[key])
    tensors = load_file(path)
    edit(tensors, header)
    rest = {name: value for name, value in header.items() if name != "sha256"} | {"tensors": digest_tensors(tensors)}
    save_file(tensors, path, {key: json.dumps(seal(rest))})  # with the right checksums
    with pytest.raises(LossplugError, match=message) as caught:
        load_packed(Plain(), path)
    assert "\n" not in str(caught.value)


def test_a_tied_weight_is_written_once_and_loaded_under_both_names(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.inner(self.table(x)))

    torch.manual_seed(0)
    model, x = Tied(), torch.randint(0, 50, (4, 3))
    technique = QATTechnique(QATSettings(8, None, include=["inner"]))
    technique.attach(model)
    model(x)
    save_packed(model, tmp_path / "tied.safetensors")
    with safe_open(tmp_path / "tied.safetensors", "pt") as file:
        assert "table.weight" in file.keys()  # noqa: SIM118
        assert "head.weight" not in file.keys()  # noqa: SIM118
    loaded = load_packed(Tied(), tmp_path / "tied.safetensors")
    assert loaded.head.weight is loaded.table.weight
    torch.testing.assert_close(loaded(x), fold(model)(x))


def test_a_forward_may_read_the_sizes_of_its_layers():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Linear(8, 6)

        def forward(self, x):
            x = torch.nn.functional.pad(x, (0, self.conv.kernel_size[0] + self.conv.stride[0], 0, 0))
            return self.linear(self.conv(x).mean((2, 3))).reshape(-1, self.linear.out_features, 1)

    model, x = Reads(), torch.randn(2, 4, 9, 9)
    QATTechnique(QATSettings(8, 8, first_last_bits=8)).attach(model)
    model.train()(x)
    model.eval()
    made, left = integer_model(model)
    assert not left
    with torch.no_grad():
        assert (made(x) - model(x)).abs().max() <= 0.03 * model(x).abs().max()
