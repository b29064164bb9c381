"""Full disks, folders nobody can write to, and damaged files: what was there stays, and one line says what is wrong."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from callback_runs import OrderedLoader, Plain, assert_equal, make_trainer, state_of
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import kv_factors
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import ExactResume, NMSparsity, SafeCheckpointIO, read_checkpoint
from lightning_lossplug.distillation import CachedTeacher, cache_teacher
from lightning_lossplug.export.folder import read_artifact_manifest
from lightning_lossplug.integrations.artifact import export_artifact
from lightning_lossplug.kv_cache import load_kv_factors, save_kv_factors
from lightning_lossplug.untrusted import replace_file

ROOT = Path(__file__).resolve().parents[2]
LIMITED = """
import resource, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/faults"]
from lightning_lossplug import LossplugError
from test_damaged_files import *
for action, limit in {actions!r}:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        eval(action)
    except LossplugError as error:
        print("REFUSED", error)
"""


def limited(*actions):
    """Does things in a process whose files can't grow beyond so many bytes: the disk is full (EFBIG)."""
    code = LIMITED.format(root=str(ROOT), actions=actions)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert len(lines) == len(actions), done.stdout + done.stderr
    return lines


def train(folder, steps, resume=None, exact=True, seed=0, extra=()):
    torch.manual_seed(seed)
    module = Plain(dropout=0.1)
    saver = ModelCheckpoint(folder, filename="last", every_n_train_steps=4, enable_version_counter=False)
    callbacks = [NMSparsity(2, 4, "nm_srste"), *extra, saver, *([ExactResume()] if exact else [])]
    trainer = make_trainer(max_steps=steps, max_epochs=-1, enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(module, OrderedLoader(), ckpt_path=resume)
    return module


def plain_export(folder, scale=1.0, overwrite=False):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 2))
    module[0].weight.data *= scale
    return export_artifact(module, folder, overwrite=overwrite)


