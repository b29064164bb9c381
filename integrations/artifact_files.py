"""The optional files of an artifact: packed masks, and an ONNX file with example inputs made for the network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.export.masks import MASKS, write_masks
from lightning_lossplug.export.onnx_file import OnnxCheck, export_onnx
from lightning_lossplug.integrations.network import Network
from lightning_lossplug.sparsity.technique import NMTechnique
from lightning_lossplug.technique import Technique

ONNX = "model.onnx"
TOKENS = 16  # length of the example sequence; the exported axis is dynamic


def write_mask_file(
    techniques: Sequence[Technique[Any]], found: Network, state: Mapping[str, Tensor], stage: Path
) -> str:
    """Writes the masks of the N:M layers inside the network, and returns the file's name.

    Raises:
        LossplugError: There is no N:M layer, or a weight is nonzero where its mask prunes.
    """
    masks: dict[str, Tensor] = {}
    for technique in techniques:
        for layer in technique.layers.values() if isinstance(technique, NMTechnique) else ():
            name = found.inside(f"{layer.candidate.path}.{layer.candidate.parameter}")
            if name is not None:
                masks[name] = layer.transform.mask.cpu()
    if not masks:
        raise LossplugError("there is no N:M layer, so there is no mask to write", remedy="Leave masks off")
    for name, mask in masks.items():
        stray = int(state[name][~mask].count_nonzero())
        if stray:
            raise LossplugError(f"{stray} weights are nonzero where the mask prunes", where=name)
    write_masks(masks, stage / MASKS)
    return MASKS


def write_onnx_file(found: Network, stage: Path, inputs: Mapping[str, Tensor] | None) -> OnnxCheck:
    """Writes ``model.onnx``; the batch axis (of tokens, the sequence too) may vary.

    Raises:
        LossplugError: See :func:`export_onnx`; or the network is neither of timm nor of transformers, so that nothing
            tells its inputs.
    """
    given = example_inputs(found, stage) if inputs is None else dict(inputs)
    dynamic = {name: [0, 1] if value.dtype == torch.long and value.ndim == 2 else [0] for name, value in given.items()}
    return export_onnx(onnx_module(found), given, stage / ONNX, dynamic=dynamic)


def example_inputs(found: Network, stage: Path) -> dict[str, Tensor]:
    """Makes inputs of a network by argument name.

    Args:
        found: The network.
        stage: Folder with the config.json of a timm model.

    Raises:
        LossplugError: The network is neither of timm nor of transformers, so that nothing tells its inputs.
    """
    if found.library == "timm":
        return {"x": torch.randn(2, *_image_size(stage), generator=torch.Generator().manual_seed(0))}
    if found.library == "transformers":
        config: Any = found.module.config
        ids = torch.randint(0, config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids}
    raise LossplugError(
        "nothing tells the inputs of this network",
        where=type(found.module).__name__,
        remedy="Call export_artifact(..., onnx=True, inputs={...}) or export.export_onnx from Python",
    )


def onnx_module(found: Network) -> nn.Module:
    """Returns the network as ONNX wants it."""
    return _Logits(found.module) if found.library == "transformers" else found.module


class _Logits(nn.Module):
    """A language model as ONNX wants it: tensors in, one tensor out, no cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def _image_size(stage: Path) -> list[int]:
    # what timm wrote there is what the network takes, arguments of its creation included
    return json.loads((stage / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]["input_size"]
