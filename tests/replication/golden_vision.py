"""Swapped loss, 2:4, W8A8 and BD-KD in one run: against each alone, and against one after the other.

Fashion-MNIST, the small timm ViT of ``nm_recipes.py``, the same AdamW steps for every row. ``one after the other``
gives each technique a fourth of the steps, in the order in which they are used (loss, distillation, pruning, and
quantisation with the zeros held), with a schedule of the learning rate for every part, or one over all of them. Every
row leaves as a folder (``lossplug export``: dense, or packed codes where there is QAT), is loaded into a plain timm
model, and is scored there, on all test images. The teacher of BD-KD is twice as wide and learns from random weights.

    python tests/replication/golden_vision.py --output golden_vision.json
    python tests/replication/golden_vision.py --output golden_vision.json --latency
"""

import copy
import functools
import random
import statistics
import time

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from common import Batches, fashion_mnist, predict
from golden_common import Clock, compare, deflated
from runner import key, parse, prepare, run_all, settings, show, spread
from scoring import scores
from torch.optim.lr_scheduler import LambdaLR

from lightning_lossplug.callbacks import QAT, NMSparsity, OnlineDistillation, SwapLoss
from lightning_lossplug.integrations.artifact import export_artifact
from lightning_lossplug.integrations.packed import load_packed
from lightning_lossplug.integrations.quantized_artifact import export_quantized
from lightning_lossplug.integrations.schedule import warmup_cosine
from lightning_lossplug.surgery import fold

ALL = ("loss", "distillation", "sparsity", "quantization")
SEQUENCE = (("loss",), ("distillation",), ("sparsity",), ("held", "quantization"))
ROWS = {  # parts of a run, each with what is added in it, and whether each part has a schedule of its own
    "plain": ([()], True),
    "together": ([ALL], True),
    "swapped loss": ([("loss",)], True),
    "2:4": ([("sparsity",)], True),
    "W8A8": ([("quantization",)], True),
    "BD-KD": ([("distillation",)], True),
    "one after the other, a schedule each": (SEQUENCE, True),
    "one after the other, one schedule": (SEQUENCE, False),
}


