"""Exporting a trained module as a folder that timm, transformers or torch load without this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.export.dense import dense_state, write_safetensors
from lightning_lossplug.export.folder import artifact_folder, write_manifest
from lightning_lossplug.export.hardware import hardware_report
from lightning_lossplug.integrations.artifact_files import ONNX, write_mask_file, write_onnx_file
from lightning_lossplug.integrations.network import Network, find_network
from lightning_lossplug.metrics.counts import compliant_groups, stored_bytes, zeros
from lightning_lossplug.sparsity.technique import NMTechnique
from lightning_lossplug.surgery.plug import fold
from lightning_lossplug.technique import Technique

WEIGHTS = "model.safetensors"
LOADERS = {
    "timm": 'timm.create_model("local-dir:{folder}", pretrained=True)',
    "transformers": 'transformers.{cls}.from_pretrained("{folder}")',
    "torch": 'model.load_state_dict(safetensors.torch.load_file("{folder}/' + WEIGHTS + '"))',
}


@dataclass(frozen=True)
class NMLayer:
    """The pattern of one weight.

    Args:
        n: Nonzeros per group.
        m: Group size.
        axis: Axis of the groups.
    """

    n: int
    m: int
    axis: int


def export_artifact(
    module: nn.Module,
    output: str | Path,
    *,
    techniques: Sequence[Technique[Any]] = (),
    overwrite: bool = False,
    network: str | None = None,
    tokenizer: Any = None,
    data_config: dict[str, Any] | None = None,
    source: str | None = None,
    masks: bool = False,
    onnx: bool = False,
    inputs: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Folds a copy of a module and writes it whole or not at all; the module itself stays as it is.

    The folder is read back with the library's own strict loader, and every N:M group is counted, before it takes its
    place. Besides the weights it holds ``lossplug.json``: the pattern of every layer and whether 2:4 kernels
    can use it in float16, techniques, sizes, versions, and the checksum of every other file.

    Args:
        module: A LightningModule (plugged or plain) or a network.
        output: The folder.
        techniques: The techniques that worked on it, for the manifest and the check of the patterns.
        overwrite: Whether to replace an artifact that is there.
        network: Path of the sub-module to export; None finds it.
        tokenizer: Saved beside a transformers model.
        data_config: Preprocessing of a timm model's input (``mean``, ``std`` ...), for its config.json.
        source: What it was made of, for the manifest.
        masks: Write ``masks.safetensors``, a bit per weight of the N:M layers; see :func:`export.read_masks`.
        onnx: Write ``model.onnx`` and compare it with torch in ONNX Runtime.
        inputs: Example tensors by argument name for ``onnx``; None makes them for timm and transformers models.

    Returns:
        The manifest, with ``folder``.

    Raises:
        LossplugError: The folder is taken or can't be written, a pattern is not reached, values are not finite, or the
            library can't read the artifact back.
    """
    output = Path(output)
    with artifact_folder(output, overwrite=overwrite) as stage:
        patterns = nm_layers(techniques)
        folded = fold(module)
        found = find_network(folded, network)
        inner = {found.inside(name): layer for name, layer in patterns.items()}
        state = dense_state(found.module)
        check_patterns(state, {name: layer for name, layer in inner.items() if name is not None})
        if found.library == "timm":
            _write_timm(found.module, state, stage, data_config)
        elif found.library == "transformers":
            _write_transformers(found.module, stage, tokenizer)
        else:
            write_safetensors(state, stage / WEIGHTS)
        manifest = _manifest(found, state, {k: v for k, v in inner.items() if k is not None}, techniques, source)
        if masks:
            manifest["masks"] = write_mask_file(techniques, found, state, stage)
        if onnx:
            manifest["onnx"] = {"file": ONNX, **asdict(write_onnx_file(found, stage, inputs))}
        write_manifest(stage, manifest)
    return {**manifest, "folder": str(output), "load": _loader(found, str(output))}


def nm_layers(techniques: Sequence[Technique[Any]]) -> dict[str, NMLayer]:
    """Returns the pattern of every weight that N:M techniques hold, by the name of its parameter in the module.

    Raises:
        LossplugError: A weight doesn't have its final pattern yet.
    """
    found: dict[str, NMLayer] = {}
    for technique in techniques:
        if not isinstance(technique, NMTechnique):
            continue
        for name, layer in technique.layers.items():
            n, m, candidate = layer.recipe.n, layer.recipe.m, layer.candidate
            if layer.transform.mode != "hard" or layer.pattern != (n, m):
                now = (
                    "dense"
                    if layer.pattern is None
                    else f"{layer.pattern[0]}:{layer.pattern[1]} ({layer.transform.mode})"
                )
                raise LossplugError(
                    f"the weight is {now}, not {n}:{m} yet",
                    where=name,
                    remedy="Finish the training, or shorten the recipe's schedule",
                )
            assert candidate.reduction_axis is not None
            found[f"{candidate.path}.{candidate.parameter}"] = NMLayer(n, m, candidate.reduction_axis)
    return found


