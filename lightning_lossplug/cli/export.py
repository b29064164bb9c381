"""``lossplug export``: a checkpoint becomes a folder that loads without this package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning_lossplug.cli.arguments import new_parser
from lightning_lossplug.cli.output import bytes_text, console, plain, table, to_json
from lightning_lossplug.errors import LossplugError, require

EPILOG = """The folder holds model.safetensors, config.json (timm, transformers) and lossplug.json (patterns, sizes):
  timm          timm.create_model("local-dir:DIR", pretrained=True)
  transformers  AutoModelForCausalLM.from_pretrained("DIR")
  others        model.load_state_dict(safetensors.torch.load_file("DIR/model.safetensors"))"""


def run(arguments: list[str]) -> None:
    """Exports.

    Raises:
        LossplugError: An unreadable checkpoint, a class that can't be told, a schedule that isn't finished, a place
            that is taken or can't be written.
    """
    parser = new_parser(
        "export", "Fold a checkpoint's techniques and write plain dense weights with exact zeros.", EPILOG
    )
    parser.add_argument("checkpoint", type=Path, help="a Lightning checkpoint (.ckpt)")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an artifact that is there")
    parser.add_argument(
        "--model", help="class of the module, if the checkpoint doesn't say: a short name or a dotted path"
    )
    parser.add_argument(
        "--network", metavar="PATH", help="the sub-module to export; found by itself where there is one"
    )
    parser.add_argument(
        "--tokenizer", help="saved beside a transformers model; default: the one of the run's data; none: without"
    )
    parser.add_argument("--masks", action="store_true", help="also write masks.safetensors: a bit per N:M weight")
    parser.add_argument(
        "--onnx", action="store_true", help="also write model.onnx, compared with torch in ONNX Runtime (extra: onnx)"
    )
    parser.add_argument(
        "--format",
        choices=("dense", "packed", "compressed_tensors", "onnx_qdq", "bitsandbytes_int8", "bitsandbytes_nf4"),
        default="dense",
        help="of a quantised run: packed codes, the layout of vLLM, ONNX with integer weights, or bitsandbytes "
        "modules for transformers (also of a plain model); default: dense",
    )
    parser.add_argument("--json", action="store_true", help="print the manifest instead of a table")
    options = parser.parse_args(arguments)
    if options.format != "dense" and (options.masks or options.onnx):
        raise LossplugError(f"--masks and --onnx belong to dense weights, not to --format {options.format}")
    require("lightning", "lightning", "lossplug export")
    require("safetensors", "lightning", "lossplug export")
    from lightning_lossplug.cli.quiet import lightning_output
    from lightning_lossplug.export.folder import clear_target

    clear_target(options.output, overwrite=options.overwrite)
    with lightning_output():
        manifest = export_checkpoint(options)
    if options.json:
        print(to_json(manifest))
    elif options.format != "dense":
        _print_quantized(manifest)
    else:
        _print(manifest)


def export_checkpoint(options: Any) -> dict[str, Any]:
    """Rebuilds the module of a checkpoint and exports it."""
    from lightning_lossplug.callbacks.checkpoint import read_checkpoint, replug
    from lightning_lossplug.integrations.artifact import export_artifact
    from lightning_lossplug.integrations.network import rebuild_module
    from lightning_lossplug.quantization.technique import QATTechnique

    path = str(options.checkpoint)
    checkpoint = read_checkpoint(path)
    sys.path.insert(0, str(Path.cwd()))  # the class of a training script in this folder
    try:
        module = rebuild_module(checkpoint, path, options.model)
    finally:
        sys.path.pop(0)
    techniques = replug(module, checkpoint, path)
    if options.format != "dense":
        from lightning_lossplug.integrations.quantized_artifact import export_quantized

        return export_quantized(
            module.eval(),
            options.output,
            options.format,
            overwrite=options.overwrite,
            network=options.network,
            tokenizer=_tokenizer(options.tokenizer, checkpoint),
        )
    manifest = export_artifact(
        module.eval(),
        options.output,
        techniques=techniques,
        overwrite=options.overwrite,
        network=options.network,
        tokenizer=_tokenizer(options.tokenizer, checkpoint),
        data_config=_data_config(checkpoint, path),
        source=Path(path).name,
        masks=options.masks,
        onnx=options.onnx,
    )
    quantised = sum(len(technique.layers) for technique in techniques if isinstance(technique, QATTechnique))
    return {**manifest, "quantised_layers": quantised}


def _data_config(checkpoint: dict[str, Any], path: str) -> dict[str, Any] | None:
    """Returns how the run's images were normalised, if its data module says so."""
    from lightning_lossplug.integrations.network import rebuild_data

    try:
        data = rebuild_data(checkpoint, path)
    except LossplugError:  # an export doesn't need the data: it may be on another machine
        return None
    mean, std, channels = (getattr(data, name, None) for name in ("mean", "std", "channels"))
    if not (isinstance(mean, float) and isinstance(std, float) and isinstance(channels, int)):
        return None
    return {"mean": [mean] * channels, "std": [std] * channels, "crop_pct": 1.0, "interpolation": "bilinear"}


