"""Dense weights of a folded model as safetensors, every key of the state dict in its place."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.surgery.plug import plugged_layers
from lightning_lossplug.untrusted import sync


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of a model of plain layers, on the CPU, contiguous, without shared memory.

    Tied parameters appear under each of their names, each a copy of its own, so that the file loads strictly into the
    plain model, which ties them again.

    Raises:
        LossplugError: A layer is still plugged, or a value is not finite.
    """
    plugged = next(plugged_layers(model), None)
    if plugged is not None:
        raise LossplugError("the layer is still plugged", where=plugged[0], remedy="Fold the model first")
    state: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            continue  # the extra state of a module is no tensor; safetensors has no place for it
        tensor = value.detach().to("cpu").contiguous()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise LossplugError(
                f"{count} of {tensor.numel()} values are not finite", where=name, remedy="Export an earlier checkpoint"
            )
        storage = tensor.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        state[name] = tensor
    return state


def write_safetensors(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a state dict as one safetensors file, whole or not at all.

    Args:
        state: Tensors on the CPU that share no memory (:func:`dense_state`).
        path: The file.
        metadata: Text pairs of the header; ``format`` is ``pt``, which transformers asks for.

    Raises:
        LossplugError: It can't be written; what was there stays.
    """
    safetensors = require("safetensors.torch", "lightning", "an export")
    part = path.with_name(f".{path.name}.part")
    try:
        safetensors.save_file(state, part, metadata={"format": "pt", **(metadata or {})})
        sync(part)
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":  # the package doesn't export it
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
            raise LossplugError(f"can't be written: {reason}", where=str(path)) from None
        raise
