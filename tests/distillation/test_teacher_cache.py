"""Caches of teacher logits: ids, files, resuming, training from them, and one line per mistake."""

import json

import pytest
import torch
import torch.nn.functional as F
from distillation_runs import CLASSES, FEATURES, Plain, data, network, same, samples, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_online_distillation import LLAMA, llama, texts
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import Distillation
from lightning_lossplug.distillation import (
    CachedTeacher,
    Identified,
    cache_teacher,
    content_ids,
    create,
    top_logits,
)
from lightning_lossplug.distillation.cache_files import MANIFEST, read_manifest, write_manifest
from lightning_lossplug.integrations import CausalLM, WithSampleIds

pytestmark = pytest.mark.filterwarnings("ignore")


def teacher():
    return network(12, seed=5)


def shuffled(seed, dataset=None, batch_size=8, **options):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset or samples(), batch_size, shuffle=True, generator=generator, **options)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64]))
def test_ids_depend_on_the_sample_alone(seed, dtype):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 3, (6, 4, 5), generator=g).to(dtype)
    ids = content_ids(x)
    order = torch.randperm(6, generator=g)
    assert torch.equal(content_ids(x[order]), ids[order])
    distinct = len(x.flatten(1).unique(dim=0))
    assert len(ids.unique()) == distinct
    y = x.clone()
    y[0, 3, 4] += 1
    assert content_ids(y)[0] != ids[0]


