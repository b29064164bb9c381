"""Quantised models as one safetensors file: packed codes and scales, everything else in its place, a strict loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.export.dense import dense_state, write_safetensors
from lightning_lossplug.export.masks import pack_mask, unpack_mask
from lightning_lossplug.quantization.base import Codes
from lightning_lossplug.quantization.grid import Layout
from lightning_lossplug.quantization.integer import fuse_model, integer_layer, quantizer_of, weight_codes
from lightning_lossplug.quantization.integer_layer import IntegerLayer
from lightning_lossplug.quantization.packing import bits_for, pack_codes, unpack_codes
from lightning_lossplug.surgery.plug import fold, plugged_layers
from lightning_lossplug.untrusted import digest_tensors, parse_json, read_safetensors, reading, seal, shape_of, unseal

FORMAT = 2
KEY = "lossplug_quantized"


def save_packed(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Writes a QAT model with its weights as packed codes.

    A weight ``p`` becomes ``p.codes`` (as few bits as its codes need, without gaps), ``p.scale`` and, where it has
    one, ``p.zero_point``. Of a sparse weight only codes other than 0 are in ``p.codes``, and ``p.kept`` says where, a
    bit per weight: 8-bit codes at 2:4 take 5 bits per weight. The static step of a layer's input is ``p.input_scale``.
    Every other tensor of the folded model keeps its key; of tied ones the first is written. Weights whose quantiser has
    no integer codes (floating formats, several bases) are written folded; attention whose operands were quantised in
    training is in floating point in the model that is loaded.

    Args:
        model: A module with plugged layers; it stays as it is.
        path: The file.

    Returns:
        ``bytes`` of the file's codes and scales, ``float_bytes`` of the same weights in float32, and ``layers``.

    Raises:
        LossplugError: Nothing to pack, scales that were never set or are not above 0, values that are not finite.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    dense = 0
    for name, layer in plugged_layers(model):
        for parameter in type(layer).plugged_parameters:
            weight = quantizer_of(layer, parameter)
            if weight is None:
                continue
            weight.check_ready()
            if not weight.has_codes:
                continue
            key = f"{name}.{parameter}"
            coded = weight_codes(layer, weight, parameter)
            low, high = int(coded.codes.min()), int(coded.codes.max())
            # Grids without 0 have odd codes only, or even ones: half of the levels then take a bit less.
            stride = 2 if high - low >= 2 and not bool(((coded.codes - low) % 2).any()) else 1
            entry: dict[str, Any] = {
                "shape": list(coded.codes.shape),
                "low": low,
                "high": high,
                "stride": stride,
                "group_size": weight.layout.group_size,
                "per_channel": weight.layout.per_channel,
                "axis": weight.layout.axis,
            }
            codes, levels = (coded.codes.cpu() - low) // stride, (high - low) // stride
            kept = coded.codes.cpu() != 0
            bits, count = bits_for(0, levels), int(kept.sum())
            if coded.zero_point is None and kept.numel() + bits * count < bits * kept.numel():
                entry["kept"], codes = count, codes[kept]
                tensors[f"{key}.kept"] = pack_mask(kept)
            tensors[f"{key}.codes"] = pack_codes(codes, 0, levels)
            tensors[f"{key}.scale"] = coded.scale.cpu().contiguous()
            if coded.zero_point is not None:
                tensors[f"{key}.zero_point"] = coded.zero_point.cpu().contiguous()
            whole = integer_layer(layer, name, "reference") if parameter == "weight" else "no layer"
            if isinstance(whole, IntegerLayer):
                entry |= {"bounds": list(whole.bounds), "zero": whole.input_zero, "convolution": whole.convolution}
                entry["dynamic"] = whole.dynamic
                tensors[f"{key}.input_scale"] = whole.input_scale.cpu().clone()
            layers[key] = entry
            dense += 4 * coded.codes.numel()
    if not layers:
        raise LossplugError("the model has no weight with integer codes", where=str(path), remedy="Train it with QAT")
    packed = sum(t.numel() * t.element_size() for t in tensors.values())
    folded = fold(model)
    tied = _tied(folded, layers)
    rest = {key: value for key, value in dense_state(folded).items() if key not in layers and key not in tied}
    everything = {**rest, **tensors}
    about = {"format": FORMAT, "tensors": digest_tensors(everything), "layers": layers, "tied": tied}
    header = {KEY: json.dumps(seal(about))}
    write_safetensors(everything, Path(path), header)
    return {"bytes": packed, "float_bytes": dense, "layers": layers}


def _tied(model: nn.Module, layers: dict[str, Any]) -> dict[str, str]:
    """The other names of Parameters that have several, and the first one of each."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    found = {name: first.setdefault(id(parameter), name) for name, parameter in named}
    return {name: other for name, other in found.items() if name != other and not {name, other} & set(layers)}


