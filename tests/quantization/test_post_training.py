"""Quantising whole models after training: every method, kinds of layers, what leaves, and what is refused."""

import copy
import threading

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_lossplug import LossplugError, registry
from lightning_lossplug.integrations.packed import load_packed, save_packed
from lightning_lossplug.quantization import integer_model, quantize_post_training
from lightning_lossplug.quantization.post.stream import stream
from lightning_lossplug.quantization.post.tails import find_tails
from lightning_lossplug.surgery import PluggedLayer, fold, latent

METHODS = {
    "rtn": {},
    "gptq": {},
    "adaround": {"iters": 60, "lr": 1e-2},
    "adaquant": {"iters": 30},
}


def digits(n=64):
    return torch.tensor(load_digits().images[:n, None] / 16, dtype=torch.float32)


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(12, 12, 3, groups=12),
        nn.Flatten(),
        nn.Linear(12, 16),
        nn.GELU(),
        nn.Linear(16, 10),
    )
    with torch.no_grad():
        for _ in range(3):
            model(digits(256))  # running statistics
    return model.eval()


EVERYTHING = ["0", "3", "5", "7", "9"]


def test_the_table_is_complete():
    entries = [e for e in registry if e.kind == "post_training" and e.family == "rounding"]
    assert {e.name for e in entries} == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits_a", [None, 8])
def test_every_method_on_convolutions(method, bits_a, tmp_path):
    model, float_model = network(), network()
    seen = []
    result = quantize_post_training(
        model,
        list(digits().split(16)),
        method,
        4,
        bits_a,
        method_options=METHODS[method],
        include=EVERYTHING,
        report=lambda name, found: seen.append((name, found)),
    )
    assert [name for name, _ in seen] == EVERYTHING
    for _, found in seen:
        assert found.bits_w == 4
        assert found.error <= found.nearest_error * (1 + 1e-5)
    x = digits(200)
    with torch.no_grad():
        want, got = float_model(x), model(x)
    assert (want - got).norm() < 0.5 * want.norm()
    for name in EVERYTHING:
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight, latent(layer))  # the rounded values are fixed points of the grid
        codes = layer.weight_transforms["quantization"].quantizer.quantize(latent(layer)).codes
        assert codes.abs().max() <= 7
    plain = fold(model)
    assert type(plain[3]) is nn.Conv2d
    report = save_packed(model, tmp_path / "packed.safetensors")
    assert report["bytes"] < report["float_bytes"] / 5
    loaded = load_packed(network(1), tmp_path / "packed.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), got, rtol=1e-4, atol=1e-5)
        if bits_a:
            whole, left = integer_model(model)
            assert not left
            torch.testing.assert_close(whole(x), got, rtol=1e-4, atol=1e-4)
    assert len(result.selection.taken) == 5


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_methods_beat_rounding_where_there_is_something_to_win(method):
    def total(name):
        model = network()
        options = {"iters": 300, "lr": 1e-2} if name == "adaround" else {}
        quantize_post_training(model, [digits(256)], name, 3, method_options=options, include=EVERYTHING)
        with torch.no_grad():
            return float((model(digits(256)) - network()(digits(256))).square().mean())

    assert total(method) < 0.7 * total("rtn")


def test_float_inputs_and_groups_and_low_rank():
    model = network()
    options = {"granularity": "group", "group_size": 4, "include": ["7", "9"]}
    result = quantize_post_training(model, [digits()], "gptq", 3, inputs="float", **options)
    assert model[7].weight_transforms["quantization"].quantizer.s.shape == (16, 3, 1)
    assert result.layers["7"].error < 0.1
    plain, helped = network(), network()
    for one, rank in ((plain, 0), (helped, 4)):
        quantize_post_training(one, None, "rtn", 2, include=["7"], lorc_rank=rank)
    with torch.no_grad():
        x = torch.randn(50, 12)
        w = network()[7]
        errors = [(one[7](x) - w(x)).norm() for one in (plain, helped)]
    assert errors[1] < 0.8 * errors[0]


def test_float_formats_are_rounded_to_nearest():
    model = network()
    options = {"weight": "mx", "weight_options": {"elem": "fp4_e2m1", "block": 4}, "first_last_bits": None}
    quantize_post_training(model, None, "rtn", 4, include=["7"], **options)
    assert (model[7].weight != latent(model[7])).any()
    with pytest.raises(LossplugError, match="needs an integer grid"):
        quantize_post_training(network(), [digits()], "gptq", 4, include=["7"], **options)


def test_language_model_with_transposed_weights():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    fields = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).eval()
    batches = [{"input_ids": torch.randint(64, (2, size)), "use_cache": False} for size in (16, 16, 9)]
    with torch.no_grad():
        before = model(**batches[0]).logits
    for method in METHODS:
        one = copy.deepcopy(model)
        options = {name: 10 for name in METHODS[method] if name == "iters"}
        result = quantize_post_training(one, batches, method, 4, 8, method_options=options)
        assert len(result.layers) == 4
        assert all(found.error <= found.nearest_error * (1 + 1e-5) for found in result.layers.values())
        with torch.no_grad():
            assert (one(**batches[0]).logits - before).norm() < 0.3 * before.norm()


