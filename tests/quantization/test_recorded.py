"""Modules of an integer model that run as one function call: equal to the same modules called one by one."""

import copy
import pickle
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lossplug.quantization import IntegerLayer, QATSettings, QATTechnique, integer_model
from lightning_lossplug.quantization.emission import Emission
from lightning_lossplug.quantization.linear_bytes import runs_here
from lightning_lossplug.quantization.norm_rows import NormRows
from lightning_lossplug.quantization.recorded import KINDS, RecordedModule, record_modules
from lightning_lossplug.quantization.tape import Program, _Buffer, _places, taped

pytestmark = pytest.mark.skipif(
    not runs_here(torch.ones(4, 4, dtype=torch.int8)), reason="this processor has no VNNI, or has AMX"
)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def vit(attention_bits=8, made_with=(), **options):
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    model, x = timm.create_model("vit_tiny_patch16_224", **shape, **dict(made_with)), torch.randn(4, 3, 32, 32)
    QATTechnique(QATSettings(8, 8, attention_bits=attention_bits, **options)).attach(model)
    model.train()(x)
    return model.eval(), x


def recorded(model):
    return [m for m in model.modules() if isinstance(m, RecordedModule)]


def programs(model):
    return [p for m in recorded(model) for p in vars(m)["_programs"].found.values()]


def plain(model):
    """A copy whose modules are called one by one."""
    twin = copy.deepcopy(model)
    for m in recorded(twin):
        m.__class__ = type(m).__bases__[1]
    return twin


def layer(inputs, outputs, seed, act="none", dynamic=False):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (outputs, inputs), generator=g, dtype=torch.int8)
    scale = torch.rand(outputs, generator=g) * 0.02
    step = torch.tensor(1.0 if dynamic else 0.02)
    made = IntegerLayer(codes, scale, torch.randn(outputs, generator=g), (-127, 127), step, dynamic=dynamic)
    assert made.use("native")
    made.emission = Emission(act)
    return made.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", ["lsq", "dynamic"])
def test_blocks_of_a_vit(dtype, steps):
    made, left = integer_model(vit(activation=steps)[0])
    made = made.to(dtype)
    one_by_one = plain(made)
    # Attention with steps of its own per token has no integer form.
    assert [type(m).__name__ for m in recorded(made)] == (["RecordedMlp"] * 2 if left else ["RecordedSequential"])
    assert made.state_dict().keys() == one_by_one.state_dict().keys()
    for batch in (1, 3):
        for seed in range(3):
            x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
            got, want = made(x), one_by_one(x)
            if dtype == torch.float32:
                assert torch.equal(got, want)
            else:  # a sum is rounded once instead of twice
                assert (got - want).abs().max() <= 0.03 * want.abs().max()
    # Two norms, four layers and attention, in two blocks; of two batch sizes.
    assert [len(p) for p in programs(made)] == ([2] * 4 if left else [14] * 2)


def test_it_is_the_quantised_model():
    model, x = vit()
    made, _ = integer_model(model)
    for _ in range(3):
        got = made(x)
    assert isinstance(programs(made)[0], Program)
    assert (got - model(x)).abs().max() <= 0.03 * model(x).abs().max()


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize(
    "kind",
    [{"init_values": 0.3}, {"qk_norm": True}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}],
)
def test_vits_of_other_kinds(bits, kind):
    model, x = vit(bits, kind)
    for name, p in model.named_parameters():
        if name.endswith("gamma"):
            p.copy_(torch.linspace(-1, 1, len(p)))
    made, _ = integer_model(model)
    # Norms of queries and keys read rows that don't lie together.
    assert [type(m).__name__ for m in recorded(made)] == (
        ["RecordedMlp"] * 2 if "qk_norm" in kind else ["RecordedSequential"]
    )
    want = model(x)
    for _ in range(3):
        assert (made(x) - want).abs().max() <= 0.03 * want.abs().max()
    assert [len(p) for p in programs(made)] == ([2, 2] if "qk_norm" in kind else [14])


