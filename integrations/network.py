"""Finding the timm or transformers model inside a module, and rebuilding a module from its checkpoint."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import instantiate_module
from torch import nn

from lightning_lossplug.errors import LossplugError, suggestion
from lightning_lossplug.registry import Entry, registry


@dataclass(frozen=True)
class Network:
    """The part of a module that leaves as an artifact.

    Args:
        path: Its path in the module; empty for the module itself.
        module: The network.
        library: ``timm``, ``transformers`` or ``torch``.
    """

    path: str
    module: nn.Module
    library: str

    def inside(self, name: str) -> str | None:
        """Returns a name of the whole module relative to the network, or None if it lies outside."""
        if not self.path:
            return name
        return name[len(self.path) + 1 :] if name.startswith(f"{self.path}.") else None


def library_of(module: nn.Module) -> str:
    """Returns the library whose loader rebuilds a module: ``timm``, ``transformers`` or ``torch`` (none)."""
    transformers = sys.modules.get("transformers")  # a model of it can't exist before it is imported
    if transformers is not None and isinstance(module, transformers.PreTrainedModel):
        return "transformers"
    return "timm" if "architecture" in (getattr(module, "pretrained_cfg", None) or {}) else "torch"


def find_network(module: nn.Module, path: str | None = None) -> Network:
    """Finds the network in a module.

    It is the outermost timm or transformers model, else the only child with weights, else the module itself.

    Args:
        module: A LightningModule, or a network.
        path: Says which sub-module it is, instead.

    Raises:
        LossplugError: There is no such sub-module, or there are several models.
    """
    if path is not None:
        try:
            chosen = module.get_submodule(path)
        except AttributeError:
            names = [name for name, _ in module.named_modules() if name]
            raise LossplugError(f"the module has no sub-module {path!r}", remedy=suggestion(path, names)) from None
        return Network(path, chosen, library_of(chosen))
    found: list[Network] = []
    for name, child in module.named_modules():
        library = library_of(child)
        if library != "torch" and not any(network.inside(name) is not None for network in found):
            found.append(Network(name, child, library))
    if len(found) > 1:
        names = [network.path for network in found]
        raise LossplugError(
            f"the module holds {len(found)} models: {', '.join(names)}", remedy="Say which with --network"
        )
    if found:
        return found[0]
    children = [
        (n, c) for n, c in module.named_children() if any(True for _ in c.parameters()) and n != "lossplug_loss"
    ]
    own = any(True for _ in module.parameters(recurse=False))
    if isinstance(module, LightningModule) and len(children) == 1 and not own:
        return Network(*children[0], "torch")
    return Network("", module, "torch")


def rebuild_module(checkpoint: dict[str, Any], where: str, model: str | None = None) -> LightningModule:
    """Builds the LightningModule a checkpoint was written by, with the weights it starts with.

    The class is the one ``lossplug fit`` noted, or ``model``, or the registered model whose arguments the checkpoint's
    hyper-parameters are.

    Args:
        checkpoint: A Lightning checkpoint.
        where: Its file, for messages.
        model: Registered name or dotted path of the class.

    Raises:
        LossplugError: The class can't be told or imported, or doesn't take the hyper-parameters.
    """
    given = dict(checkpoint.get("hyper_parameters") or {})
    return _rebuild("model", LightningModule, given, where, model)


def rebuild_data(checkpoint: dict[str, Any], where: str) -> LightningDataModule | None:
    """Builds the data module a checkpoint remembers, or returns None.

    Raises:
        LossplugError: Its class doesn't take the hyper-parameters.
    """
    given = dict(checkpoint.get("datamodule_hyper_parameters") or {})
    return _rebuild("data", LightningDataModule, given, where, None) if given else None


def _rebuild(kind: str, base: type, given: dict[str, Any], where: str, name: str | None) -> Any:
    by_cli = "_instantiator" in given or "_class_path" in given
    path = given.pop("_class_path", None)
    given.pop("_instantiator", None)
    cls = _import(kind, name or path or _guess(kind, given, where), where)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise LossplugError(f"{name or path} is no {base.__name__}", where=where, remedy="Name the class of the run")
    try:
        return instantiate_module(cls, given) if by_cli else cls(**given)
    except LossplugError:
        raise
    except Exception as error:  # whatever a constructor throws at arguments that aren't its own
        raise LossplugError(
            f"{cls.__name__} can't be built from the checkpoint's hyper-parameters: {type(error).__name__}: {error}",
            where=where,
            remedy="Name its class with --model, and call save_hyperparameters() in its __init__",
        ) from error


def _import(kind: str, name: str, where: str) -> Any:
    if "." not in name:
        return registry.get(kind, name).load()
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise LossplugError(
            f"the class {name} can't be imported: {error}",
            where=where,
            remedy="Run from the folder of its file, or put that on PYTHONPATH",
        ) from None


def _guess(kind: str, given: dict[str, Any], where: str) -> str:
    fitting = [e.name for e in registry if e.kind == kind and given and _takes(e, given)]
    if len(fitting) == 1:
        return fitting[0]
    what = "has no hyper-parameters" if not given else "does not say which class wrote it"
    raise LossplugError(
        f"the checkpoint {what}", where=where, remedy="Name the class with --model: a dotted path, or a registered name"
    )


def _takes(entry: Entry, given: dict[str, Any]) -> bool:
    try:
        parameters = {parameter.name for parameter in entry.parameters()}
    except LossplugError:  # its optional package is not installed, so it did not write the checkpoint's class here
        return False
    # a class saves all its arguments but the few it ignores
    return set(given) <= parameters and len(given) >= len(parameters) - 2
