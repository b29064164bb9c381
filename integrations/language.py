"""Any causal language model of transformers: a plain LightningModule, to use as it is or as an example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics.text import Perplexity

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.pretrained import build_causal_lm, load_causal_lm
from lightning_lossplug.integrations.schedule import cosine_per_step

IGNORE_INDEX = -100
_CHUNK = 1024  # tokens whose probabilities a metric update holds at once: 200 MB for 50000 words


class CausalLM(LightningModule):
    """Next-token cross-entropy on a transformers model; the plain model is ``self.model``.

    A batch is a dict with ``input_ids`` int64 ``[B, T]`` and, if it has them, ``attention_mask`` and ``labels`` of the
    same shape (labels are the input itself, -100 where nothing is to be predicted; transformers shifts them). Logged:
    ``train_loss`` and, for ``val`` and ``test``, ``*_loss`` and ``*_perplexity``.

    Args:
        model: Hub name, local folder, or path of a GGUF file, which is unpacked into dense weights.
        from_config: Instead of ``model``: fields of a configuration, ``model_type`` among them, for random weights.
        model_kwargs: Further arguments of ``from_pretrained`` or ``from_config``, such as ``attn_implementation``.
        dtype: Of the weights: ``float32`` or ``bfloat16``.
        lr: Learning rate at the peak.
        weight_decay: Weight decay of matrices and embeddings; vectors (norms, biases) get none.
        warmup_fraction: Fraction of all steps in which the learning rate rises; then half a cosine to 0.
        gradient_checkpointing: Whether to recompute activations in the backward pass instead of keeping them.

    Checkpoints hold the configuration instead of the name: ``load_from_checkpoint`` needs neither hub nor GGUF file.

    Raises:
        LossplugError: Not exactly one of ``model`` and ``from_config``; a model that cannot be loaded; unknown dtype.
    """

    def __init__(
        self,
        model: str | None = None,
        from_config: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        dtype: str = "float32",
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.05,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.weight_decay, self.warmup_fraction = lr, weight_decay, warmup_fraction
        if (model is None) == (from_config is None):
            raise LossplugError(
                "give either model or from_config" + (", not both" if model else ""),
                where="CausalLM",
                remedy="model loads weights; from_config starts from random ones",
            )
        if model is not None and not isinstance(model, (str, Path)):
            raise LossplugError(
                f"model is a {type(model).__name__} object, expected a name, a folder or a file",
                where="CausalLM",
                remedy="Put the object into a LightningModule of your own: the callbacks work on it just the same",
            )
        self.model_kwargs = model_kwargs or {}
        if from_config is not None:
            self.model = build_causal_lm(from_config, dtype=dtype, **self.model_kwargs)
        else:
            self.model = load_causal_lm(str(model), dtype=dtype, **self.model_kwargs)
        if gradient_checkpointing:
            # the newer name, where transformers has it: the older one warns there
            name = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"
            getattr(self.model, f"{name}_checkpointing_enable")()
        self.val_perplexity = Perplexity(ignore_index=IGNORE_INDEX)
        self.test_perplexity = Perplexity(ignore_index=IGNORE_INDEX)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        """Returns the output object of transformers; its ``loss`` is there if ``labels`` are given."""
        # without use_cache=False every training step would build a cache it throws away
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the model's own loss."""
        out = self(batch["input_ids"], batch.get("attention_mask"), labels_of(batch))
        self.log("train_loss", out.loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return out.loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs loss and perplexity of the validation data."""
        self._evaluate(batch, "val", self.val_perplexity)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs loss and perplexity of the test data."""
        self._evaluate(batch, "test", self.test_perplexity)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the logits of the batch, ``[B, T, vocabulary]``."""
        return self(batch["input_ids"], batch.get("attention_mask")).logits

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with warmup and cosine decay per step."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.lr)
        return cosine_per_step(optimizer, self.trainer, self.warmup_fraction)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replaces the model's name by its configuration, so that the checkpoint stands alone."""
        config = self.model.config.to_dict()
        config.pop("_name_or_path", None)
        # of the arguments for loading, such as revision or token, only this one also belongs to building
        kept = {key: value for key, value in self.model_kwargs.items() if key == "attn_implementation"}
        saved = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]
        saved.update(model=None, from_config=config, model_kwargs=kept)

    def _evaluate(self, batch: dict[str, Tensor], stage: str, perplexity: Perplexity) -> None:
        labels = labels_of(batch)
        out = self(batch["input_ids"], batch.get("attention_mask"), labels)
        update_perplexity(perplexity, out.logits, labels)
        self.log(f"{stage}_loss", out.loss, batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}_perplexity", perplexity, prog_bar=True, batch_size=len(labels))


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """Returns the labels of a batch; without any, the input, -100 where the attention mask is 0."""
    if "labels" in batch:
        return batch["labels"]
    if batch.get("attention_mask") is None:
        return batch["input_ids"]
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)


def update_perplexity(metric: Perplexity, logits: Tensor, labels: Tensor) -> None:
    """Counts logits ``[B, T, V]`` at position ``t`` against labels ``[B, T]`` at ``t + 1``, a few tokens at a time.

    The metric turns all logits it gets into probabilities; chunks bound that memory, and the result is the same, as the
    metric sums over tokens. Probabilities are taken in float32.
    """
    predicted, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    for part, target in zip(predicted.split(_CHUNK), wanted.split(_CHUNK), strict=True):
        metric.update(part[None].float(), target[None])
