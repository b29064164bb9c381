"""Presses of kvpress on the windows of ``kv_caches.py``: caches that drop tokens, at the bytes of one that codes them.

kvpress wants an older transformers than the library, so this runs beside it and imports nothing of it. A press drops
tokens of the prompt; decoded tokens stay, so its ratio is chosen for the bytes at the end of a window.

    pip install --no-deps --target DIR kvpress==0.5.5 transformers==5.2.0 tokenizers==0.22.2
    PYTHONPATH=DIR python tests/replication/kv_presses.py --output kv_caches.json --model FILE.gguf

``kv_caches.py`` with the same output comes first and leaves the windows beside it; run it again for the plot.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import transformers

ROWS = {
    "kvpress, SnapKV": "SnapKVPress",
    "kvpress, expected attention": "ExpectedAttentionPress",
    "kvpress, TOVA": "TOVAPress",
    "kvpress, key norms": "KnormPress",
    "kvpress, StreamingLLM": "StreamingLLMPress",
}


@torch.no_grad()
def decode(model, cache, ids, prefill, press):
    """Perplexity of the tokens from ``prefill`` on, and tokens per second of decoding."""
    with press(model):
        logits = [model(input_ids=ids[:, :prefill], past_key_values=cache, logits_to_keep=1).logits[:, -1]]
    start = time.perf_counter()
    for t in range(prefill, ids.shape[1] - 1):
        place = torch.full_like(ids[:, :1], t)
        logits.append(model(input_ids=ids[:, t : t + 1], position_ids=place, past_key_values=cache).logits[:, -1])
    seconds = time.perf_counter() - start
    scores = torch.stack(logits, dim=1).float().log_softmax(-1)
    loss = -scores.gather(2, ids[:, prefill:, None]).mean()
    return math.exp(loss), len(ids) * (len(logits) - 1) / seconds


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of kv_caches.py")
    parser.add_argument("--model", required=True, help="folder or GGUF file")
    parser.add_argument("--like", default="codes of a fifth", help="the row whose bytes are matched")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    options = parser.parse_args(argv)
    import kvpress

    done = json.loads(options.output.read_text())
    windows = torch.load(options.output.with_suffix(".windows.pt"))
    ids, prefill = windows["ids"], windows["prefill"]
    path = Path(options.model)
    source = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    dtype = getattr(torch, windows["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(source[0], dtype=dtype, **source[1]).eval()
    seen = ids.shape[1] - 1
    kept = (done[options.like]["share"] * seen - (seen - prefill)) / prefill
    for name in options.rows:
        if name in done:
            continue
        cache = transformers.DynamicCache(config=model.config)
        press = getattr(kvpress, ROWS[name])(compression_ratio=1 - kept)
        perplexity, speed = decode(model, cache, ids, prefill, press)
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        share = held / done["DynamicCache"]["bytes"]
        done[name] = {"perplexity": perplexity, "tokens_per_second": speed, "bytes": held, "share": share}
        options.output.write_text(json.dumps(done, indent=1) + "\n")
        print(f"{name:28} perplexity {perplexity:8.3f}, bytes {share:6.1%}, {speed:6.1f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
