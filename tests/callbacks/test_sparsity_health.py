"""SparsityHealth in real fits: records, resume, warning, and a run that doesn't feel it."""

import warnings

import pytest
import torch
from callback_runs import Plain, data, make_trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import NMSparsity, SparsityHealth, read_health


def fit(folder, *callbacks, epochs=2, lr=1e-2, **options):
    torch.manual_seed(0)
    module = Plain(lr=lr)
    trainer = make_trainer(max_epochs=epochs, callbacks=list(callbacks), default_root_dir=folder, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data())
    return module, trainer, [str(w.message) for w in caught if "SparsityHealth" in str(w.message)]


def test_records_curves_and_picture(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    _, trainer, _ = fit(tmp_path, NMSparsity(2, 4), SparsityHealth(), logger=logger, log_every_n_steps=4)
    rows = read_health(trainer.log_dir)
    assert sorted({row["step"] for row in rows}) == [4, 8, 12, 16]
    assert {row["layer"] for row in rows} == {"net.0", "net.3"}
    assert all(row["sparsity"] == 0.5 and 0.5 < row["kept_mass"] < 1 for row in rows)
    assert all(0 < row["pruned_grad_energy"] < 1 and 0 <= row["flip_rate"] < 1 for row in rows)
    assert all(row["pruned_grad_noise"] is not None for row in rows)
    assert (tmp_path / "sparsity_health.png").read_bytes()[:4] == b"\x89PNG"
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert "SparsityHealth/flip_rate" in header
    logged = float(trainer.callback_metrics["SparsityHealth/kept_mass"])
    assert logged == pytest.approx(sum(row["kept_mass"] for row in rows[-2:]) / 2)


def test_the_run_is_the_same_without_it(tmp_path):
    watched, _, _ = fit(tmp_path, NMSparsity(2, 4), SparsityHealth(every=1, plot=False))
    alone, _, _ = fit(tmp_path, NMSparsity(2, 4))
    for a, b in zip(watched.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_continues_the_table(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    fit(straight, NMSparsity(2, 4), SparsityHealth(every=2, plot=False), epochs=4)
    _, first, _ = fit(resumed, NMSparsity(2, 4), SparsityHealth(every=2, plot=False), epochs=2)
    first.save_checkpoint(tmp_path / "a.ckpt")
    with (resumed / "sparsity_health.csv").open("a") as file:
        file.write("18,net.0,2:4,0.5,0.5,0.5,0.5,0.5\n20,net.0,2:4")  # after the checkpoint; cut off by a kill
    torch.manual_seed(0)
    module, health = Plain(), SparsityHealth(every=2, plot=False)
    trainer = make_trainer(max_epochs=4, callbacks=[NMSparsity(2, 4), health], default_root_dir=resumed)
    trainer.fit(module, data(), ckpt_path=tmp_path / "a.ckpt")
    assert read_health(resumed) == read_health(straight)
    assert health.records == 16


class Shaker(torch.optim.SGD):
    """Steps that throw the weights about, so that masks never settle."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.normal_()
        return loss


class Restless(Plain):
    def configure_optimizers(self):
        return Shaker(self.parameters(), lr=0.0)


@pytest.mark.parametrize("stop", [False, True])
def test_masks_that_never_settle_are_told_once(stop, tmp_path):
    module, health = Restless(), SparsityHealth(every=1, plot=False, window=4, after=0.25, stop=stop)
    trainer = make_trainer(max_epochs=4, callbacks=[NMSparsity(2, 4, "nm_ste"), health], default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="the masks don't settle") as caught:
        trainer.fit(module, data())
    assert sum("don't settle" in str(w.message) for w in caught) == 1
    assert health.warned
    assert (trainer.global_step < 32) == stop


@pytest.mark.parametrize("recipe", ["nm_oneshot", "nm_srste"])
def test_masks_that_settle_are_not(recipe, tmp_path):
    options = {"lambda_w": 0.3} if recipe == "nm_srste" else {}
    health = SparsityHealth(every=1, plot=False, window=4)
    _, _, said = fit(tmp_path, NMSparsity(2, 4, recipe, **options), health, lr=1e-5)
    assert said == []


def test_mistakes(tmp_path):
    with pytest.raises(LossplugError, match="no N:M sparsity in this run"):
        fit(tmp_path, SparsityHealth())
    for options in ({"every": 0}, {"after": 1.0}, {"window": 7}, {"tolerance": -1.0}):
        with pytest.raises(LossplugError):
            SparsityHealth(**options)
    (tmp_path / "sparsity_health.csv").write_text("a,b\n1,2\n")
    with pytest.raises(LossplugError, match="has other columns"):
        read_health(tmp_path)
    assert read_health(tmp_path / "nowhere") == []