def vit(width, depth, patch):
    shape = {"img_size": 28, "in_chans": 1, "patch_size": patch, "num_classes": 10}
    return timm.create_model(
        "vit_tiny_patch16_224", **shape, embed_dim=width, depth=depth, num_heads=max(1, width // 32)
    )


class Transformer(pl.LightningModule):
    """What a user has: a timm model and F.cross_entropy. ``part`` of ``parts`` is a stretch of a longer schedule."""

    def __init__(self, run, part=0, parts=1):
        super().__init__()
        self.model = vit(run["width"], run["depth"], run["patch"])
        self.lr, self.part, self.parts = run["lr"], part, parts

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        first, total = self.part * steps, self.parts * steps
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(first + step, total, 0.1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def added(names, run):
    """The callbacks of one part."""
    made = {
        "loss": lambda: SwapLoss("poly_loss"),
        "sparsity": lambda: NMSparsity(2, 4, "nm_srste"),
        "held": lambda: NMSparsity(2, 4, "nm_oneshot"),  # the zeros that are there, kept
        "quantization": lambda: QAT(8, 8),
        "distillation": lambda: OnlineDistillation(vit(2 * run["width"], run["depth"], run["patch"]), "bdkd"),
    }
    found = []
    for name in names:
        torch.manual_seed(run["seed"] + 1000)
        found.append(made[name]())
    return found


def train(run, data, device, clock):
    """Returns the module, plugged, and the techniques of its last part."""
    parts, own = ROWS[run["row"]]
    module = state = None
    batches = Batches(*(part[: run["limit"]] for part in data["train"][:2]), run["batch"], run["seed"])
    for number, names in enumerate(parts):
        callbacks = added(names, run)
        torch.manual_seed(run["seed"])
        module = Transformer(run, *((0, 1) if own else (number, len(parts))))
        if state is not None:
            module.load_state_dict(state)
        trainer = pl.Trainer(
            max_epochs=run["epochs"] // len(parts),
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            callbacks=callbacks,
            logger=False,
            log_every_n_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with clock:
            trainer.fit(module, batches)
        state = fold(module).state_dict()
    return module.to(device), [c.technique for c in callbacks if hasattr(c, "technique")]


def leave(module, techniques, folder, run):
    """Exports, and loads what left into a plain timm model: the network, its file, whether it is in integers."""
    if any(type(technique).__name__ == "QATTechnique" for technique in techniques):
        export_quantized(module.cpu(), folder, "packed", overwrite=True)
        file = folder / "model.safetensors"
        return load_packed(vit(run["width"], run["depth"], run["patch"]), file), file, True
    export_artifact(module.cpu(), folder, techniques=techniques, overwrite=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True), folder / "model.safetensors", False


def folder_of(output, row, seed):
    return output.with_suffix("") / f"{row.replace(':', 'to').replace(' ', '_').replace(',', '')}-{seed}"


def work(output, run, root, device):
    """Scores of the exported model on the test images, bytes, seconds, and its distance from the trained one."""
    data, clock = fashion_mnist(root, None, device), Clock()
    module, techniques = train(run, data, device, clock)
    x, y = data["test"][:2]
    trained = predict(module, x, 500).cpu()
    plain, file, integers = leave(module, techniques, folder_of(output, run["row"], run["seed"]), run)
    z = predict(plain, x.cpu(), 500)
    weights = [p for name, p in fold(module).model.named_parameters() if name.startswith("blocks") and p.ndim == 2]
    return {
        **scores(z, y.cpu()),
        "trained accuracy": scores(trained, y.cpu())["accuracy"],
        **compare(trained, z),
        "zeros": sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights),
        "integers": integers,
        "bytes": file.stat().st_size,
        "deflated": deflated(file),
        "seconds": clock.wall,
        "processor seconds": clock.processor,
    }


@torch.inference_mode()
def latency(arguments):
    """Milliseconds of what left, in turns within a round, in an order drawn anew; ratios within a round."""
    prepare(torch.get_num_threads())
    seed, shape = arguments.seeds[0], (arguments.width, arguments.depth, arguments.patch)
    folders = {row: folder_of(arguments.output, row, seed) for row in ("plain", "2:4", "W8A8", "together")}
    dense = {r: timm.create_model(f"local-dir:{folders[r]}", pretrained=True).eval() for r in ("plain", "2:4")}
    found = {
        "plain, float32": (dense["plain"], torch.float32),
        "plain, bfloat16": (copy.deepcopy(dense["plain"]).bfloat16(), torch.bfloat16),
        "2:4, float32": (dense["2:4"], torch.float32),
    }
    for row in ("W8A8", "together"):
        found[f"{row}, integers"] = load_packed(vit(*shape), folders[row] / "model.safetensors"), torch.float32
    rows = []
    for batch in arguments.batches:
        x, seconds, order = torch.randn(batch, 1, 28, 28), {name: [] for name in found}, list(found)
        for round_ in range(arguments.rounds + 2):
            random.shuffle(order)
            for name in order:
                model, dtype = found[name]
                given = x.to(dtype)
                start = time.perf_counter()
                model(given)
                if round_ >= 2:
                    seconds[name].append(time.perf_counter() - start)
        base = seconds["plain, float32"]
        for name, own in seconds.items():
            ratio = statistics.median(b / o for b, o in zip(base, own, strict=True))
            rows.append([batch, name, f"{1e3 * statistics.median(own):.3f}", f"{ratio:.2f}"])
    show("latency", ["batch", "what", "ms", "times as fast as plain float32"], rows, arguments)


def main(argv=None):
    def extra(parser):
        parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
        parser.add_argument("--depth", type=int, default=2)
        parser.add_argument("--patch", type=int, default=7)
        parser.add_argument("--lr", type=float, default=2e-3)
        parser.add_argument("--latency", action="store_true", help="time what the first seed's runs left, instead")
        parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
        parser.add_argument("--rounds", type=int, default=100)

    arguments = parse(__doc__, argv, 8, extra, batch=64)

    def describe(row, seed):
        own = {name: getattr(arguments, name) for name in ("depth", "patch", "lr")}
        return {"row": row, "seed": seed, **own, **settings(arguments)}

    if arguments.latency:
        latency(arguments)
        return
    chosen = [describe(row, seed) for seed in arguments.seeds for row in arguments.rows]
    results = run_all(functools.partial(work, arguments.output), chosen, arguments)
    table = []
    for row in arguments.rows:
        own = [results[key(describe(row, seed))] for seed in arguments.seeds]
        cells = [spread([r[name] for r in own], scale) for name, scale in (("accuracy", 100), ("ece", 100), ("nll", 1))]
        cells += [f"{statistics.median(r[n] for r in own):,.0f}" for n in ("bytes", "deflated")]
        cells += [f"{statistics.median(r[n] for r in own):.1f}" for n in ("seconds", "processor seconds")]
        cells += [f"{max(r['export difference'] for r in own):.1e}", f"{min(r['export agreement'] for r in own):.4f}"]
        table.append([row, *cells, f"{100 * own[0]['zeros']:.1f}"])
    header = ["run", "test accuracy in %: median [min, max]", "calibration error in %", "NLL", "bytes", "deflated"]
    header += ["seconds", "processor seconds", "exported from trained: logits", "same class", "zeros in blocks in %"]
    show("what left each run, on the test images", header, table, arguments)


if __name__ == "__main__":
    main()