def load_packed(module: nn.Module, path: str | Path, *, integers: bool = True, fuse: bool = True) -> nn.Module:
    """Loads a file of :func:`save_packed` into a plain module, strictly.

    Args:
        module: The module as its author wrote it; changed in place, and put in eval mode.
        path: The file.
        integers: Replace layers whose input is quantised too by int8 layers, which is the trained model. False loads
            the quantised weights into the plain layers, with float inputs.
        fuse: Take batch norms and activations into the int8 layers, as :func:`integer_model` does.

    Returns:
        The module.

    Raises:
        LossplugError: The file is missing, corrupt, or of another module.
    """
    tensors, layers, tied = _read(Path(path))
    tensors |= {name: tensors[first] for name, first in tied.items()}
    with reading(path, "the packed model", "It was written for another module, or is damaged"):
        return _load(module, tensors, layers, path, integers, fuse)


def _load(
    module: nn.Module,
    tensors: dict[str, Tensor],
    layers: dict[str, Any],
    path: str | Path,
    integers: bool,
    fuse: bool,
) -> nn.Module:
    state = module.state_dict()
    dense = {key: value for key, value in tensors.items() if key in state}
    used = set(dense)
    whole: dict[str, IntegerLayer] = {}
    shapes = {key: list(value.shape) for key, value in dense.items()}
    for key, shape in ({key: entry.get("shape") for key, entry in layers.items()} | shapes).items():
        if key not in state or list(state[key].shape) != shape:
            have = list(state[key].shape) if key in state else "no such weight"
            raise LossplugError(
                f"the file has a weight of shape {shape}, the module {have}",
                where=f"{path}: {key}",
                remedy="Build the module with the arguments of the run that wrote it",
            )
    for key, entry in layers.items():
        used |= {k for k in tensors if k.rpartition(".")[0] == key}
        try:
            codes = _codes(tensors, key, entry, path)
            layout = Layout(entry["per_channel"], entry["group_size"], entry["axis"])
            value = layout.arrange(codes.codes).float()
            value = (value if codes.zero_point is None else value - codes.zero_point) * codes.scale
            dense[key] = layout.restore(value, entry["shape"])
            if integers and "bounds" in entry:
                whole[key.rpartition(".")[0]] = _layer(module, key, entry, codes, tensors, path)
        except LossplugError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            raise LossplugError(
                f"its description doesn't fit its tensors ({reason}): the file is corrupt",
                where=f"{path}: {key}",
                remedy="Write it again with save_packed",
            ) from None
    wrong = sorted({*state} - {*dense}) or sorted({*tensors} - used)
    if wrong:
        kind = "lacks" if wrong[0] in state else "holds besides"
        raise LossplugError(f"the file {kind} {len(wrong)} tensors, the first is {wrong[0]}", where=str(path))
    module.load_state_dict(dense, strict=True)
    for name, layer in whole.items():
        parent, _, child = name.rpartition(".")
        bias = module.get_submodule(name).bias
        layer.bias = bias.detach().float().clone() if isinstance(bias, Tensor) else None
        layer.use("auto")
        setattr(module.get_submodule(parent), child, layer)
    module.eval()
    if whole and fuse:
        fuse_model(module)
    return module


