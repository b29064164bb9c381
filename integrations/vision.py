"""Any timm model as an image classifier: a plain LightningModule, to use as it is or as an example."""

from __future__ import annotations

from typing import Any

import timm
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.integrations.schedule import cosine_per_step

_IMAGE_KEYS, _LABEL_KEYS = ("image", "pixel_values", "x"), ("label", "labels", "y")


class ImageClassifier(LightningModule):
    """Cross-entropy on a timm model; the plain timm model is ``self.model``.

    A batch is ``(x, y)``, ``(x, y, index)`` or a dict with one of ``image``, ``pixel_values``, ``x`` and one of
    ``label``, ``labels``, ``y``. ``x`` is float ``[B, in_chans, height, width]``, ``y`` int64 ``[B]``. Logged:
    ``train_loss`` and, for ``val`` and ``test``, ``*_loss``, ``*_accuracy`` (top 1) and ``*_calibration_error`` (L1, 15
    bins).

    Args:
        model: Any name of ``timm.list_models()``, or ``hf-hub:…`` and ``local-dir:…`` names.
        num_classes: Number of classes; null keeps the head of the timm model.
        pretrained: Whether to fetch pretrained weights. Not stored in checkpoints, which bring their own weights.
        in_chans: Input channels.
        img_size: Side of the input; given to models that fix it, such as vision transformers, and left to the data for
            those that take any size.
        model_kwargs: Further arguments of ``timm.create_model``, such as ``{depth: 2}``.
        lr: Learning rate at the peak.
        weight_decay: Weight decay; biases and norms get none, as in timm.
        optimizer: Any name of ``timm.optim.list_optimizers()``.
        warmup_fraction: Fraction of all steps in which the learning rate rises; then half a cosine to 0.
        label_smoothing: Label smoothing of the training loss, 0 to 1.

    Raises:
        LossplugError: Unknown model or optimizer, arguments the model does not take, weights that cannot be fetched.
    """

    def __init__(
        self,
        model: str = "vit_tiny_patch16_224",
        num_classes: int | None = None,
        pretrained: bool = False,
        in_chans: int = 3,
        img_size: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        optimizer: str = "adamw",
        warmup_fraction: float = 0.05,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["pretrained"])
        self.lr, self.weight_decay, self.optimizer = lr, weight_decay, optimizer
        self.warmup_fraction, self.label_smoothing = warmup_fraction, label_smoothing
        if optimizer not in timm.optim.list_optimizers():
            remedy = suggestion(optimizer, timm.optim.list_optimizers())
            raise LossplugError(f"timm has no optimizer {optimizer!r}", where="optimizer", remedy=remedy)
        options: dict[str, Any] = {"pretrained": pretrained, "in_chans": in_chans, **(model_kwargs or {})}
        if num_classes is not None:
            options["num_classes"] = num_classes
        self.model = create_timm_model(model, img_size, options)
        classes = int(self.model.num_classes)  # type: ignore[arg-type]  # nn.Module's __getattr__ hides the int
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "calibration_error": MulticlassCalibrationError(classes, n_bins=15),
            }
        )
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits, ``[B, num_classes]``."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the cross-entropy of the batch."""
        x, y = images_and_labels(batch)
        loss = F.cross_entropy(self(x), y, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs loss and metrics of the validation data."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs loss and metrics of the test data."""
        self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the logits of the batch."""
        return self(images_and_labels(batch)[0])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The timm optimizer with warmup and cosine decay per step."""
        optimizer = create_optimizer_v2(self.model, opt=self.optimizer, lr=self.lr, weight_decay=self.weight_decay)
        return cosine_per_step(optimizer, self.trainer, self.warmup_fraction)

    def _evaluate(self, batch: Any, stage: str, metrics: MetricCollection) -> None:
        x, y = images_and_labels(batch)
        logits = self(x)
        metrics.update(logits.softmax(dim=-1), y)
        self.log(f"{stage}_loss", F.cross_entropy(logits, y), batch_size=len(y), sync_dist=True)
        self.log_dict(metrics, prog_bar=True, batch_size=len(y))


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """Returns ``x`` and ``y`` of a batch in any of the accepted forms.

    Raises:
        LossplugError: Another form.
    """
    if isinstance(batch, dict):
        x = next((batch[key] for key in _IMAGE_KEYS if key in batch), None)
        y = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
        if x is not None and y is not None:
            return x, y
        given = f"a dict with the keys {sorted(map(str, batch))}"
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        return batch[0], batch[1]
    else:
        given = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
    raise LossplugError(
        f"the batch is {given}",
        where="ImageClassifier",
        remedy="Give (x, y), (x, y, index) or a dict with 'image' and 'label'",
    )


def create_timm_model(name: str, img_size: int | None, options: dict[str, Any]) -> nn.Module:
    """Calls ``timm.create_model``, with ``img_size`` if the model takes one.

    Raises:
        LossplugError: Unknown name, arguments the model does not take, weights that cannot be fetched.
    """
    if ":" not in name and not timm.is_model(name):
        raise LossplugError(f"timm has no model {name!r}", where="model", remedy=suggestion(name, timm.list_models()))
    try:
        if img_size is not None:
            try:
                return timm.create_model(name, img_size=img_size, **options)
            except TypeError as error:
                if "'img_size'" not in str(error):
                    raise
        return timm.create_model(name, **options)
    except TypeError as error:
        what = f"the model does not take these arguments: {error}"
        raise LossplugError(what, where=name, remedy="Mend model_kwargs") from None
    except (OSError, RuntimeError) as error:
        if not options["pretrained"]:
            raise
        raise LossplugError(
            f"the pretrained weights cannot be loaded: {str(error).splitlines()[0]}",
            where=name,
            remedy="Check the network, or set pretrained to false",
        ) from None