def test_other_numbers_are_seen():
    made, x = integer_model(vit()[0])[0], torch.randn(2, 3, 32, 32)
    other = integer_model(vit()[0])[0]
    for tensor in other.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1.1)
    [made(x) for _ in range(3)]
    made.load_state_dict(other.state_dict())
    assert torch.equal(made(x), plain(made)(x))
    [made(x) for _ in range(3)]
    made.blocks[0].mlp.fc1.use("reference")
    assert torch.equal(made(x), plain(made)(x))
    [made(x) for _ in range(3)]
    assert isinstance(programs(made)[0], str)
    made.blocks[0].mlp.fc1.use("native")
    [made(x) for _ in range(3)]
    assert isinstance(programs(made)[0], Program)
    made.blocks[1].norm1.weight.mul_(0.5)
    assert torch.equal(made(x), plain(made)(x))
    made.bfloat16().float()
    assert torch.equal(made(x), plain(made)(x))


def test_parts_that_are_replaced():
    made, x = integer_model(vit()[0])[0], torch.randn(2, 3, 32, 32)
    [made(x) for _ in range(3)]
    made.blocks[1].mlp.drop2 = nn.Flatten(0, 0)  # which does nothing
    assert torch.equal(made(x), plain(made)(x))
    made.blocks[1].mlp.fc2 = copy.deepcopy(made.blocks[0].mlp.fc2)
    assert torch.equal(made(x), plain(made)(x))
    [made(x) for _ in range(3)]
    made.blocks.append(made.blocks[0])
    assert torch.equal(made(x), plain(made)(x))
    [made(x) for _ in range(3)]
    other = {name: t * 1.1 if "norm" in name else t for name, t in made.state_dict().items()}
    made.load_state_dict(other, assign=True)
    assert torch.equal(made(x), plain(made)(x))
    assert isinstance(programs(made)[0], type(None))