def _codes(tensors: dict[str, Tensor], key: str, entry: dict[str, Any], path: str | Path) -> Codes:
    for part in ("codes", "scale", *(["kept"] if "kept" in entry else [])):
        if f"{key}.{part}" not in tensors:
            raise LossplugError(f"the file lacks {key}.{part}", where=str(path))
    scale = tensors[f"{key}.scale"]
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise LossplugError("a scale is not a number above 0: the file is corrupt", where=f"{path}: {key}")
    try:
        low, high, stride = entry["low"], entry["high"], entry["stride"]
        places = None if "kept" not in entry else unpack_mask(tensors[f"{key}.kept"], tuple(entry["shape"]))
        shape = entry["shape"] if places is None else [entry["kept"]]
        codes = unpack_codes(tensors[f"{key}.codes"], 0, (high - low) // stride, shape) * stride + low
        if places is not None:
            if int(places.sum()) != entry["kept"]:
                raise LossplugError(f"{entry['kept']} codes for {int(places.sum())} places: the file is corrupt")
            codes = torch.zeros(places.shape, dtype=codes.dtype).masked_scatter_(places, codes)
    except LossplugError as error:
        raise LossplugError(error.what, where=f"{path}: {key}", remedy=error.remedy) from None
    return Codes(codes, scale, tensors.get(f"{key}.zero_point"))


def _layer(
    module: nn.Module, key: str, entry: dict[str, Any], codes: Codes, tensors: dict[str, Tensor], path: str | Path
) -> IntegerLayer:
    layer: Any = module.get_submodule(key.rpartition(".")[0])
    bounds = (int(entry["bounds"][0]), int(entry["bounds"][1]))
    scale = tensors[f"{key}.input_scale"]
    if not bool((scale > 0).all()):
        raise LossplugError("the input's scale is not above 0: the file is corrupt", where=f"{path}: {key}")
    return IntegerLayer(
        codes.codes,
        codes.scale,
        layer.bias,
        bounds,
        scale,
        entry["zero"],
        entry["convolution"],
        entry.get("dynamic") is True,
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    tensors, pairs = read_safetensors(path, "load_packed")
    header = parse_json(pairs.get(KEY, "null"), path)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise LossplugError("the file holds no packed model of this version", where=str(path))
    header = unseal(header, path)
    if header.get("tensors") != digest_tensors(tensors):
        raise LossplugError(
            "the file's values have another checksum than when it was written",
            where=str(path),
            remedy="Export or download it again",
        )
    layers = header.get("layers")
    if not isinstance(layers, dict):
        raise LossplugError("the file doesn't say which weights it holds", where=str(path))
    found = {}
    for key, entry in layers.items():
        with reading(f"{path}: {key}", "its description"):
            found[key] = _entry(entry, f"{path}: {key}")
    tied = header.get("tied")
    known = isinstance(tied, dict) and all(type(first) is str and first in tensors for first in tied.values())
    if not isinstance(tied, dict) or not known or not tensors.keys().isdisjoint(tied):
        raise LossplugError("the file doesn't say which weights are tied", where=str(path))
    return tensors, found, tied


def _entry(entry: dict[str, Any], path: str) -> dict[str, Any]:
    """Returns the entry of one weight, after checking what is computed with."""
    low, high, stride = entry["low"], entry["high"], entry["stride"]
    whole = all(type(value) is int and abs(value) < 1 << 31 for value in (low, high, stride))
    if not whole or not 0 <= high - low <= 255 * stride or stride not in (1, 2):
        raise LossplugError(f"codes from {low} to {high} in steps of {stride} are no codes", where=path)
    if type(entry["group_size"]) not in (int, type(None)) or type(entry["axis"]) is not int:
        raise LossplugError("the layout of a weight is none", where=path)
    if type(entry.get("kept", 0)) is not int or entry.get("kept", 0) < 0:
        raise LossplugError(f"{entry['kept']!r} codes other than 0 are no number of codes", where=path)
    return {**entry, "shape": list(shape_of(entry["shape"], path)), "per_channel": bool(entry["per_channel"])}