def test_bits_by_pattern_and_ends():
    model = network()
    result = quantize_post_training(model, [digits()], "rtn", include={"7": "w3a8", "*": "w5"})
    bits = {name: (found.bits_w, found.bits_a) for name, found in result.layers.items()}
    assert bits == {"0": (8, None), "3": (5, None), "7": (3, 8), "9": (8, None)}


def test_same_seed_same_result():
    states = []
    for _ in range(2):
        model = network()
        options = {"iters": 20, "lr": 1e-2}
        quantize_post_training(model, [digits()], "adaround", 4, method_options=options, seed=3)
        states.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_mode_and_hooks_come_back():
    model = network().train()
    model[1].eval()
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    quantize_post_training(model, [digits()], "rtn", 4)
    assert model.training
    assert not model[1].training
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks


def refused(words, *arguments, model=None, **options):
    model = network() if model is None else model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    threads = threading.active_count()
    with pytest.raises(LossplugError, match=words):
        quantize_post_training(model, *arguments, **options)
    assert not any(isinstance(m, PluggedLayer) for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    after = model.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    assert threading.active_count() == threads


def test_bad_input_is_one_line_and_leaves_the_model():
    refused("bits is 9, allowed is 2 to 8", [digits()], "rtn", 9)
    refused("bits is 1, allowed is 2 to 8", [digits()], "rtn", 1)
    refused("unknown post_training 'gptk'. Did you mean 'gptq'", [digits()], "gptk")
    refused("has no parameter 'dampp'", [digits()], "gptq", method_options={"dampp": 1})
    refused("there are no calibration batches", [], "gptq")
    refused("there are no calibration batches", None, "rtn", 8, 8)
    refused("inputs is 'floats'", [digits()], "rtn", inputs="floats")
    refused("7: group_size 9 does not divide", [digits()], "gptq", granularity="group", group_size=9)
    late = network()
    with torch.no_grad():
        late[7].bias[0] = float("inf")
    refused("9: .* are NaN or infinite", [digits()], "rtn", lorc_rank=2, model=late, include=["7", "9"])


def test_nan_names_the_layer():
    model = network()
    with torch.no_grad():
        model[3].bias[0] = float("inf")
    words = r"5: .* of the calibration inputs are NaN or infinite"
    refused(words, [digits()], "rtn", 8, 8, model=model, include=EVERYTHING)
    refused(words, [digits()], "gptq", 4, model=model, include=EVERYTHING)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.end = nn.Linear(4, 2)

    def forward(self, x):
        return self.end(self.a(x) if x.sum() > 0 else self.b(x).relu())


def test_batches_may_take_different_ways():
    torch.manual_seed(0)
    model = Branches().eval()
    batches = [torch.ones(8, 4), -torch.rand(8, 4), torch.rand(8, 4)]
    refused("never: no calibration batch reached it", batches, "gptq", model=model)
    result = quantize_post_training(model, batches, "adaround", 4, method_options={"iters": 5}, exclude=["never"])
    assert list(result.layers) == ["a", "b", "end"]


def test_stream_gathers_every_batch_and_sees_changes():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    batches = [torch.full((1, 2), float(i)) for i in range(4)]
    found = []
    for name, inputs in stream(model, {"0": model[0], "1": model[1]}, batches, lambda m, x: m(x)):
        found.append((name, torch.cat(list(inputs.values()))))
        with torch.no_grad():
            model.get_submodule(name).weight.zero_()
            model.get_submodule(name).bias.fill_(7)
    assert [name for name, _ in found] == ["0", "1"]
    torch.testing.assert_close(found[0][1], torch.cat(batches))
    assert (found[1][1] == 7).all()


def test_stream_passes_errors_on_and_ends_its_threads():
    def broken(model, x):
        model(x)
        raise RuntimeError("from the model")

    model, threads = nn.Linear(2, 2), threading.active_count()
    with pytest.raises(RuntimeError, match="from the model"):
        list(stream(model, {"l": model}, [torch.zeros(1, 2)] * 3, broken))
    half = stream(model, {"l": model}, [torch.zeros(1, 2)] * 3, broken)
    next(half)
    half.close()
    assert threading.active_count() == threads
    assert not model._forward_pre_hooks


def test_tails_are_what_reads_the_output_alone():
    model = network()
    layers = {name: model.get_submodule(name) for name in EVERYTHING}
    tails = find_tails(model, layers, lambda: model(digits(2)))
    kinds = {name: [type(m).__name__ for m in found] for name, found in tails.items()}
    assert kinds == {"0": ["BatchNorm2d", "ReLU"], "3": ["ReLU"], "5": [], "7": ["GELU"], "9": []}