def cache(folder, batches=4):
    torch.manual_seed(0)
    return cache_teacher(nn.Linear(16, 64), [torch.randn(64, 16) for _ in range(batches)], folder, shard_mb=0.015)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_full_disk_leaves_what_was_there(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    train(run, 4)
    plain_export(out)
    assert len(cache(tmp_path / "whole")["shards"]) == 4
    before = contents(tmp_path)
    export = f"plain_export({str(out)!r}, 2.0, True)"
    said = limited(
        (f"train({str(run)!r}, 8, seed=1)", len(before["run/last.ckpt"]) // 2),
        (export, 1000),
        (export, 60_000),
        (f"cache({str(tmp_path / 'cache')!r})", 10_000),
    )
    assert contents(tmp_path) == before
    for line, name in zip(said, ("last.ckpt", "out", "out", "shard-00000.safetensors"), strict=True):
        assert f"/{name}" in line, line
        assert ".part" not in line, line
        assert "can't be written" in line, line
    assert_equal(state_of(train(run, 8, run / "last.ckpt")), state_of(train(tmp_path / "b", 8)))
    plain_export(out, 2.0, True)
    assert read_artifact_manifest(out)["library"] == "torch"
    cache(tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("keep")
    for folder in (tmp_path / "file" / "x", Path("/proc/lossplug")):
        for action in (
            lambda folder=folder: train(folder, 4),
            lambda folder=folder: plain_export(folder),
            lambda folder=folder: cache(folder),
        ):
            with pytest.raises(LossplugError) as caught:
                action()
            assert str(folder) in str(caught.value)
            assert len(str(caught.value).splitlines()) == 1
    assert contents(tmp_path) == {"file": b"keep"}


def flips(content, count, seed=0):
    generator = random.Random(seed)
    for _ in range(count):
        at = generator.randrange(len(content))
        yield content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :]


def test_a_damaged_checkpoint_is_never_trained_on(tmp_path):
    train(tmp_path, 4)
    path = tmp_path / "last.ckpt"
    whole, right = path.read_bytes(), read_checkpoint(path)["state_dict"]
    refused = 0
    for content in flips(whole, 200):
        path.write_bytes(content)
        try:
            assert_equal(read_checkpoint(path)["state_dict"], right)  # the bit was one of padding
        except LossplugError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100
    for content in (whole[: len(whole) // 2], whole[:-1], whole[:100], b"", *flips(whole[:4000], 3)):
        path.write_bytes(content)
        with pytest.raises(LossplugError, match=r"last\.ckpt") as caught:
            train(tmp_path / "b", 8, path)
        assert len(str(caught.value).splitlines()) == 1


def test_a_flipped_weight_is_found_before_training(tmp_path):
    train(tmp_path, 4)
    path = tmp_path / "last.ckpt"
    content = path.read_bytes()
    weight = read_checkpoint(path)["state_dict"]["net.0.weight"].numpy().tobytes()
    at = content.index(weight) + 5
    path.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
    with pytest.raises(LossplugError, match="has another checksum"):
        train(tmp_path / "b", 8, path)


def test_damaged_shards_artifacts_and_factors_are_refused_by_name(tmp_path):
    cache(tmp_path / "cache")
    plain_export(tmp_path / "artifact")
    save_kv_factors(kv_factors(), tmp_path / "factors")
    cases = [
        (tmp_path / "cache" / "shard-00001.safetensors", lambda: CachedTeacher(tmp_path / "cache")),
        (tmp_path / "artifact" / "model.safetensors", lambda: read_artifact_manifest(tmp_path / "artifact")),
        (tmp_path / "factors" / "kv_factors.safetensors", lambda: load_kv_factors(tmp_path / "factors")),
    ]
    for path, read in cases:
        read()
        whole = path.read_bytes()
        for content in (whole[:-1], whole[:20], b"", whole + b"x", *flips(whole, 20)):
            path.write_bytes(content)
            with pytest.raises(LossplugError, match=path.name) as caught:
                read()
            assert len(str(caught.value).splitlines()) == 1
        path.unlink()
        with pytest.raises(LossplugError, match=path.name):
            read()
        path.write_bytes(whole)
        read()


def test_two_runs_that_share_a_folder_do_not_mix(tmp_path):
    first, second = SafeCheckpointIO(), SafeCheckpointIO()
    path = tmp_path / "last.ckpt"
    first.save_checkpoint({"run": 1}, path)
    first.save_checkpoint({"run": 1}, path)
    second.save_checkpoint({"run": 2}, path)  # it may go on from what an earlier run left
    with pytest.raises(LossplugError, match="another run writes its checkpoints here"):
        first.save_checkpoint({"run": 1}, path)
    assert second.load_checkpoint(path) == {"run": 2}
    second.remove_checkpoint(path)
    first.save_checkpoint({"run": 1}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"]


SECOND = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/faults"]
from lightning_lossplug import LossplugError
from test_damaged_files import *
try:
    train({folder!r}, 8)
except LossplugError as error:
    print("REFUSED", error)
"""


class Meanwhile(Callback):
    """Starts another run into a folder, and forks a child that outlives this run, in the middle of a batch."""

    def __init__(self, folder):
        self.folder, self.said, self.child = folder, "", 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 6:
            code = SECOND.format(root=str(ROOT), folder=str(self.folder))
            self.said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout
            self.child = os.fork()
            if self.child == 0:
                time.sleep(60)
                os._exit(0)


def test_a_second_run_into_the_same_folder_stops_before_its_first_step(tmp_path):
    meanwhile = Meanwhile(tmp_path / "run")
    straight = train(tmp_path / "run", 8, extra=[meanwhile])
    assert f"{tmp_path}/run: another run is writing its checkpoints here" in meanwhile.said
    assert meanwhile.said.count("\n") == 1
    assert os.listdir(tmp_path / "run") == ["last.ckpt"]
    try:
        assert_equal(state_of(train(tmp_path / "run", 8)), state_of(straight))  # a child that lives on holds no lock
    finally:
        os.kill(meanwhile.child, signal.SIGKILL)
        os.waitpid(meanwhile.child, 0)


def test_what_a_killed_writer_left_is_taken_over_and_a_live_one_is_not(tmp_path):
    part, path = tmp_path / ".a.part", tmp_path / "a"
    part.write_bytes(bytes(1000))
    replace_file(path, b"short")
    assert contents(tmp_path) == {"a": b"short"}
    with part.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(LossplugError, match="is being written by another process"):
            replace_file(path, b"other")
    assert path.read_bytes() == b"short"
    part.unlink()
    part.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LossplugError, match="can't be written"):
        replace_file(path, b"other")
    assert not (tmp_path / "elsewhere").exists()


def test_the_trainer_gets_its_own_writer_back(tmp_path):
    callback = ExactResume()
    trainer = make_trainer(max_steps=2, max_epochs=-1, callbacks=[callback])
    own = trainer.strategy.checkpoint_io
    trainer.fit(Plain(), OrderedLoader())
    assert trainer.strategy.checkpoint_io is own
    theirs = SafeCheckpointIO()
    trainer = make_trainer(max_steps=2, max_epochs=-1, callbacks=[ExactResume()], plugins=[theirs])
    trainer.fit(Plain(), OrderedLoader())
    assert trainer.strategy.checkpoint_io is theirs


def test_a_manifest_lists_every_file(tmp_path):
    plain_export(tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "lossplug.json").read_text())
    assert set(manifest["files"]) == set(contents(tmp_path / "a")) - {"lossplug.json"}
