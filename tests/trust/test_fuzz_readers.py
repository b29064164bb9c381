"""Files from elsewhere, damaged or forged: a reader returns the right value or raises one line, and does nothing else.

Every reader gets random bytes, valid files with flipped bits, cuts and insertions, and valid JSON with any entry
replaced and the checksum made right again, as somebody who knows the format would. ``LOSSPLUG_FUZZ=2000`` sets the
examples per test; the default is small.
"""

import ast
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from callback_runs import Plain, data, make_trainer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import kv_factors

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import QAT, NMSparsity, read_checkpoint
from lightning_lossplug.distillation import CachedTeacher, cache_teacher
from lightning_lossplug.export import artifact_folder, read_masks, write_masks
from lightning_lossplug.export.folder import read_artifact_manifest, write_manifest
from lightning_lossplug.integrations.kv_cache import DoubleSparsity
from lightning_lossplug.integrations.packed import load_packed, save_packed
from lightning_lossplug.kv_cache import load_kv_factors, save_kv_factors
from lightning_lossplug.kv_cache.plan import layer_tensors
from lightning_lossplug.untrusted import seal

EXAMPLES = int(os.environ.get("LOSSPLUG_FUZZ", "25"))
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


def write_cache(folder, **options):
    torch.manual_seed(0)
    cache_teacher(torch.nn.Linear(16, 5), list(data(16, 4)), folder, shard_mb=0.0005, **options)


def read_cache(folder):
    teacher = CachedTeacher(folder)
    found = teacher(next(iter(data(16, 4)))[0])
    return list(found) if isinstance(found, tuple) else found


def write_artifact(folder):
    with artifact_folder(folder) as stage:
        (stage / "model.safetensors").write_bytes(bytes(range(200)))
        write_manifest(stage, {"format": 1, "layers": {"a": {"m": 4}}})


def write_packed(folder):
    folder.mkdir()
    torch.manual_seed(0)
    module = Plain()
    make_trainer(max_steps=1, callbacks=[NMSparsity(2, 4, "nm_oneshot"), QAT(4, 8)]).fit(module, data())
    save_packed(module, folder / "a.safetensors")


def write_checkpoint(folder):
    folder.mkdir()
    torch.save({"state_dict": {"a": torch.arange(50.0)}, "callbacks": {"b": {"c": 1}}}, folder / "a.ckpt")


def write_mask_file(folder):
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(4, 9, generator=generator) < 0.5 for name in "ab"}
    write_masks(masks, folder / "masks.safetensors")


def write_double_sparsity(folder):
    folder.mkdir()
    DoubleSparsity({0: torch.tensor([[0, 3]]), 1: torch.tensor([[1, 2]])}, 16, 4, {"m": 1}).save(folder / "a.json")


READERS = {  # how to write a valid folder, and how to read it
    "cache": (write_cache, read_cache),
    "top-k cache": (lambda folder: write_cache(folder, k=2), read_cache),
    "kv factors": (lambda folder: save_kv_factors(kv_factors(), folder), lambda f: plain_factors(load_kv_factors(f))),
    "artifact": (write_artifact, read_artifact_manifest),
    "packed": (write_packed, lambda folder: load_packed(Plain(), folder / "a.safetensors").state_dict()),
    "checkpoint": (write_checkpoint, lambda folder: read_checkpoint(folder / "a.ckpt")),
    "masks": (write_mask_file, read_masks),
    "double sparsity": (write_double_sparsity, lambda folder: vars(DoubleSparsity.load(folder / "a.json"))),
}


def plain_factors(found):
    return {**layer_tensors(found), "settings": found.settings, "fingerprint": found.fingerprint, "n": found.tokens}


@pytest.fixture(scope="module", params=READERS)
def valid(request, tmp_path_factory):
    """A valid folder: its files, how it is read, and what is read."""
    write, read = READERS[request.param]
    folder = tmp_path_factory.mktemp("valid") / "folder"
    write(folder)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return files, read, read(folder)


def same(one, two):
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return isinstance(two, list) and len(one) == len(two) and all(map(same, one, two))
    return one == two


def outcome(files, read, place):
    """What a reader makes of these files: the value, or None for an error of one line; nothing else may happen."""
    folder = place / "folder"
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    before = sorted(place.rglob("*"))
    try:
        return read(folder)
    except LossplugError as error:
        assert len(str(error).splitlines()) == 1
        return None
    finally:
        assert sorted(place.rglob("*")) == before


@st.composite
def damaged(draw, files):
    name = draw(st.sampled_from(sorted(files)))
    content = bytearray(files[name])
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["flip", "cut", "insert", "swap"]))
        at = draw(st.integers(0, max(0, len(content) - 1)))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + draw(st.sampled_from([1, 8, 1 << 20]))]
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=9))
        else:
            content[at : at + 8] = draw(st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 1 << 62)]))
    return {**files, name: bytes(content)}


@FUZZ
@given(choice=st.data())
def test_damage_is_found(valid, choice, tmp_path):
    files, read, right = valid
    found = outcome(choice.draw(damaged(files)), read, tmp_path)
    assert found is None or same(found, right)


@FUZZ
@given(choice=st.data(), content=st.binary(max_size=300))
def test_any_bytes_are_refused(valid, choice, content, tmp_path):
    files, read, right = valid
    name = choice.draw(st.sampled_from(sorted(files)))
    found = outcome({**files, name: content}, read, tmp_path)
    assert found is None or same(found, right)