def _tokenizer(name: str | None, checkpoint: dict[str, Any]) -> Any:
    if name is None:
        name = (checkpoint.get("datamodule_hyper_parameters") or {}).get("tokenizer")
    if name in (None, "none", "bytes"):
        return None
    from lightning_lossplug.integrations.pretrained import load_tokenizer

    try:
        return load_tokenizer(str(name))
    except LossplugError as error:
        raise LossplugError(
            error.what, where=f"tokenizer {name}", remedy="Name another --tokenizer, or --tokenizer none"
        ) from None


def _print(manifest: dict[str, Any]) -> None:
    rows = [
        ("network", manifest["class"].rpartition(".")[2]),
        ("parameters", f"{manifest['parameters']:,}"),
        ("nonzero", f"{manifest['nonzero']:,} ({1 - manifest['sparsity']:.1%})"),
        ("weights", bytes_text(manifest["dense_bytes"])),
        ("nominal, compressed", bytes_text(manifest["nominal_bytes"])),
        ("N:M layers", _patterns(manifest["layers"])),
        ("fit 2:4 kernels", _kernels(manifest)),
    ]
    if count := manifest["quantised_layers"]:
        rows.append(("quantised layers", f"{count}, in floating point here; in few bits: --format packed"))
    if "masks" in manifest:
        rows.append(("masks", manifest["masks"]))
    if "onnx" in manifest:
        check = manifest["onnx"]
        text = f"{check['file']}, {bytes_text(check['bytes'])}, at most {check['max_difference']:.1e} from torch"
        rows.append(("ONNX", text))
    out = console()
    out.print(table(f"exported to {plain(manifest['folder'])}", ["", ""], rows))
    out.print("loads without lightning_lossplug:")
    out.print(f"  {manifest['load']}", soft_wrap=True, markup=False)


def _print_quantized(manifest: dict[str, Any]) -> None:
    rows = [("network", manifest["class"]), ("format", manifest["format"]), ("file", bytes_text(manifest["bytes"]))]
    if "float_bytes" in manifest:
        rows.append(("quantised weights in float32", bytes_text(manifest["float_bytes"])))
        rows.append(("their codes and scales", bytes_text(manifest["codes_and_scales"])))
    if "max_difference" in manifest:
        rows.append(("ONNX Runtime", f"at most {manifest['max_difference']:.1e} from torch"))
    if "exact_layers" in manifest:
        kept, count = manifest["exact_layers"], manifest["layers"]
        rows.append(("layers", f"{count}, {kept} with the trained codes"))
        if kept < count:
            rows.append(("rounded again", f"{count - kept}, a weight changes by up to {manifest['largest_error']:.2%}"))
        if dropped := manifest["dropped_input_steps"]:
            rows.append(("trained input steps", f"dropped in {dropped} layers: bitsandbytes has none"))
    if manifest["float_attention"]:
        rows.append(("attention", f"of {manifest['float_attention']} modules in floating point: no place for it"))
    out = console()
    out.print(table(f"exported to {plain(manifest['folder'])}", ["", ""], rows))
    out.print(f"  {manifest['load']}", soft_wrap=True, markup=False)


def _patterns(layers: dict[str, dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for layer in layers.values():
        key = f"{layer['n']}:{layer['m']}"
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"{count} of {key}" for key, count in counts.items()) or "none"


def _kernels(manifest: dict[str, Any]) -> str:
    found = manifest["kernels_2to4"]
    text = f"{found['usable']} of {found['products']} layers in {found['dtype']}"
    return f"{text} (why not: lossplug sparsity {plain(manifest['folder'])})" if found["usable"] == 0 else text
