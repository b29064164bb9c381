"""A record of how N:M masks fare in training: curves, a table per layer, a picture, a warning."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_lossplug.callbacks.technique import TechniqueCallback
from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.sparsity.health import COLUMNS, LayerHealth, Settling, mean_health, nm_health
from lightning_lossplug.sparsity.technique import NMTechnique

TABLE, PICTURE = "sparsity_health.csv", "sparsity_health.png"


class SparsityHealth(Callback):
    """Watches the masks of ``NMSparsity`` callbacks, on the steps that are logged and on no others.

    Logged, as means over layers: ``sparsity``, ``kept_mass``, ``flip_rate``, ``pruned_grad_energy`` and
    ``pruned_grad_noise`` (:class:`lightning_lossplug.sparsity.health.LayerHealth` defines them). Every layer's values
    go to ``sparsity_health.csv``, appended record by record, and after the fit to ``sparsity_health.png``. A resumed
    run continues the table: records after its checkpoint are dropped first.

    It warns, once, when masks will not settle: from ``after`` of the run on, over the last ``window`` records of one
    pattern, the mean flip rate of the later half is not below that of the earlier half, and above ``tolerance``.
    Frozen masks (``nm_oneshot``) don't flip and never warn.

    Args:
        folder: Where the files go; None: the logger's folder, else the Trainer's ``default_root_dir``.
        every: Optimizer steps between two records; None: the Trainer's ``log_every_n_steps``.
        plot: Draw the picture at the end (needs matplotlib).
        window: Records that the warning looks at, an even number >= 4.
        tolerance: Mean flip rate that counts as settled.
        after: Fraction of the run before which flips are no concern, in [0, 1); without a known length, three windows.
        stop: End the training when masks will not settle, instead of only saying so.

    Raises:
        LossplugError: A value out of range; no ``NMSparsity`` in the run; matplotlib is missing and ``plot`` is on.
    """

    def __init__(
        self,
        folder: str | None = None,
        every: int | None = None,
        plot: bool = True,
        window: int = 10,
        tolerance: float = 1e-3,
        after: float = 0.5,
        stop: bool = False,
    ) -> None:
        if every is not None and every < 1:
            raise LossplugError(f"every is {every}, allowed is >= 1", where="SparsityHealth")
        if not 0 <= after < 1:
            raise LossplugError(f"after is {after}, allowed is [0, 1)", where="SparsityHealth")
        self.folder, self.every, self.plot, self.after, self.stop = folder, every, plot, after, stop
        self.settling = Settling(window, tolerance)
        self.records = 0
        self.warned = False
        self._restored = False
        self._place: Path | None = None
        self._techniques: list[NMTechnique] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the techniques to watch."""
        if stage != "fit":
            return
        if self.plot:
            require("matplotlib", "cli", "SparsityHealth(plot=True)")
        self._restored = False
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        techniques = [c.technique for c in callbacks if isinstance(c, TechniqueCallback)]
        self._techniques = [t for t in techniques if isinstance(t, NMTechnique)]
        if not self._techniques:
            raise LossplugError(
                "there is no N:M sparsity in this run to watch",
                where="SparsityHealth",
                remedy="Add an NMSparsity callback, or leave this one out",
            )
        for technique in self._techniques:
            technique.measure = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the table, or cuts it back to where the checkpoint was."""
        if not self._restored:
            self.settling.history, self.records, self.warned = [], 0, False
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)  # on all ranks: log_dir is broadcast
        self._place = folder if trainer.is_global_zero else None
        if self._place is not None:
            kept = [row for row in read_health(folder) if row["step"] <= trainer.global_step]
            self._place.mkdir(parents=True, exist_ok=True)
            with (self._place / TABLE).open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ("step", *COLUMNS))
                writer.writeheader()
                writer.writerows(kept)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measures when a record is due: the gradients of the step are there and unscaled."""
        step = trainer.global_step + 1
        every = self._every(trainer)
        if not every or step % every:
            return
        rows = [row for technique in self._techniques for row in nm_health(technique, optimizer)]
        if not rows:
            return
        means = mean_health(rows)
        pl_module.log_dict({f"SparsityHealth/{k}": v for k, v in means.items()}, on_step=True, on_epoch=False)
        if self._place is not None:
            with (self._place / TABLE).open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, ("step", *COLUMNS)).writerows({"step": step, **row.as_dict()} for row in rows)
        self.records += 1
        self._watch(trainer, step, rows)

    def _every(self, trainer: Trainer) -> int:
        return self.every or trainer.log_every_n_steps  # type: ignore[attr-defined]

    def _watch(self, trainer: Trainer, step: int, rows: list[LayerHealth]) -> None:
        flips = [row.flip_rate for row in rows if row.flip_rate is not None]
        if not flips:
            return
        patterns = " ".join(sorted({row.pattern for row in rows}))
        found = self.settling.update(sum(flips) / len(flips), patterns)
        total = trainer.estimated_stepping_batches
        known = math.isfinite(total) and total > 0
        early = step < self.after * total if known else self.records < 3 * self.settling.window
        if found is None or early or self.warned:
            return
        self.warned = True
        rank_zero_warn(
            f"SparsityHealth: the masks don't settle: at step {step}, {found[1]:.2%} of the entries flip per mask "
            f"update over the last {self.settling.window // 2} records, {found[0]:.2%} over those before. "
            + ("Training stops" if self.stop else "Stop early, lower the learning rate, or pull harder (lambda_w)")
        )
        if self.stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the picture."""
        if self._place is None:
            return
        rows = read_health(self._place)
        if not rows:
            rank_zero_warn(
                f"SparsityHealth: no record: the run ended after {trainer.global_step} steps, a record is taken every "
                f"{self._every(trainer)}. Set every="
            )
            return
        if self.plot:
            from lightning_lossplug.sparsity.health_plot import draw_health

            draw_health(rows, self._place / PICTURE)
        rank_zero_info(f"SparsityHealth: {len(rows)} records in {self._place / TABLE}")

    def state_dict(self) -> dict[str, Any]:
        """The window of flip rates, and whether the warning was given."""
        return {
            "pattern": self.settling.pattern,
            "history": list(self.settling.history),
            "records": self.records,
            "warned": self.warned,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.settling.pattern, self.settling.history = state_dict["pattern"], list(state_dict["history"])
        self.records, self.warned = state_dict["records"], state_dict["warned"]
        self._restored = True


def read_health(folder: str | Path) -> list[dict[str, Any]]:
    """Reads the table that :class:`SparsityHealth` wrote into a folder; an empty list where there is none.

    Raises:
        LossplugError: The table is another file's.
    """
    path = Path(folder) / TABLE
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != ["step", *COLUMNS]:
            raise LossplugError("the table has other columns", where=str(path), remedy="Move it away")
        for row in reader:
            if None in row.values():  # the process was killed while it wrote the line
                continue
            numbers = {k: float(v) if v else None for k, v in row.items() if k not in ("step", "layer", "pattern")}
            rows.append({"step": int(row["step"]), "layer": row["layer"], "pattern": row["pattern"], **numbers})
    return rows