def test_copies_of_a_module_that_attends():
    made, x = plain(integer_model(vit()[0])[0]), torch.randn(2, 5, 48)
    holder = nn.ModuleDict({"attn": made.blocks[0].attn}).eval()
    want = holder["attn"](x)
    assert record_modules(holder) == 1
    for twin in (holder, copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
        assert type(twin["attn"]).__name__ == "RecordedAttendingAttention"
        assert all(torch.equal(twin["attn"](x), want) for _ in range(3))
        assert isinstance(programs(twin)[0], Program)


def test_copies_and_files(tmp_path):
    made, x = integer_model(vit()[0])[0], torch.randn(2, 3, 32, 32)
    want = [made(x) for _ in range(3)][-1]
    torch.save(made, tmp_path / "model.pt")
    for twin in (
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert recorded(twin)
        assert not any("_programs" in vars(m) for m in recorded(twin))
        assert all(torch.equal(twin(x), want) for _ in range(3))


def test_hooks_inside_are_called():
    made, x = integer_model(vit()[0])[0], torch.randn(2, 3, 32, 32)
    want = [made(x) for _ in range(3)][-1]
    seen = []
    handle = made.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
    assert torch.equal(made(x), want)
    handle.remove()
    assert torch.equal(made(x), want)
    assert len(seen) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(out))
    made(x)
    handle.remove()
    assert len(seen) > 10


def test_inputs_of_other_kinds():
    blocks = recorded(integer_model(vit()[0])[0])[0]
    x = torch.randn(2, 17, 48)
    [blocks(x) for _ in range(3)]
    one_by_one = plain(blocks)
    cases = [x[:, :9], x.transpose(0, 1), x[:0], x.half(), x.double(), x.clone().requires_grad_()]
    cases += [torch.randn(n, 17, 48) for n in range(1, KINDS + 4)]
    for given_ in cases * 3:
        got, want = blocks(given_), one_by_one(given_)
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    assert len(programs(blocks)) <= KINDS
    with torch.enable_grad():
        assert blocks(x.clone().requires_grad_()).requires_grad == one_by_one(x.clone().requires_grad_()).requires_grad
    with torch.inference_mode():
        assert all(torch.equal(blocks(x.clone()), one_by_one(x)) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(blocks(x), one_by_one(x))


def test_other_numbers_of_threads():
    blocks, kept = recorded(integer_model(vit()[0])[0])[0], torch.get_num_threads()
    x = torch.randn(8, 17, 48)
    want = plain(blocks)(x)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(blocks(x), want) for _ in range(3))
    finally:
        torch.set_num_threads(kept)


def test_calls_beside_each_other():
    blocks = recorded(integer_model(vit()[0])[0])[0]
    xs = [torch.randn(2, 17, 48) for _ in range(4)]
    want, got = [plain(blocks)(x) for x in xs], [[] for _ in xs]

    def work(i):
        with torch.no_grad():
            got[i] += [blocks(xs[i]) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(len(found) == 50 and all(torch.equal(y, want[i]) for y in found) for i, found in enumerate(got))


def test_compiled_and_exported():
    blocks = recorded(integer_model(vit()[0])[0])[0]
    x = torch.randn(2, 17, 48)
    want = [blocks(x) for _ in range(3)][-1]
    assert (torch.export.export(blocks, (x,)).module()(x) - want).abs().max() <= 0.03 * want.abs().max()
    assert (torch.jit.trace(blocks, x)(x) - want).abs().max() <= 0.03 * want.abs().max()


class Graph(nn.Module):
    """Layers and sums as a list says: ``("layer", which, from)``, ``("norm", from)``, ``("sum", from, from)``."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList([layer(32, 32, 0), layer(32, 32, 1, "gelu"), layer(32, 32, 2, dynamic=True)])
        self.norm = NormRows(torch.rand(32), torch.randn(32), 1e-6, True)
        self.eval()

    def forward(self, x):
        found = [x]
        for kind, *of in self.steps:
            if kind == "layer":
                found.append(self.layers[of[0]](found[of[1] % len(found)]))
            elif kind == "norm":
                found.append(self.norm(found[of[0] % len(found)]))
            else:
                found.append(found[of[0] % len(found)] + found[of[1] % len(found)])
        return found[-1]


step = st.one_of(
    st.tuples(st.just("layer"), st.integers(0, 2), st.integers(-3, -1)),
    st.tuples(st.just("norm"), st.integers(-3, -1)),
    st.tuples(st.just("sum"), st.just(-1), st.integers(-4, -1)),
    st.tuples(st.just("sum"), st.integers(-4, -1), st.just(-1)),
)


@given(steps=st.lists(step, min_size=1, max_size=9), rows=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_any_order_of_layers_and_sums(steps, rows):
    module = Graph(steps)
    x, other = torch.randn(2, rows, 32)
    with taped(x) as tape:
        y = module(x)
    made = tape.program(y)
    assert torch.equal(y, module(x))
    if isinstance(made, Program):
        for given_ in (x, other, x):
            assert torch.equal(made(given_), module(given_))


def test_a_block_of_sums_is_written_down():
    steps = [("norm", -1), ("layer", 0, -1), ("sum", 0, -1), ("norm", -1), ("layer", 1, -1), ("layer", 2, -1)]
    x = torch.randn(5, 32)
    module = Graph([*steps, ("sum", -4, -1)])
    with taped(x) as tape:
        y = module(x)
    assert len(tape.program(y)) == 5


BAD = {
    "it calls relu": lambda a, b, x: b(a(x).relu()),
    "it calls mul": lambda a, b, x: b(a(x) * 2),
    "it calls add_": lambda a, b, x: b(a(x).add_(1)),
    "it calls __setitem__": lambda a, b, x: overwritten(a(x), b),
    "it calls item": lambda a, b, x: b(a(x)) if x.flatten()[0].item() > 0 else a(x),
    "it calls dropout": lambda a, b, x: b(F.dropout(a(x), 0.5, True, True)),
    "it calls mean": lambda a, b, x: b(a(x - x.mean())),
    "it adds": lambda a, b, x: b(x + x),
    "it calls flatten": lambda a, b, x: b(a(x).transpose(0, 1).flatten().reshape(32, 32)),
    "what it returns is not what a function wrote": lambda a, b, x: x,
    "what it returns is a part of what a function wrote": lambda a, b, x: b(a(x))[:1],
    "it calls half": lambda a, b, x: b(a(x).half()),
    "a function reads what no other wrote": lambda a, b, x: b(a(x).transpose(0, 1)),
    "it adds what the last function did not write": lambda a, b, x: b(of_two(a(x), b(x), x)),
}


def overwritten(y, b):
    y[0] = 1
    return b(y)


def of_two(first, second, x):
    return first + x  # second was written last


@pytest.mark.parametrize("reason", BAD)
def test_what_is_not_written_down(reason):
    a, b, x = layer(32, 32, 0), layer(32, 32, 1), torch.rand(32, 32)
    with taped(x) as tape:
        y = BAD[reason](a, b, x)
    assert tape.program(y) == reason


def test_a_sum_whose_parts_are_read_again():
    a, b, x = layer(32, 32, 0), layer(32, 32, 1), torch.randn(4, 32)

    def forward(x):
        y = a(x)
        return b(y + x) + y  # y alone was never kept

    with taped(x) as tape:
        y = forward(x)
    assert isinstance(tape.program(y), str)


class Mixed(nn.Module):
    """A part that can be written down, in one that can't."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(layer(32, 32, 0), layer(32, 32, 1))
        self.last = nn.Sequential(layer(32, 32, 2), nn.ReLU(), layer(32, 32, 3))
        self.eval()

    def forward(self, x):
        return self.last(F.relu(self.first(x)))


def test_only_what_can_is_replaced():
    model = Mixed()
    assert record_modules(model) == 1
    assert [name for name, m in model.named_modules() if isinstance(m, RecordedModule)] == ["first"]
    x = torch.randn(3, 32)
    want = plain(model)(x)
    assert all(torch.equal(model(x), want) for _ in range(3))


class Leaves(nn.Sequential):
    """Leaves something behind at every call."""

    def __init__(self, what):
        super().__init__(layer(32, 32, 0), layer(32, 32, 1))
        self.what, self.calls, self.seen = what, 0, []
        self.register_buffer("last", torch.zeros(()))
        self.eval()

    def forward(self, x):
        y = self[0](x)
        if self.what == "an attribute":
            self.first = y
        elif self.what == "a count":
            self.calls += 1
        elif self.what == "an entry":
            self.seen.append(y)
        elif self.what == "a buffer":
            self.last = y
        return self[1](y)


@pytest.mark.parametrize("what", ["an attribute", "a count", "an entry", "a buffer", "nothing"])
def test_what_leaves_something_behind_stays(what):
    model = nn.ModuleDict({"part": Leaves(what)})
    assert record_modules(model) == (what == "nothing")


def test_training_goes_the_old_way():
    model = Mixed()
    record_modules(model)
    model.first.append(nn.Dropout(0.5))
    x = torch.ones(3, 32)
    [model(x) for _ in range(3)]
    model.train()
    assert (model.first(x) == 0).any()


@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(0, 9), st.integers(0, 6)), min_size=2, max_size=30),
    st.integers(0, 40),
)
@settings(deadline=None)
def test_no_two_buffers_that_live_at_once_overlap(sizes, result):
    sizes = [(size, since, since + life) for size, since, life in sorted(sizes, key=lambda part: part[1])]
    buffers = [_Buffer(size, torch.empty(0), since, until) for size, since, until in sizes]
    result = 1 + result % (len(buffers) - 1)
    places, room = _places(buffers, result)
    assert set(places) == set(range(1, len(buffers))) - {result}
    for i, (_, at) in places.items():
        assert at % 64 == 0
        assert at + buffers[i].size <= room
        for j, (_, other) in places.items():
            together = buffers[i].since <= buffers[j].until and buffers[j].since <= buffers[i].until
            if i < j and together:
                assert at + buffers[i].size <= other or other + buffers[j].size <= at