def check_patterns(state: dict[str, Tensor], patterns: dict[str, NMLayer]) -> None:
    """Counts the groups of every patterned weight.

    Raises:
        LossplugError: A group has more than N nonzeros.
    """
    for name, layer in patterns.items():
        good, groups = compliant_groups(state[name], layer.n, layer.m, layer.axis)
        if good < groups:
            raise LossplugError(f"{groups - good} of {groups} groups have more than {layer.n} nonzeros", where=name)


def _write_timm(network: nn.Module, state: dict[str, Tensor], stage: Path, data_config: dict[str, Any] | None) -> None:
    import timm
    from timm.models import save_for_hf

    save_for_hf(
        network, str(stage), safe_serialization=True, data_config=data_config
    )  # its config.json is what timm builds the network from
    write_safetensors(state, stage / WEIGHTS)
    try:
        again = timm.create_model(f"local-dir:{stage}", pretrained=True)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LossplugError(
            f"timm can't build the network again from its name and arguments: {reason}",
            where=type(network).__name__,
            remedy="Create it with timm.create_model and leave its layers as they are",
        ) from error
    _compare(again, state, "timm")


def _write_transformers(network: Any, stage: Path, tokenizer: Any) -> None:
    # save_pretrained writes what from_pretrained expects: shards, tied weights, generation settings
    network.save_pretrained(stage)
    if tokenizer is not None:
        tokenizer.save_pretrained(stage)
    again, info = type(network).from_pretrained(stage, output_loading_info=True)
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if wrong:
        raise LossplugError(f"transformers can't read {len(wrong)} keys back, the first is {wrong[0]}")
    _compare(again, dense_state(network), "transformers")


def _compare(again: nn.Module, state: dict[str, Tensor], library: str) -> None:
    loaded = again.state_dict()
    for name, value in state.items():
        if name not in loaded or not torch.equal(loaded[name].cpu(), value):
            raise LossplugError(f"{library} reads another value back than was written", where=name)


def _manifest(
    found: Network,
    state: dict[str, Tensor],
    patterns: dict[str, NMLayer],
    techniques: Sequence[Technique[Any]],
    source: str | None,
) -> dict[str, Any]:
    once = {name for name, _ in (*found.module.named_parameters(), *found.module.named_buffers())}  # tied ones once
    state = {name: value for name, value in state.items() if name in once}
    weights = {name: state[name] for name, _ in found.module.named_parameters()}
    layers = {
        name: {**asdict(layer), "shape": list(state[name].shape), "sparsity": zeros(state[name]) / state[name].numel()}
        for name, layer in patterns.items()
    }
    kernels = hardware_report(found.module, dtype=torch.float16)
    why = {row.name: row.why for row in kernels.layers}
    for name, layer in layers.items():
        layer["kernel_2to4"] = why.get(name.removesuffix(".weight"), "tied to an embedding") or "usable"
    count, nought = sum(v.numel() for v in weights.values()), sum(zeros(v) for v in weights.values())
    return {
        "format": 1,
        "library": found.library,
        "class": f"{type(found.module).__module__}.{type(found.module).__qualname__}",
        "network": found.path,
        "source": source,
        "parameters": count,
        "nonzero": count - nought,
        "sparsity": nought / max(count, 1),
        "dense_bytes": sum(v.numel() * v.element_size() for v in state.values()),
        "nominal_bytes": sum(stored_bytes(v, patterns[n].m if n in patterns else None) for n, v in state.items()),
        "techniques": [{"name": t.name, "settings": asdict(t.settings)} for t in techniques],
        "layers": layers,
        "kernels_2to4": {
            "dtype": kernels.dtype,
            "backend": kernels.backend,
            "usable": len(kernels.usable),
            "products": len(kernels.layers),
        },
        "versions": _versions("lightning_lossplug", "torch", "safetensors", found.library),
    }


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from its source folder
            found[package] = getattr(require(package, "all", "an export"), "__version__", "unknown")
    return found


def _loader(found: Network, folder: str) -> str:
    return LOADERS[found.library].format(folder=folder, cls=type(found.module).__name__)
