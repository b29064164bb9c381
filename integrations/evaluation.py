"""Measuring checkpoints and artifacts alike: task metrics, size, latency."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.callbacks.checkpoint import read_checkpoint, replug
from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.export.folder import MANIFEST, read_artifact_manifest
from lightning_lossplug.integrations.network import find_network, rebuild_module
from lightning_lossplug.metrics.counts import stored_bytes, zeros
from lightning_lossplug.quantization.base import Quantizer
from lightning_lossplug.registry import registry
from lightning_lossplug.sparsity.technique import NMTechnique
from lightning_lossplug.surgery.plug import fold
from lightning_lossplug.untrusted import read_json, reading


@dataclass(frozen=True)
class Subject:
    """A network to measure.

    Args:
        name: The path it was read from.
        network: In evaluation mode; plain, or plugged if its schedule isn't finished.
        groups: Group size ``m`` of the weights with an N:M pattern, by name.
        checkpoint: The Lightning checkpoint it came from, if it did.
        note: What a reader of the numbers should know.
    """

    name: str
    network: nn.Module
    groups: dict[str, int]
    checkpoint: dict[str, Any] | None = None
    note: str = ""


def load_subject(path: str | Path, model: str | None = None) -> Subject:
    """Reads a Lightning checkpoint, or a folder written by an export, ``save_for_hf`` or ``save_pretrained``.

    Args:
        path: A file or a folder; or ``timm:NAME`` and ``hf:NAME`` for published weights, ``checkpoint:FILE`` and
            ``artifact:FOLDER``.
        model: Class of the LightningModule, where a checkpoint doesn't say.

    Raises:
        LossplugError: There is nothing there that can be read, a weights-only folder, or scales that have diverged.
    """
    kind, _, name = str(path).partition(":")
    if name and kind in ("checkpoint", "artifact"):
        return load_subject(name, model)
    if name and kind in ("timm", "hf"):
        with torch.random.fork_rng(devices=[]):
            return Subject(str(path), registry.get("teacher", kind).load()(name).eval(), {})
    path = Path(path)
    if not path.exists():
        raise LossplugError(
            "there is no such checkpoint file or folder",
            where=str(path),
            remedy="Give one, or timm:NAME or hf:NAME",
        )
    if not path.is_dir():
        return _from_checkpoint(path, model)
    try:
        config = read_json(path / "config.json")
    except (OSError, LossplugError):
        raise LossplugError(
            "the folder has no readable config.json, so nothing says how to build the network",
            where=str(path),
            remedy="Evaluate its checkpoint, or a folder for timm or transformers",
        ) from None
    groups = _manifest_groups(path)  # compares checksums, so before anything is loaded
    try:
        if "architecture" in config:
            timm = require("timm", "timm", "this artifact")
            network = timm.create_model(f"local-dir:{path}", pretrained=True)
        else:
            transformers = require("transformers", "transformers", "this artifact")
            network = transformers.AutoModelForCausalLM.from_pretrained(path)
    except LossplugError:
        raise
    except Exception as error:  # a truncated file, foreign keys ...: every library has exceptions of its own
        reason = " ".join(str(error).split())[:160]
        raise LossplugError(f"the artifact can't be loaded ({reason})", where=str(path)) from error
    return Subject(str(path), network.eval(), groups)


def _manifest_groups(folder: Path) -> dict[str, int]:
    try:
        manifest = read_artifact_manifest(folder)
    except FileNotFoundError:
        return {}
    with reading(folder / MANIFEST, "the manifest"):
        return {name: int(layer["m"]) for name, layer in manifest["layers"].items()}


def _from_checkpoint(path: Path, model: str | None) -> Subject:
    checkpoint = read_checkpoint(path)
    module = rebuild_module(checkpoint, str(path), model)
    techniques = replug(module, checkpoint, path)
    module.eval()
    for quantizer in module.modules():
        if isinstance(quantizer, Quantizer) and quantizer.ready:
            quantizer.check_ready()  # a diverged scale gives numbers, but none of a model
    note = ""
    try:
        folded = fold(module)
    except LossplugError:
        folded, note = module, "schedule not finished"
    found = find_network(folded)
    # a LightningModule of another shape is called itself: only its author knows what its children take
    network = found.module if found.library != "torch" else folded
    groups = {}
    for technique in techniques:
        if isinstance(technique, NMTechnique):
            for layer in technique.layers.values():
                name = f"{layer.candidate.path}.{layer.candidate.parameter}"
                inside = found.inside(name) if found.library != "torch" else name
                if inside is not None:
                    groups[inside] = layer.recipe.m
    return Subject(str(path), network, groups, checkpoint, note)


def weight_numbers(network: nn.Module, groups: dict[str, int]) -> dict[str, float]:
    """Returns parameters, nonzeros, sparsity and bytes (dense, and nominal when zeros are not stored)."""
    count = kept = dense = nominal = 0
    for name, parameter in network.named_parameters():
        owner, _, attribute = name.rpartition(".")
        value = getattr(network.get_submodule(owner), attribute).detach()  # what the forward pass uses
        count += value.numel()
        kept += value.numel() - zeros(value)
        dense += parameter.numel() * parameter.element_size()
        nominal += stored_bytes(value, groups.get(name))
    return {
        "parameters": count,
        "nonzero": kept,
        "sparsity": 1 - kept / max(count, 1),
        "bytes": dense,
        "nominal_bytes": nominal,
    }


def task_metrics(network: nn.Module, batches: Iterable[Any], device: str = "cpu") -> dict[str, float]:
    """Measures a classifier or a language model.

    Args:
        network: In evaluation mode.
        batches: ``(x, y)``, or dicts; with ``input_ids`` it is a language model.
        device: Where it runs.

    Returns:
        ``accuracy``, ``calibration_error`` (L1, 15 bins) and ``nll``; of a language model ``nll`` and ``perplexity``.

    Raises:
        LossplugError: No batch, or one of another form.
    """
    network = network.to(device)
    meter: _Classification | _Language | None = None
    with torch.inference_mode():
        for batch in batches:
            if meter is None:
                meter = _Language() if is_language(batch) else _Classification()
            meter.update(network, batch, device)
    if meter is None:
        raise LossplugError("the test split has no batch")
    return meter.compute()


def is_language(batch: Any) -> bool:
    """Tells a batch of tokens."""
    return isinstance(batch, dict) and "input_ids" in batch


class _Classification:
    def __init__(self) -> None:
        self.metrics: Any = None
        self.nll = torch.zeros((), dtype=torch.float64)
        self.count = 0

    def update(self, network: nn.Module, batch: Any, device: str) -> None:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

        from lightning_lossplug.integrations.vision import images_and_labels

        x, y = images_and_labels(batch)
        logits = _logits(network, x.to(device)).float().cpu()
        if self.metrics is None:
            classes = logits.shape[1]
            self.metrics = (
                MulticlassAccuracy(classes, average="micro"),
                MulticlassCalibrationError(classes, n_bins=15),
            )
        for metric in self.metrics:
            metric.update(logits.softmax(1), y)
        self.nll += torch.nn.functional.cross_entropy(logits, y, reduction="sum").double()
        self.count += len(y)

    def compute(self) -> dict[str, float]:
        accuracy, calibration = (float(metric.compute()) for metric in self.metrics)
        return {"accuracy": accuracy, "calibration_error": calibration, "nll": float(self.nll) / self.count}


class _Language:
    def __init__(self) -> None:
        self.nll = torch.zeros((), dtype=torch.float64)
        self.count = 0

    def update(self, network: nn.Module, batch: Any, device: str) -> None:
        from lightning_lossplug.integrations.language import labels_of

        labels = labels_of(batch)[:, 1:].to(device)
        given = {key: batch[key].to(device) for key in ("input_ids", "attention_mask") if batch.get(key) is not None}
        logits = _logits(network, **given)[:, :-1]
        for row, target in zip(logits, labels, strict=True):  # one sequence at a time bounds the float32 copy
            self.nll += torch.nn.functional.cross_entropy(row.float(), target, reduction="sum").double().cpu()
        self.count += int((labels != -100).sum())

    def compute(self) -> dict[str, float]:
        nll = self.nll / max(self.count, 1)
        return {"nll": float(nll), "perplexity": float(nll.exp())}


def _logits(network: nn.Module, *arguments: Tensor, **given: Tensor) -> Tensor:
    try:
        output = network(*arguments, **given)
    except (TypeError, ValueError, RuntimeError, AssertionError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise LossplugError(
            f"the {type(network).__name__} can't take a batch of this data ({reason})",
            remedy="Choose the data it was trained on",
        ) from error
    return output if isinstance(output, Tensor) else output.logits


def paired_latency(
    networks: Sequence[nn.Module], batch: Any, *, device: str = "cpu", size: int = 8, rounds: int = 20
) -> list[list[float]]:
    """Times forward passes in turn, so that what else the machine does hits all alike.

    Args:
        networks: In evaluation mode, on ``device``.
        batch: A batch of the test data.
        device: Where they run.
        size: Samples of the batch that are used.
        rounds: Passes per network, after three to warm up; the order turns by one every round.

    Returns:
        Milliseconds, ``rounds`` per network.
    """
    from lightning_lossplug.integrations.vision import images_and_labels

    language = is_language(batch)
    x = (batch["input_ids"] if language else images_and_labels(batch)[0])[:size].to(device)
    times: list[list[float]] = [[] for _ in networks]
    with torch.inference_mode():
        for turn in range(-3, rounds):
            for offset in range(len(networks)):
                index = (offset + turn) % len(networks)
                _wait(device)
                started = time.perf_counter()
                networks[index](input_ids=x) if language else networks[index](x)
                _wait(device)
                if turn >= 0:
                    times[index].append((time.perf_counter() - started) * 1e3)
    return times


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
