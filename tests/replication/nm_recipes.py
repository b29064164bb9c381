"""N:M recipes on a vision transformer from scratch: test accuracy by recipe and pattern at equal steps.

Fashion-MNIST, a small timm ViT (patch 4, feed-forward layers sparse, as in arXiv 2402.04744), AdamW with the same
schedule for every recipe, which all have the dense and fine-tune phases of their cards. The paper's ordering: within
noise of each other and of dense at 2:4; from 1:16 on the decay recipes above SR-STE.

    python tests/replication/nm_recipes.py --root DATA --output nm_recipes.json --jobs 8
"""

import statistics

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from common import Batches, Curve, fashion_mnist, fit
from runner import key, parse, run_all, settings, show, spread

from lightning_lossplug.callbacks import NMSparsity
from lightning_lossplug.integrations.schedule import cosine_per_step

PHASES = {"dense_fraction": 0.05, "finetune_fraction": 0.1}
RECIPES = {
    "SR-STE": ("nm_srste", {}),
    "STE": ("nm_ste", {}),
    "MdGf-Linear": ("mdgf_linear", PHASES),
    "MdGf-Exponential": ("mdgf_exponential", PHASES),
    "SdGf-Stepwise": ("sdgf_stepwise", PHASES),
    "SdGf-Geometric": ("sdgf_geometric", PHASES),
}
PATTERNS = ("2:4", "1:8", "1:16", "1:32")


class Transformer(pl.LightningModule):
    """What a user has: a timm model and F.cross_entropy."""

    def __init__(self, width, depth, lr):
        super().__init__()
        shape = {"img_size": 28, "in_chans": 1, "patch_size": 4, "num_classes": 10}
        self.model = timm.create_model(
            "vit_tiny_patch16_224", **shape, embed_dim=width, depth=depth, num_heads=max(1, width // 32)
        )
        self.lr = lr

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        x, y, _ = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)
        return cosine_per_step(optimizer, self.trainer, warmup_fraction=0.1)


def work(run, root, device):
    """Test accuracy after the last epoch, and the zeros of the masked weights."""
    data = fashion_mnist(root, run["limit"], device)
    torch.manual_seed(run["seed"])
    module, curve = Transformer(run["width"], run["depth"], run["lr"]), Curve()
    sparse = []
    if run["recipe"]:
        n, _, m = run["pattern"].partition(":")
        sparse = [NMSparsity(int(n), int(m), run["recipe"], include=["*.mlp.*"], **run["options"])]
    test = Batches(*data["test"], 500)
    fit(module, Batches(*data["train"], run["batch"], run["seed"]), run["epochs"], [*sparse, curve], test, device)
    zeros = 0.0
    for callback in sparse:
        weights = [m.weight for n, m in callback.technique.fold(module).named_modules() if n.endswith(("fc1", "fc2"))]
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    return {"accuracy": curve.values[-1]["accuracy"], "zeros": zeros}


def main(argv=None):
    def extra(parser):
        parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
        parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
        parser.add_argument("--depth", type=int, default=4)
        parser.add_argument("--lr", type=float, default=1e-3)

    arguments = parse(__doc__, argv, 20, extra, batch=128)

    def describe(pattern, name, seed):
        recipe, options = RECIPES[name] if name else (None, {})
        own = {"pattern": pattern, "recipe": recipe, "options": options, "depth": arguments.depth, "lr": arguments.lr}
        return {**own, "seed": seed, **settings(arguments)}

    cases = [(None, None), *((pattern, name) for pattern in arguments.patterns for name in arguments.recipes)]
    results = run_all(work, [describe(*case, seed) for seed in arguments.seeds for case in cases], arguments)
    dense = [results[key(describe(None, None, seed))]["accuracy"] for seed in arguments.seeds]
    for pattern in arguments.patterns:
        rows = [["dense", spread(dense, 100), "", "", ""]]
        for name in arguments.recipes:
            own = [results[key(describe(pattern, name, seed))] for seed in arguments.seeds]
            accuracy = [r["accuracy"] for r in own]
            std = f"{100 * statistics.stdev(accuracy):.2f}" if len(own) > 1 else ""
            gap = statistics.median(a - d for a, d in zip(accuracy, dense, strict=True))
            rows.append([name, spread(accuracy, 100), std, f"{100 * gap:+.2f}", f"{100 * own[0]['zeros']:.1f} %"])
        header = ["recipe", "test accuracy in %: median [min, max]", "std", "median gap to dense", "zeros in masked"]
        show(f"{pattern}, last epoch", header, rows, arguments)


if __name__ == "__main__":
    main()
