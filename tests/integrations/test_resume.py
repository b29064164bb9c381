"""A run killed at any batch and resumed from its last checkpoint is the run that was never killed."""

import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from resume_runs import Killed, assert_continues, digits, run
from torch.utils.data import DataLoader

from lightning_lossplug.callbacks.exact_resume import ExactResume
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.data.images import ImageArrays
from lightning_lossplug.integrations.data.loader import ResumableLoader
from lightning_lossplug.integrations.data.module import as_is

ROOT = Path(__file__).resolve().parents[2]
MODES = ["straight", "killed", "resumed"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run never killed, by options."""
    cache = {}

    def get(**options):
        key = repr(sorted(options.items()))
        if key not in cache:
            cache[key] = run(tmp_path_factory.mktemp("straight"), **options)[0]
        return cache[key]

    return get


@pytest.mark.parametrize(
    ("die_after", "done"),
    [(4, 3), (8, 6), (9, 9), (11, 9), (13, 12), (19, 18)],
    ids=["first epoch", "after validation", "at the last batch", "first of epoch 2", "second epoch", "near the end"],
)
def test_killed_and_resumed(tmp_path, straight, die_after, done):
    killed, checkpoint = run(tmp_path / "killed", die_after=die_after)
    resumed, _ = run(tmp_path / "resumed", ckpt=checkpoint)
    assert_continues(straight(), killed, resumed, done)


@pytest.mark.parametrize(("die_after", "done"), [(8, 6), (13, 12)])
def test_with_accumulation(tmp_path, straight, die_after, done):
    options = {"accumulate_grad_batches": 2}
    killed, checkpoint = run(tmp_path / "killed", die_after=die_after, **options)
    resumed, _ = run(tmp_path / "resumed", ckpt=checkpoint, **options)
    assert torch.load(checkpoint)["global_step"] % 3 == 0
    assert_continues(straight(**options), killed, resumed, done if die_after == 8 else 10 + 2)


class SaveEverywhere(pl.Callback):
    """Writes a checkpoint in every hook of the training loop."""

    def __init__(self, folder):
        self.folder, self.points = folder, []

    def save(self, trainer, model):
        if not trainer.sanity_checking:
            path = self.folder / f"{len(self.points)}.ckpt"
            trainer.save_checkpoint(path)
            self.points.append((path, len(model.seen)))

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if batch_idx % 5 == 0:
            self.save(trainer, model)

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.save(trainer, model)

    def on_validation_start(self, trainer, model):
        self.save(trainer, model)

    def on_validation_end(self, trainer, model):
        self.save(trainer, model)

    def on_train_epoch_end(self, trainer, model):
        self.save(trainer, model)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 3, "val_check_interval": 5}],
    ids=["plain", "accumulation, checkpoints between micro-batches"],
)
def test_every_checkpoint_of_a_run_can_be_resumed(tmp_path, options):
    options = {**options, "limit_train_batches": 8, "limit_val_batches": 1}
    everywhere = SaveEverywhere(tmp_path)
    straight, _ = run(tmp_path / "straight", callbacks=[everywhere], **options)
    assert len(everywhere.points) > 20
    for path, done in everywhere.points:
        resumed, _ = run(tmp_path / "resumed", ckpt=path, **options)
        assert resumed.seen == straight.seen[done:], path
        for name, tensor in straight.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), (path, name)


def test_data_module_alone_sees_the_batches_left(tmp_path, straight):
    """The order needs no callback, although configure_optimizers makes Lightning forget the loader's state."""
    options = {"exact": False, "dropout": 0.0}
    killed, checkpoint = run(tmp_path / "killed", die_after=8, **options)
    resumed, _ = run(tmp_path / "resumed", ckpt=checkpoint, **options)
    assert_continues(straight(**options), killed, resumed, 6)


def test_dropout_goes_on_only_with_the_callback(tmp_path, straight):
    _, checkpoint = run(tmp_path / "killed", die_after=8, exact=False)
    resumed, _ = run(tmp_path / "resumed", ckpt=checkpoint, exact=False)
    assert resumed.seen == straight().seen[6:]
    assert not torch.equal(resumed.net[1].weight, straight().net[1].weight)


def test_workers_change_nothing(tmp_path, straight):
    killed, checkpoint = run(tmp_path / "killed", die_after=8, data=digits(num_workers=1))
    resumed, _ = run(tmp_path / "resumed", ckpt=checkpoint, data=digits(num_workers=1))
    assert_continues(straight(), killed, resumed, 6)


@pytest.mark.parametrize("estimate", [True, False], ids=["estimated_stepping_batches is read", "not read"])
def test_loader_given_to_fit(tmp_path, estimate):
    def loader():
        data = digits()
        data.setup("fit")
        return ResumableLoader(data.train_set, 16, seed=5, collate_fn=as_is)

    options = {"estimate": estimate, "limit_val_batches": 0}
    straight, _ = run(tmp_path / "straight", loader=loader(), **options)
    killed, checkpoint = run(tmp_path / "killed", die_after=14, loader=loader(), **options)
    resumed, _ = run(tmp_path / "resumed", ckpt=checkpoint, loader=loader(), **options)
    assert_continues(straight, killed, resumed, 12)


def test_loader_without_a_position_is_refused_in_mid_epoch(tmp_path):
    data = digits()
    data.setup("fit")
    plain = DataLoader(data.train_set, 16, shuffle=True, collate_fn=as_is)
    options = {"limit_val_batches": 0, "loader": plain}
    _, checkpoint = run(tmp_path / "killed", die_after=5, **options)
    with pytest.raises(LossplugError, match="after batch 3 of 10, and its DataLoader does not save its position"):
        run(tmp_path / "resumed", ckpt=checkpoint, **options)


def test_other_data_is_refused_in_mid_epoch_only(tmp_path):
    _, mid = run(tmp_path / "mid", die_after=5)
    with pytest.raises(LossplugError, match="stopped in mid-epoch with batch_size 16 and is resumed with 8"):
        run(tmp_path / "resumed", ckpt=mid, data=digits(batch_size=8))
    _, end = run(tmp_path / "end", epochs=1, every=10)
    resumed, _ = run(tmp_path / "resumed", ckpt=end, data=digits(batch_size=8))
    assert [(epoch, batch) for epoch, batch, _ in resumed.seen] == [(1, batch) for batch in range(10)]


def test_other_number_of_processes_is_refused(tmp_path):
    _, path = run(tmp_path / "killed", die_after=5)
    checkpoint = torch.load(path)
    checkpoint["callbacks"]["ExactResume"]["ranks"] *= 4
    torch.save(checkpoint, path)
    with pytest.raises(LossplugError, match="written by 4 processes, the run now has 1"):
        run(tmp_path / "resumed", ckpt=path)


def test_other_device_is_refused(tmp_path):
    _, path = run(tmp_path / "killed", die_after=5)
    checkpoint = torch.load(path)
    checkpoint["callbacks"]["ExactResume"]["device"] = "cuda"
    torch.save(checkpoint, path)
    with pytest.raises(LossplugError, match="written on cuda, the run is now on cpu"):
        run(tmp_path / "resumed", ckpt=path)


def test_validating_from_a_checkpoint_leaves_the_generators_alone(tmp_path):
    model, path = run(tmp_path, die_after=5)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=1, callbacks=[ExactResume()]
    )
    torch.manual_seed(7)
    before = torch.get_rng_state()
    trainer.validate(model, datamodule=digits(), ckpt_path=path, verbose=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_second_fit_of_the_same_objects_starts_at_the_first_batch(tmp_path, straight):
    data = digits()
    _, checkpoint = run(tmp_path / "killed", die_after=8, data=data)
    run(tmp_path / "resumed", ckpt=checkpoint, data=data)
    again, _ = run(tmp_path / "again", data=data)
    assert again.seen == straight().seen


def test_iterating_the_loader_elsewhere_does_not_move_training(tmp_path, straight):
    class Peek(pl.Callback):
        """As a calibration callback might do."""

        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            if batch_idx == 4:
                assert next(iter(trainer.train_dataloader)) is not None
                assert next(iter(trainer.datamodule.train_dataloader())) is not None

    killed, checkpoint = run(tmp_path / "killed", die_after=8, callbacks=[Peek()])
    resumed, _ = run(tmp_path / "resumed", ckpt=checkpoint, callbacks=[Peek()])
    assert_continues(straight(), killed, resumed, 6)


def test_overfit_batches_repeats_the_same_batches(tmp_path):
    model, _ = run(tmp_path, overfit_batches=3, limit_train_batches=1.0, val_check_interval=1.0, epochs=3)
    epochs = [[indices for epoch, _, indices in model.seen if epoch == wanted] for wanted in range(3)]
    assert len(epochs[0]) == 3
    assert epochs[0] == epochs[1] == epochs[2]


def test_augmentation_goes_on(tmp_path):
    """What a sample looks like depends on (seed, epoch, index), also after a resume in the second epoch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (48, 8, 8), generator=generator, dtype=torch.uint8)

    class Recorder(pl.LightningModule):
        def __init__(self, die_after):
            super().__init__()
            self.layer, self.sums, self.die_after = torch.nn.Linear(64, 10), [], die_after

        def training_step(self, batch, batch_idx):
            if len(self.sums) == self.die_after:
                raise Killed
            self.sums.append(batch[0].sum(dim=(1, 2, 3)).tolist())
            return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            data = ImageArrays(
                images, torch.zeros(48, dtype=torch.int64), white=255.0, mean=0.5, std=0.5, shift=2, flip=True
            )
            return ResumableLoader(data, 8, collate_fn=as_is, trainer=self.trainer)

    def fit(folder, ckpt=None, die_after=None):
        model = Recorder(die_after)
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)],
            max_epochs=2,
        )
        trainer.fit(model, ckpt_path=ckpt)
        return model

    straight = fit(tmp_path / "straight")
    with pytest.raises(Killed):
        fit(tmp_path / "killed", die_after=10)
    resumed = fit(tmp_path / "resumed", ckpt=tmp_path / "killed" / "step=9.ckpt")
    assert straight.sums[0] != straight.sums[6]
    assert resumed.sums == straight.sums[9:]


def two_processes(folder, *modes):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).parent / "resume_runs.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, str(folder), *modes],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "launches",
    [
        pytest.param([MODES], id="new objects"),
        pytest.param([[mode] for mode in MODES], id="new processes", marks=pytest.mark.slow),
    ],
)
def test_two_gloo_processes_killed_and_resumed(tmp_path, launches):
    for modes in launches:
        two_processes(tmp_path, *modes)
    straight, killed, resumed = ([torch.load(tmp_path / f"{mode}-{rank}.pt") for rank in range(2)] for mode in MODES)
    done = 13  # in the second epoch, between two micro-batches of one step: gradients differ by rank
    for rank in range(2):
        assert killed[rank]["seen"] == straight[rank]["seen"][:15]
        assert resumed[rank]["seen"] == straight[rank]["seen"][done:]
        for name, tensor in straight[rank]["weights"].items():
            if "running_" not in name:  # each rank counts its own batches between the broadcasts of batch norm
                assert torch.equal(tensor, straight[0]["weights"][name]), name
    for name, tensor in straight[0]["weights"].items():
        assert torch.equal(tensor, resumed[0]["weights"][name]), name
    for first, second in zip(straight[0]["seen"], straight[1]["seen"], strict=True):
        assert first[:2] == second[:2]
        assert not set(first[2]) & set(second[2])