def test_ids_of_many_samples_differ_and_padding_changes_none():
    x = torch.arange(200_000).float()[:, None] / 7
    assert len(content_ids(x).unique()) == 200_000
    tokens = torch.tensor([[5, 0, 0, 9, 9], [5, 0, 7, 7, 7]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    ids = content_ids(tokens, mask)
    assert ids[0] == content_ids(tokens[:1, :3], mask[:1, :3])[0]
    assert ids[0] != ids[1]  # token 0 is no padding
    wide = torch.randn(2, 200_000)  # several chunks of coefficients
    assert content_ids(wide)[0] != content_ids(wide.roll(1, 1))[0]


def test_training_from_a_cache_is_training_with_the_teacher(tmp_path):
    made = cache_teacher(teacher(), data(batch_size=16), tmp_path / "c", shard_mb=0.0005)
    assert made["samples"] == 64
    assert len(made["shards"]) > 1
    modules = []
    for source in (teacher(), f"cache:{tmp_path / 'c'}"):
        module = Plain()
        trainer(Distillation(source, "dkd"), max_epochs=3).fit(module, shuffled(0))
        modules.append(module.state_dict())
    for key, value in modules[0].items():
        torch.testing.assert_close(modules[1][key], value, rtol=1e-4, atol=1e-6)


def test_a_teacher_keeps_its_mode_and_gradients(tmp_path):
    live = teacher()
    before = {k: v.clone() for k, v in live.state_dict().items()}
    cache_teacher(live, data(), tmp_path)
    assert same(live.state_dict(), before)
    assert live.training
    assert all(p.requires_grad for p in live.parameters())


class Killed(Exception):
    pass


def killed_after(batches, n):
    for i, batch in enumerate(batches):
        if i == n:
            raise Killed
        yield batch


@pytest.mark.parametrize("batch_size", [8, 12])
def test_a_killed_run_goes_on(tmp_path, batch_size):
    whole = cache_teacher(teacher(), data(), tmp_path / "whole", shard_mb=0.0005)
    with pytest.raises(Killed):
        cache_teacher(teacher(), killed_after(data(), 5), tmp_path / "killed", shard_mb=0.0005)
    with pytest.raises(LossplugError, match=r"is not complete \(24 samples\)"):
        CachedTeacher(tmp_path / "killed")
    calls, live = [], teacher()
    live.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    resumed = cache_teacher(live, data(batch_size=batch_size), tmp_path / "killed", shard_mb=0.0005)
    assert resumed["samples"] == whole["samples"]
    assert resumed["data"] == whole["data"]
    assert 40 <= sum(calls) <= 40 + batch_size  # what is stored is not asked again
    if batch_size == 8:
        assert [s["sha256"] for s in resumed["shards"]] == [s["sha256"] for s in whole["shards"]]
    calls.clear()
    assert cache_teacher(live, data(), tmp_path / "killed")["complete"]
    assert not calls
    x = samples().tensors[0]
    torch.testing.assert_close(CachedTeacher(tmp_path / "killed")(x), CachedTeacher(tmp_path / "whole")(x))


def test_a_damaged_file_is_an_error_and_made_anew(tmp_path):
    made = cache_teacher(teacher(), data(), tmp_path, shard_mb=0.0005)
    path = tmp_path / made["shards"][1]["file"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(LossplugError, match=rf"is truncated: {len(whole) - 5} of {len(whole)} bytes"):
        CachedTeacher(tmp_path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(LossplugError, match="another checksum"):
        CachedTeacher(tmp_path)
    CachedTeacher(tmp_path, verify=False)
    assert cache_teacher(teacher(), data(), tmp_path, shard_mb=0.0005)["shards"] == made["shards"]
    assert path.read_bytes() == whole
    path.unlink()
    with pytest.raises(LossplugError, match="can't be read"):
        CachedTeacher(tmp_path)


def noisy():
    """Random augmentation: the inputs are never the same twice."""

    class Noisy(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.randn(FEATURES), y

    return Noisy(*samples().tensors)


@pytest.mark.parametrize("collate", [False, True])
def test_ids_of_the_data_set_under_augmentation(tmp_path, collate):
    stack = (lambda rows: [torch.stack(column) for column in zip(*rows, strict=True)]) if collate else None
    clean = WithSampleIds(samples(), collate_fn=stack)
    cache_teacher(teacher(), DataLoader(clean, 16, collate_fn=clean.collate), tmp_path)
    seen = []

    class Sees(Plain):
        def training_step(self, batch, batch_idx):
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    callback = Distillation(f"cache:{tmp_path}", "kd")
    trainer(callback, max_epochs=2).fit(Sees(), shuffled(0, WithSampleIds(noisy())))
    assert not any(isinstance(batch, Identified) for batch in seen)
    y = seen[-1][1]
    x = samples().tensors[0]
    frozen = teacher().eval()
    with torch.no_grad():
        logits = frozen(x)
    ids = torch.tensor([clean.sample_id(i) for i in range(64)])
    torch.testing.assert_close(CachedTeacher(tmp_path)(x, sample_ids=ids), logits)
    assert len(y) == 8
    with pytest.raises(LossplugError, match="Wrap the data set: WithSampleIds"):
        trainer(Distillation(f"cache:{tmp_path}")).fit(Plain(), data())
    other = TensorDataset(samples().tensors[0], samples().tensors[1].flip(0))
    with pytest.raises(LossplugError, match="has no logits of 8 of the 8 samples"):
        trainer(Distillation(f"cache:{tmp_path}")).fit(Plain(), shuffled(0, WithSampleIds(other)))


def test_top_k_of_a_language_model(tmp_path):
    frozen = llama(2)
    made = cache_teacher(frozen, texts(), tmp_path, k=8, dtype="float32")
    assert made["tokens"]
    assert made["classes"] == LLAMA["vocab_size"]
    torch.manual_seed(0)
    module = CausalLM(from_config=LLAMA)
    batch = next(iter(texts()))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert made["rows"] == sum(int(b["attention_mask"].sum()) for b in texts())
    keep = mask[:, 1:].bool()
    with torch.no_grad():
        z_s = module.model(ids, attention_mask=mask).logits[:, :-1]
        z_t = frozen.eval()(ids, attention_mask=mask).logits[:, :-1]
        want = create("topk_logits")(z_s, *top_logits(z_t, 8, torch.float32), mask=keep)
    callback = Distillation(f"cache:{tmp_path}", "topk_logits")
    trainer(callback, max_steps=1).fit(module, texts())
    torch.testing.assert_close(callback.logs["kd"], want, rtol=1e-4, atol=1e-6)
    with pytest.raises(LossplugError, match="holds the 8 largest of 32 log-probabilities"):
        Distillation(f"cache:{tmp_path}", "gkd")
    with pytest.raises(LossplugError, match=r"LlamaForCausalLM\) has 40 outputs, the teacher of the cache .* 32"):
        trainer(callback, max_steps=1).fit(CausalLM(from_config={**LLAMA, "vocab_size": 40}), texts())


def test_the_rest_is_stored_exactly(tmp_path):
    live = nn.Linear(4, 300)
    x = torch.randn(8, 4)
    cache_teacher(live, [(x,)], tmp_path, k=20)
    stored = CachedTeacher(tmp_path)(x)
    log_p = live(x).log_softmax(1)
    want = log_p.scatter(1, stored.ids, -torch.inf).logsumexp(1, keepdim=True)
    torch.testing.assert_close(stored.rest, want.detach())
    z = torch.randn(8, 300, dtype=torch.float64)
    exact = create("topk_logits")(z, stored.ids, log_p.gather(1, stored.ids).double(), rest=want.double())
    torch.testing.assert_close(create("topk_logits")(z, *stored[:2], rest=stored.rest), exact, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(create("topk_logits")(z, stored.ids, log_p.gather(1, stored.ids).double()), exact)


class Broken(nn.Linear):
    def forward(self, x):
        return super().forward(x).log()


def test_mistakes_are_one_line(tmp_path):
    cache_teacher(teacher(), data(), tmp_path / "c")
    cache = f"cache:{tmp_path / 'c'}"
    cases = [
        (
            lambda: cache_teacher(network(seed=6), data(), tmp_path / "c"),
            r"holds logits of teacher 'Sequential 184 \w+'",
        ),
        (lambda: cache_teacher(teacher(), data(), tmp_path / "c", k=2), "holds logits of k None, asked for is 2"),
        (
            lambda: cache_teacher(teacher(), shuffled(1), tmp_path / "c"),
            "begun with other data, or the same in another",
        ),
        (lambda: cache_teacher(teacher(), list(data())[:4], tmp_path / "c"), "holds 64 samples, the data have 32"),
        (
            lambda: cache_teacher(Broken(FEATURES, CLASSES), data(), tmp_path / "n"),
            "the logits of the teacher Broken hold NaN",
        ),
        (lambda: cache_teacher(teacher(), [], tmp_path / "e"), "no batch to run the teacher on"),
        (lambda: cache_teacher(teacher(), data(), tmp_path / "e", dtype="int8"), "dtype is 'int8'"),
        (lambda: CachedTeacher(tmp_path / "none"), "holds no teacher_cache.json"),
        (lambda: CachedTeacher(tmp_path / "c", of=network(seed=6)), "is a cache of the teacher Sequential 184"),
        (lambda: Distillation(cache, "topk_logits"), "holds all logits"),
        (lambda: Distillation(teacher(), "topk_logits"), "is for a cache"),
        (lambda: Distillation(cache, agreement=True), "agreement needs a teacher that runs"),
        (lambda: Distillation(cache, feature_loss="at", layers={"0": "0"}), "feature_loss needs a teacher that runs"),
        (lambda: trainer(Distillation(cache)).fit(Plain(), data(72)), "has no logits of 8 of the 8 samples"),
    ]
    for make, message in cases:
        with pytest.raises(LossplugError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
    manifest = read_manifest(tmp_path / "c")
    del manifest["samples"]
    write_manifest(tmp_path / "c", manifest | {"complete": False})
    with pytest.raises(LossplugError, match=r"is not complete \(0 samples\)"):
        CachedTeacher(tmp_path / "c")
    (tmp_path / "c" / MANIFEST).write_text("{")
    with pytest.raises(LossplugError, match="is no JSON"):
        CachedTeacher(tmp_path / "c")
    (tmp_path / "c" / MANIFEST).write_text(json.dumps({"format": 99}))
    with pytest.raises(LossplugError, match="has format 99"):
        CachedTeacher(tmp_path / "c")


def test_another_cache_on_resume_is_an_error(tmp_path):
    cache_teacher(teacher(), data(), tmp_path / "a")
    cache_teacher(network(12, seed=6), data(), tmp_path / "b")
    first = trainer(Distillation(f"cache:{tmp_path / 'a'}"))
    first.fit(Plain(), data())
    first.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(LossplugError, match=r"started with the teacher Sequential 184 \w+, cached for 64 samples"):
        second = trainer(Distillation(f"cache:{tmp_path / 'b'}"), max_epochs=2)
        second.fit(Plain(), data(), ckpt_path=tmp_path / "one.ckpt")


def test_a_cache_knows_its_teacher(tmp_path):
    cache_teacher(teacher(), data(), tmp_path)
    CachedTeacher(tmp_path, of=teacher())
    x, y = samples().tensors
    with torch.no_grad():
        want = F.cross_entropy(teacher().eval()(x), y)
    torch.testing.assert_close(F.cross_entropy(CachedTeacher(tmp_path)(x), y), want)
