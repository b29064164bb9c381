"""Decoding with a shrunk KV cache against the stock one: tokens per second, bytes, peak memory, at several contexts.

A model of SmolLM2-135M's shape with random weights, caches filled with random keys and values, one decoding step of
each variant in turn in one process. ``peak`` is the high-water mark of a process per variant above its resident memory
before the cache is filled. The floors come from counted multiplications and bytes over the speeds of one large matrix
product and one large sum, measured in the same run.

Run: PYTHONPATH=. OMP_NUM_THREADS=2 python tests/benchmarks/bench_kv_decode.py --contexts 1024 4096 16384
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from lightning_lossplug.integrations.kv_cache import ChannelShrunkCache, KVShrinkSettings
from lightning_lossplug.kv_cache import Factors, KVFactors, LayerFactors
from lightning_lossplug.kv_cache.attention import attention_blocks
from lightning_lossplug.kv_cache.fingerprint import fingerprint

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
WIDTH = 192
VARIANTS = ("dense", "native", "latent", "rebuild", "native 4 bits", "quantized")


def new_model(dtype):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def factors_of(model, rank, bits):
    def one():
        basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:, :rank].contiguous()
        return Factors(basis, basis.T.contiguous())

    blocks = attention_blocks(model)
    layers = {index: LayerFactors(one(), one(), 0.0, 0.0) for index in blocks}
    return KVFactors(layers, KVShrinkSettings(k_bits=bits, v_bits=bits), fingerprint(model, blocks), 0)


def new_cache(model, variant, rank):
    if variant == "dense":
        return transformers.DynamicCache(config=model.config)
    if variant == "quantized":
        return transformers.QuantizedCache("quanto", model.config, nbits=4)
    name, _, bits = variant.partition(" ")
    return ChannelShrunkCache(model, factors_of(model, rank, 4 if bits else 16), attention=name)


def fill(model, cache, context):
    torch.manual_seed(1)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        tables = model.model.rotary_emb(torch.zeros(1, 1, 1, dtype=dtype), torch.arange(context)[None])
        for index in range(SHAPE["num_hidden_layers"]):
            keys, values = (torch.randn(1, 3, context, 64, dtype=dtype) for _ in range(2))
            if isinstance(cache, ChannelShrunkCache):
                cache.announce(index, *tables, None, 1)
            cache.update(keys, values, index)


@torch.no_grad()
def step(model, cache):
    ids, at = torch.tensor([[17]]), torch.tensor([[cache.get_seq_length()]])
    start = time.perf_counter()
    model(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True)
    return time.perf_counter() - start


def cache_bytes(cache):
    if isinstance(cache, ChannelShrunkCache):
        return cache.nbytes()
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def machine():
    """FLOP/s of a matrix product and bytes/s of reading a large tensor."""
    a, b = torch.randn(2048, 1024), torch.randn(1024, 1024)
    big = torch.randn(40_000_000)
    flops, moved = [], []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        flops.append(2 * 2048 * 1024 * 1024 / (time.perf_counter() - start))
        start = time.perf_counter()
        big.sum()
        moved.append(4 * big.numel() / (time.perf_counter() - start))
    return max(flops), max(moved)


def floor_seconds(model, context, rank, speed, element=4):
    """Least seconds of a step: (dense, shrunk), from bytes that must be read and multiplications that must be done.

    Dense reads the weights and all keys and values once (what the concatenation of DynamicCache copies is not counted).
    Shrunk reads the weights and the codes, and rebuilds all old keys: 2 r c operations per token and layer, 6 c for the
    rotation, 2 * 9 * (64 + r) for scores and weighted codes.
    """
    flops, moved = speed
    layers = SHAPE["num_hidden_layers"]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    dense = (weights + layers * context * 2 * WIDTH * element) / moved
    work = layers * context * (2 * rank * WIDTH + 6 * WIDTH + 18 * (64 + rank))
    shrunk = (weights + layers * context * 2 * rank * element) / moved + work / flops
    return dense, shrunk


def memory_mib(key):
    return int(re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def peak(options, variant, context):
    """In a process of its own: memory above what the model takes, at most."""
    torch.set_num_threads(options.threads)
    model = new_model(getattr(torch, options.dtype))
    step(model, transformers.DynamicCache(config=model.config))
    cache = new_cache(model, variant, options.rank)
    before = memory_mib("VmRSS")
    fill(model, cache, context)
    filled = memory_mib("VmHWM") - before
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step(model, cache)
    print(json.dumps({"fill": filled, "decode": memory_mib("VmHWM") - before, "cache": cache_bytes(cache) / 2**20}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--variants", nargs="+", default=["dense", "native", "latent"], choices=VARIANTS)
    parser.add_argument("--rank", type=int, default=38)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory", action="store_true", help="a process per variant and context")
    parser.add_argument("--plot", type=Path, help="picture of tokens/s over the context")
    parser.add_argument("--profile", metavar="VARIANT", help="where the time of this variant goes")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(options, options.peak[0], int(options.peak[1]))
        return
    torch.set_num_threads(options.threads)
    model = new_model(getattr(torch, options.dtype))
    if options.profile:
        profile(model, options)
        return
    speed = machine()
    print(f"{options.threads} threads, {speed[0] / 1e9:.0f} GFLOP/s, {speed[1] / 1e9:.1f} GB/s, {options.dtype}")
    speeds = {}
    for context in options.contexts:
        caches, seconds = {}, {}
        for variant in options.variants:
            try:
                caches[variant] = new_cache(model, variant, options.rank)
                fill(model, caches[variant], context)
                step(model, caches[variant])
                seconds[variant] = []
            except ImportError as error:
                print(f"{variant} doesn't run: {str(error).splitlines()[0]}")
        for _ in range(options.rounds):
            for variant, found in seconds.items():
                found.append(step(model, caches[variant]))
        least = floor_seconds(model, context, options.rank, speed)
        print(f"context {context}: floors of a step {1e3 * least[0]:.1f} ms dense, {1e3 * least[1]:.1f} ms shrunk")
        base = statistics.median(seconds["dense"])
        for variant, found in seconds.items():
            middle = statistics.median(found)
            speeds.setdefault(variant, {})[context] = 1 / middle
            paired = statistics.median(d / s for d, s in zip(seconds["dense"], found, strict=True))
            line = f"  {variant:14} {1 / middle:7.2f} tokens/s, {paired:.2f} x dense ({base / middle:.2f} of medians), "
            print(line + f"{1e3 * middle:.1f} ms, cache {cache_bytes(caches[variant]) / 2**20:.1f} MiB", flush=True)
        del caches
        if options.memory:
            for variant in seconds:
                command = [sys.executable, __file__, "--peak", variant, str(context), "--rank", str(options.rank)]
                command += ["--threads", str(options.threads), "--dtype", options.dtype]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"  {variant:14} peak above the model while decoding {found['decode']:.0f} MiB, while filling "
                    f"{found['fill']:.0f} MiB",
                    flush=True,
                )
    if options.plot:
        plot(speeds, options)


def plot(speeds, options):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for variant, found in speeds.items():
        axis.plot(list(found), list(found.values()), "o-", label=variant)
    axis.set(xlabel="context", ylabel="tokens/s", xscale="log", title=f"{options.threads} threads, {options.dtype}")
    axis.set_xticks(options.contexts, [str(context) for context in options.contexts], minor=False)
    axis.minorticks_off()
    axis.legend()
    figure.savefig(options.plot, dpi=150)


def profile(model, options):
    cache = new_cache(model, options.profile, options.rank)
    fill(model, cache, options.contexts[0])
    step(model, cache)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        for _ in range(3):
            step(model, cache)
    print(prof.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
    import cProfile
    import pstats

    plain = cProfile.Profile()
    plain.enable()
    for _ in range(5):
        step(model, cache)
    plain.disable()
    pstats.Stats(plain).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
