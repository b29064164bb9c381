"""Checkpoints between dense and plugged modules.

A dense checkpoint loads into a plugged module as it is (``fit(ckpt_path=...)``, ``load_state_dict`` with
``strict=True``): transforms it doesn't know are left alone. The other ways are here::

    load_dense(PlainModule(), "plugged.ckpt")    # latent dense weights, strict
    load_plugged(PlainModule(), "plugged.ckpt")  # layers plugged as in that run, masks and all
    fold(load_plugged(...))                      # plain layers with the exact zeros
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_lossplug.callbacks.safe_checkpoints import REMEDY, verify_checkpoint
from lightning_lossplug.callbacks.technique import TechniqueCallback
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.registry import registry
from lightning_lossplug.surgery.plug import is_transform_key
from lightning_lossplug.technique import Technique
from lightning_lossplug.untrusted import reading

ModuleT = TypeVar("ModuleT", bound=nn.Module)

LOSS_CHILD = "lossplug_loss."


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a Lightning checkpoint onto the CPU, without unpickling anything but tensors and plain types.

    Raises:
        LossplugError: The file is missing, unreadable, truncated, changed, no Lightning checkpoint, or one of shards.
    """
    path = Path(path)
    if (path / "meta.pt").is_file():
        raise LossplugError(
            "the checkpoint is a folder of shards",
            where=str(path),
            remedy="Make one file of it: python -m lightning.fabric.utilities.consolidate_checkpoint FOLDER",
        )
    if not path.is_file():
        raise LossplugError("there is no such checkpoint file", where=str(path))
    verify_checkpoint(path)
    remedy = f"{REMEDY}; objects in hyper-parameters need save_hyperparameters(ignore=[...])"
    with reading(path, "the checkpoint", remedy):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise LossplugError("the file is no Lightning checkpoint: it has no state_dict", where=str(path))
    return checkpoint


def dense_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns the state dict of the plain module: without masks and other transforms, and without a swapped-in loss."""
    return {k: v for k, v in state_dict.items() if not is_transform_key(k) and not k.startswith(LOSS_CHILD)}


def load_dense(module: ModuleT, path: str | Path) -> ModuleT:
    """Loads the dense (latent) weights of a plugged or plain checkpoint into a plain module, strictly.

    Args:
        module: The module as its author wrote it.
        path: A Lightning checkpoint.

    Returns:
        The module.

    Raises:
        LossplugError: The checkpoint can't be read, or its keys or shapes are another module's.
    """
    _load_strictly(module, dense_state_dict(read_checkpoint(path)["state_dict"]), path)
    return module


def load_plugged(module: ModuleT, path: str | Path) -> ModuleT:
    """Plugs a plain module as the run that wrote a checkpoint had it, then loads weights, masks and schedule positions.

    Args:
        module: The module as its author wrote it (layers that ``configure_model`` builds have to exist).
        path: A Lightning checkpoint written with callbacks of this project.

    Returns:
        The module, plugged; without techniques in the checkpoint it is plain.

    Raises:
        LossplugError: The checkpoint can't be read or was written for another module.
    """
    replug(module, read_checkpoint(path), path)
    return module


def replug(module: nn.Module, checkpoint: dict[str, Any], path: str | Path) -> list[Technique[Any]]:
    """Does what :func:`load_plugged` does with a checkpoint that is read already, and returns the techniques.

    Args:
        module: The module as its author wrote it.
        checkpoint: From :func:`read_checkpoint`.
        path: Where it was read, for messages.

    Raises:
        LossplugError: The checkpoint was written for another module.
    """
    found = technique_states(checkpoint)
    for technique, state in found:
        technique.attach(module)
        technique.load_state_dict(state)
    state_dict = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith(LOSS_CHILD)}
    _load_strictly(module, state_dict, path)
    return [technique for technique, _ in found]


def technique_states(checkpoint: dict[str, Any]) -> list[tuple[Technique[Any], dict[str, Any]]]:
    """Returns ``(technique, its state)`` for every technique callback saved in a checkpoint."""
    found = []
    for state in checkpoint.get("callbacks", {}).values():
        if not isinstance(state, dict) or not {"callback", "settings", "technique"} <= set(state):
            continue
        factory = registry.get("callback", state["callback"]).load()
        callback = factory(**state["settings"])
        if isinstance(callback, TechniqueCallback):
            found.append((callback.technique, state["technique"]))
    return found


def _load_strictly(module: nn.Module, state_dict: dict[str, Any], path: str | Path) -> None:
    try:
        module.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise LossplugError(
            f"the checkpoint doesn't fit the {type(module).__name__}: {' '.join(lines[1:2])[:300]}",
            where=str(path),
            remedy="Build the module with the arguments of the run that wrote it",
        ) from None
