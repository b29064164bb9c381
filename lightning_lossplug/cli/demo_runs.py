"""The runs of ``lossplug demo``: a small vision transformer on scikit-learn's digits, dense and compressed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_lossplug.callbacks import NMSparsity, SwapLoss, TechniqueCallback
from lightning_lossplug.integrations import DigitsData, ImageClassifier
from lightning_lossplug.integrations.artifact import nm_layers
from lightning_lossplug.integrations.evaluation import weight_numbers
from lightning_lossplug.surgery import fold
from lightning_lossplug.technique import Technique

IMAGE, PATCH = 8, 2  # pixels: the transformer sees 16 tokens
NETWORK = {"patch_size": PATCH, "embed_dim": 64, "depth": 2, "num_heads": 4, "class_token": False, "global_pool": "avg"}
RATE = 5e-3
POINTS = 200  # of a curve over steps


@dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    Args:
        name: For tables and legends.
        code: The callbacks as a person would type them.
        callbacks: Makes them.
    """

    name: str
    code: str
    callbacks: Callable[[], list[Callback]]


VARIANTS = (
    Variant("dense", "no callbacks", list),
    Variant(
        "2:4, SR-STE",
        'SwapLoss("poly_loss"), NMSparsity(2, 4, "nm_srste")',
        lambda: [SwapLoss("poly_loss"), NMSparsity(2, 4, "nm_srste")],
    ),
    Variant(
        "1:16, mask decay",
        'SwapLoss("poly_loss"), NMSparsity(1, 16, "mdgf_exponential")',
        lambda: [SwapLoss("poly_loss"), NMSparsity(1, 16, "mdgf_exponential")],
    ),
)


@dataclass
class Outcome:
    """What a run gave.

    Args:
        variant: Which one.
        module: The trained module, as training left it.
        techniques: The techniques that worked on it.
        metrics: On the test split.
        numbers: Parameters, sparsity, bytes of the folded network.
        layers: Sparsity of every weight matrix of the folded network, by name.
        seconds: Of the fit.
        step_ms: Median time of a training step: of the processor, where the training runs on it (what else the machine
            does hardly moves that), else on the wall clock.
        curves: Points over steps: ``accuracy`` on the validation split, ``sparsity`` and ``decay`` in training.
    """

    variant: Variant
    module: ImageClassifier
    techniques: list[Technique[Any]]
    metrics: dict[str, float]
    numbers: dict[str, float]
    layers: dict[str, float]
    seconds: float
    step_ms: float
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


class Recorder(Callback):
    """Keeps curves and step times, and reports every step."""

    def __init__(self, report: Callable[[int, int, float | None], None]) -> None:
        self.report = report
        self.curves: dict[str, list[tuple[int, float]]] = {"accuracy": [], "sparsity": [], "decay": []}
        self.times: list[float] = []
        self._started = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock of a step."""
        self._started = self._clock(trainer)

    @staticmethod
    def _clock(trainer: Trainer) -> float:
        return time.process_time() if trainer.strategy.root_device.type == "cpu" else time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops it, and asks the techniques where they stand."""
        self.times.append(self._clock(trainer) - self._started)
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        if step % max(total // POINTS, 1) == 0 or step == total:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, TechniqueCallback):
                    for key, value in callback.technique.logs().items():
                        if key in self.curves:
                            self.curves[key].append((step, float(value)))
        accuracy = self.curves["accuracy"]
        self.report(step, total, accuracy[-1][1] if accuracy else None)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the accuracy on the validation split."""
        if not trainer.sanity_checking:
            self.curves["accuracy"].append((trainer.global_step, float(trainer.callback_metrics["val_accuracy"])))


def train(
    variant: Variant, *, epochs: int, seed: int, root: Path, report: Callable[[int, int, float | None], None]
) -> Outcome:
    """Trains one variant with an ordinary Trainer and tests it.

    Args:
        variant: What to do.
        epochs: Passes over the 1257 training images.
        seed: Same seed, same initial weights, same order of the data.
        root: The Trainer's ``default_root_dir``.
        report: Called after every step with the step, the number of steps and the last validation accuracy.
    """
    seed_everything(seed)
    data = DigitsData(batch_size=64, seed=seed)
    module = ImageClassifier(
        "vit_tiny_patch16_224", num_classes=10, in_chans=1, img_size=IMAGE, model_kwargs=NETWORK, lr=RATE
    )
    recorder = Recorder(report)
    callbacks = variant.callbacks()
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, recorder],
        default_root_dir=root,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    started = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - started
    tested = trainer.test(module, data, verbose=False)[0]
    techniques = [callback.technique for callback in callbacks if isinstance(callback, TechniqueCallback)]
    module.cpu().eval()
    groups = {name.removeprefix("model."): layer.m for name, layer in nm_layers(techniques).items()}
    network = fold(module).get_submodule("model")
    matrices = {name: p for name, p in network.named_parameters() if p.ndim >= 2 and name.endswith("weight")}
    return Outcome(
        variant,
        module,
        techniques,
        {key.removeprefix("test_"): value for key, value in tested.items()},
        weight_numbers(network, groups),
        {name: 1 - int(p.count_nonzero()) / p.numel() for name, p in matrices.items()},
        seconds,
        statistics.median(recorder.times) * 1e3,
        recorder.curves,
    )
