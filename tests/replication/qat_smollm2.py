"""SmolLM2-135M fine-tuned with quantised weights and inputs: perplexity before and after, by bits, at equal tokens.

Text, model and schedule are those of ``nm_smollm2.py``. Embedding and output layer stay in float. ``start`` is the
quantised model before training: scales of weights from the weights, those of inputs (where they are static) from the
first training batch.

    python tests/replication/qat_smollm2.py --output qat_smollm2.json
"""

import statistics

import lightning.pytorch as pl
import torch
from nm_smollm2 import perplexity
from runner import key, parse, run_all, show

from lightning_lossplug.callbacks import QAT
from lightning_lossplug.integrations import CausalLM, TextData, smollm2_path

DYNAMIC = {"activation": "dynamic"}
GROUPS = {"granularity": "group", "group_size": 64}
MX = {"weight": "mx", "weight_options": {"elem": "fp4_e2m1"}}
PUBLISHED = {"weight_options": {"init": "auto"}}
# Row -> arguments of QAT, or None.
ROWS = {
    "dense": None,
    "W8A8, a step per token": {"bits_w": 8, "bits_a": 8, **DYNAMIC},
    "W8A8, a step per layer": {"bits_w": 8, "bits_a": 8},
    "W4A8, a step per token": {"bits_w": 4, "bits_a": 8, **DYNAMIC},
    "W4A8, a step per token, started as published": {"bits_w": 4, "bits_a": 8, **DYNAMIC, **PUBLISHED},
    "W4": {"bits_w": 4, "bits_a": None},
    "W4, groups of 64": {"bits_w": 4, "bits_a": None, **GROUPS},
    "W4, groups of 64, started as published": {"bits_w": 4, "bits_a": None, **GROUPS, **PUBLISHED},
    "W4, MXFP4": {"bits_w": 4, "bits_a": None, **MX},
    "W3, groups of 64": {"bits_w": 3, "bits_a": None, **GROUPS},
    "W3, groups of 64, started as published": {"bits_w": 3, "bits_a": None, **GROUPS, **PUBLISHED},
    "W2 (SEQ), groups of 64": {"bits_w": 2, "bits_a": None, **GROUPS},
    "W1.58 (SEQ), groups of 64": {"bits_w": 1.58, "bits_a": None, **GROUPS},
}


class Start(pl.Callback):
    """Scores the quantised model once its scales are set, before its first step."""

    def __init__(self, blocks, batch):
        self.blocks, self.batch, self.found = blocks, batch, None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.found is None:
            self.found = perplexity(pl_module.model, self.blocks, self.batch)
            pl_module.train()


def work(run, root, device):
    """Test perplexity at the start and after the last step."""
    model = run["model"] or str(smollm2_path())
    data = TextData(run["tokenizer"] or model, block_size=run["block"], batch_size=run["batch"], seed=run["seed"])
    data.setup("fit")
    count = min(run["test_blocks"] or len(data.test_set), len(data.test_set))
    test = torch.stack([data.test_set[i]["input_ids"] for i in range(count)]).to(device)
    torch.manual_seed(run["seed"])
    module, start = CausalLM(model=model, lr=run["lr"]), Start(test, run["batch"])
    quantised = [QAT(**run["options"], first_last_bits=None)] if run["options"] else []
    pl.Trainer(
        max_steps=run["steps"],
        limit_val_batches=0,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        gradient_clip_val=1.0,
        callbacks=[*quantised, start],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)
    return {"start": start.found, "perplexity": perplexity(module.model.to(device), test, run["batch"])}


def main(argv=None):
    def extra(parser):
        parser.add_argument("--model", default=None, help="hub name, folder or GGUF file; default: the package")
        parser.add_argument("--tokenizer", default=None, help="default: the model's; 'bytes' for none")
        parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
        parser.add_argument("--steps", type=int, default=100)
        parser.add_argument("--block", type=int, default=256)
        parser.add_argument("--lr", type=float, default=1e-4)
        parser.add_argument("--test-blocks", type=int, default=None, help="default: all")

    arguments = parse(__doc__, argv, 1, extra, batch=2)
    names = ("model", "tokenizer", "steps", "block", "batch", "lr", "test_blocks")

    def describe(row, seed):
        return {"options": ROWS[row], "seed": seed, **{name: getattr(arguments, name) for name in names}}

    runs = [describe(row, seed) for seed in arguments.seeds for row in arguments.rows]
    results = run_all(work, runs, arguments)
    table = []
    for row in arguments.rows:
        own = [results[key(describe(row, seed))] for seed in arguments.seeds]
        cells = []
        for name in ("start", "perplexity"):
            values = [r[name] for r in own]
            spread = f" [{min(values):.2f}, {max(values):.2f}]" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):.2f}{spread}")
        table.append([row, *cells])
    header = ["layers of the blocks", "start", "trained"]
    show(f"test perplexity, {arguments.steps} x {arguments.batch} x {arguments.block} tokens", header, table, arguments)


if __name__ == "__main__":
    main()