class Exploit:
    def __reduce__(self):
        return os.mkdir, (os.environ["LOSSPLUG_CANARY"],)


def test_nothing_is_unpickled(valid, tmp_path, monkeypatch):
    files, read, _ = valid
    monkeypatch.setenv("LOSSPLUG_CANARY", str(tmp_path / "canary"))
    archive = tmp_path / "archive"
    torch.save({"state_dict": {"a": Exploit()}}, archive)
    for content in (pickle.dumps(Exploit()), archive.read_bytes()):
        for name in files:
            assert outcome({**files, name: content}, read, tmp_path) is None
    assert not (tmp_path / "canary").exists()


STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**53 + 1, 2**63, -(2**64), 10**40, 1e308, -0.0, 0.5]),
    st.sampled_from(
        ["", "../../canary", "/etc/passwd", "a/../../b", "a\0b", "a\nb", "shard-00000.safetensors", "x" * 999]
    ),
    st.sampled_from([[], {}, [[]], [-1], [1 << 40, 1 << 40], {"": None}, [0] * 40]),
)


def paths_of(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from paths_of(child, (*path, key))


def replaced(value, path, new, drop):
    """A deep copy with one entry replaced or left out."""
    if not path:
        return new
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return copy


def forged_json(content, choice):
    plain = json.loads(content)
    plain.pop("sha256", None)
    path = choice.draw(st.sampled_from(list(paths_of(plain))))
    forged = replaced(plain, path, choice.draw(STRANGE), bool(path) and choice.draw(st.booleans()))
    return json.dumps(seal(forged) if isinstance(forged, dict) else forged)


def forged_header(content, choice):
    """A safetensors file whose header was changed, inner JSON sealed again."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    texts = {key: text for key, text in header.get("__metadata__", {}).items() if text[:1] == "{"}
    if texts and choice.draw(st.booleans()):
        key = choice.draw(st.sampled_from(sorted(texts)))
        header["__metadata__"][key] = forged_json(texts[key], choice)
    else:
        path = choice.draw(st.sampled_from(list(paths_of(header))))
        header = replaced(header, path, choice.draw(STRANGE), bool(path) and choice.draw(st.booleans()))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@FUZZ
@given(choice=st.data())
def test_forged_entries_are_values_or_one_line(valid, choice, tmp_path):
    files, read, _ = valid
    name = choice.draw(st.sampled_from(sorted(files)))
    if name.endswith(".json"):
        content = forged_json(files[name], choice).encode()
    elif name.endswith(".safetensors") and name != "model.safetensors":
        content = forged_header(files[name], choice)
    else:
        content = choice.draw(st.binary(max_size=99))
    outcome({**files, name: content}, read, tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "link", "", ".", "a\\b"])
def test_a_manifest_cannot_name_files_elsewhere(name, tmp_path):
    (tmp_path / "secret").write_bytes(b"12345678")
    write_cache(tmp_path / "cache")
    write_artifact(tmp_path / "artifact")
    for folder in ("cache", "artifact"):
        (tmp_path / folder / "link").symlink_to(tmp_path / "secret")
    path = tmp_path / "cache" / "teacher_cache.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256")
    manifest["shards"][0]["file"] = name
    path.write_text(json.dumps(seal(manifest)))
    with pytest.raises(LossplugError, match=r"none inside it|link to somewhere else"):
        CachedTeacher(tmp_path / "cache")
    path = tmp_path / "artifact" / "lossplug.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256")
    manifest["files"][name] = {"bytes": 8, "sha256": "0"}
    path.write_text(json.dumps(seal(manifest)))
    with pytest.raises(LossplugError, match=r"none inside it|link to somewhere else"):
        read_artifact_manifest(tmp_path / "artifact")


def test_absurd_sizes_take_no_memory(tmp_path):
    huge = struct.pack("<Q", 1 << 40) + b"{}"
    write_cache(tmp_path / "cache")
    shard = next((tmp_path / "cache").glob("shard*"))
    shard.write_bytes(huge)
    for read in (lambda: CachedTeacher(tmp_path / "cache", verify=False), lambda: read_masks(shard)):
        with pytest.raises(LossplugError, match=shard.name):
            read()
    nested = tmp_path / "a.json"
    nested.write_text("[" * 200_000)
    with pytest.raises(LossplugError, match="is no JSON"):
        DoubleSparsity.load(nested)
    with nested.open("wb") as file:
        file.truncate(1 << 36)  # a sparse file of 64 GiB
    with pytest.raises(LossplugError, match="larger than"):
        DoubleSparsity.load(nested)


def test_no_source_of_ours_can_unpickle():
    root = Path(__file__).resolve().parents[2]
    for room in ("lightning_lossplug", "callbacks", "integrations", "examples"):
        for path in (root / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                where = f"{path}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
                    assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve"} & set(names), where
                if not isinstance(node, ast.Call):
                    continue
                called, options = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
                assert called not in ("eval", "exec", "numpy.load", "np.load"), where
                assert called != "torch.load" or options.get("weights_only") == "True", where
                assert called != "yaml.load" or options.get("Loader") == "_StrictLoader", where
                assert "trust_remote_code" not in options, where
