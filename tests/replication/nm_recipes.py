"""N:M recipes on a vision transformer from scratch: test accuracy by recipe and pattern at equal steps.

Fashion-MNIST, a small timm ViT (patch 4, feed-forward layers sparse, as in arXiv 2402.04744), AdamW with the same
schedule for every recipe, which all have the dense and fine-tune phases of their cards. The paper's ordering: within
noise of each other and of dense at 2:4; from 1:16 on the decay recipes above SR-STE. Beside the accuracy each run keeps
what says why: training loss, mask entries changed per update (over tenths of the run), magnitude kept at the end.

    python tests/replication/nm_recipes.py --output nm_recipes.json --jobs 8
"""

import statistics

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from common import Batches, fashion_mnist, fit, predict
from runner import key, parse, run_all, settings, show, spread

from lightning_lossplug.callbacks import NMSparsity
from lightning_lossplug.integrations.schedule import cosine_per_step
from lightning_lossplug.sparsity import ASTAdamW, STEPAdamW

PHASES = {"dense_fraction": 0.05, "finetune_fraction": 0.1}
RECIPES = {
    "SR-STE": ("nm_srste", {}),
    "SR-STE, dense phase": ("nm_srste", {"dense_fraction": 0.05}),
    "SR-STE, decoupled": ("nm_srste", {"decoupled": True}),
    "STE": ("nm_ste", {}),
    "MdGf-Linear": ("mdgf_linear", PHASES),
    "MdGf-Exponential": ("mdgf_exponential", PHASES),
    "SdGf-Stepwise": ("sdgf_stepwise", PHASES),
    "SdGf-Geometric": ("sdgf_geometric", PHASES),
    "half dense, one-shot": ("nm_oneshot", {"dense_fraction": 0.5}),
    "S-STE": ("nm_sste", {}),
    "STEP": ("nm_step", {}),
    "AST": ("nm_ast", {"increase_step": 500}),
}
PLACES = {"mlp": ["*.mlp.*"], "blocks": ["*.blocks.*"]}
PATTERNS = ("2:4", "1:8", "1:16", "1:32")


class Transformer(pl.LightningModule):
    """What a user has: a timm model and F.cross_entropy."""

    def __init__(self, width, depth, patch, lr, recipe):
        super().__init__()
        shape = {"img_size": 28, "in_chans": 1, "patch_size": patch, "num_classes": 10}
        self.model = timm.create_model(
            "vit_tiny_patch16_224", **shape, embed_dim=width, depth=depth, num_heads=max(1, width // 32)
        )
        self.lr, self.recipe = lr, recipe

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        options = {"lr": self.lr, "weight_decay": 0.05}
        if self.recipe == "nm_step":
            steps = int(self.trainer.estimated_stepping_batches)
            # The threshold 1e-8 is never met in so short a run; t_max is a tenth, as long as other dense phases.
            optimizer = STEPAdamW(self.parameters(), **options, t_min=0, t_max=max(1, steps // 10))
        elif self.recipe == "nm_ast":
            optimizer = ASTAdamW(self.parameters(), **options)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), **options)
        return cosine_per_step(optimizer, self.trainer, warmup_fraction=0.1)


class Flips(pl.Callback):
    """Keeps the mask flip rate of every step."""

    def __init__(self, technique):
        self.technique, self.values = technique, []

    def on_train_batch_end(self, *args):
        self.values.append(float(self.technique.logs().get("flip_rate", 0.0)))

    def tenths(self):
        count = len(self.values)
        return [statistics.mean(self.values[i * count // 10 : (i + 1) * count // 10] or [0.0]) for i in range(10)]


def work(run, root, device):
    """Test accuracy after the last step on all test images, the zeros of the masked weights, flips and kept mass."""
    data = fashion_mnist(root, None, device)
    torch.manual_seed(run["seed"])
    module = Transformer(run["width"], run["depth"], run["patch"], run["lr"], run["recipe"])
    sparse = []
    if run["recipe"]:
        n, _, m = run["pattern"].partition(":")
        sparse = [NMSparsity(int(n), int(m), run["recipe"], include=PLACES[run["place"]], **run["options"])]
    flips = [Flips(callback.technique) for callback in sparse]
    x, y = (part[: run["limit"]] for part in data["train"][:2])
    fit(module, Batches(x, y, run["batch"], run["seed"]), run["epochs"], [*sparse, *flips], None, device)
    result = {"train_loss": float(F.cross_entropy(predict(module, x, 500), y))}
    x, y = data["test"][:2]
    z = predict(module, x, 500)
    result |= {"accuracy": float((z.argmax(1) == y).float().mean()), "test_loss": float(F.cross_entropy(z, y))}
    for callback, flip in zip(sparse, flips, strict=True):
        layers = [(layer.weight.detach().abs(), layer.transform.mask) for layer in callback.technique.layers.values()]
        result["kept_mass"] = statistics.mean(float((w * mask).sum() / w.sum()) for w, mask in layers)
        result["flips"] = flip.tenths()
        plain = callback.technique.fold(module)
        weights = [plain.get_submodule(name).weight for name in callback.technique.layers]
        result["zeros"] = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    return result


def main(argv=None):
    def extra(parser):
        parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
        parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
        parser.add_argument("--depth", type=int, default=4)
        parser.add_argument("--patch", type=int, default=4)
        parser.add_argument(
            "--place", choices=list(PLACES), default="mlp", help="feed-forward layers, or attention too"
        )
        parser.add_argument("--lr", type=float, default=1e-3)

    arguments = parse(__doc__, argv, 20, extra, batch=128)

    def describe(pattern, name, seed):
        recipe, options = RECIPES[name] if name else (None, {})
        shape = {"depth": arguments.depth, "patch": arguments.patch, "lr": arguments.lr}
        shape["place"] = arguments.place if name else None  # a dense run serves both
        return {"pattern": pattern, "recipe": recipe, "options": options, **shape, "seed": seed, **settings(arguments)}

    cases = [(None, None), *((pattern, name) for pattern in arguments.patterns for name in arguments.recipes)]
    results = run_all(work, [describe(*case, seed) for seed in arguments.seeds for case in cases], arguments)
    dense = [results[key(describe(None, None, seed))]["accuracy"] for seed in arguments.seeds]
    for pattern in arguments.patterns:
        std = f"{100 * statistics.stdev(dense):.2f}" if len(dense) > 1 else ""
        loss = statistics.median(results[key(describe(None, None, seed))]["train_loss"] for seed in arguments.seeds)
        rows = [["dense", spread(dense, 100), std, "", f"{loss:.3f}", "", "", "", ""]]
        for name in arguments.recipes:
            own = [results[key(describe(pattern, name, seed))] for seed in arguments.seeds]
            accuracy = [r["accuracy"] for r in own]
            std = f"{100 * statistics.stdev(accuracy):.2f}" if len(own) > 1 else ""
            gap = statistics.median(a - d for a, d in zip(accuracy, dense, strict=True))
            first, last = (100 * statistics.mean(r["flips"][tenth] for r in own) for tenth in (1, 8))
            kept = 100 * statistics.mean(r["kept_mass"] for r in own)
            loss = statistics.median(r["train_loss"] for r in own)
            why = [f"{loss:.3f}", f"{100 * own[0]['zeros']:.1f}", f"{kept:.1f}", f"{first:.3f}", f"{last:.3f}"]
            rows.append([name, spread(accuracy, 100), std, f"{100 * gap:+.2f}", *why])
        header = ["recipe", "test accuracy in %: median [min, max]", "std", "median gap to dense"]
        header += [
            "training loss",
            "zeros in masked in %",
            "kept mass in %",
            "flips per update in %: second tenth",
            "ninth tenth",
        ]
        show(f"{pattern} in {arguments.place}, last epoch", header, rows, arguments)


if __name__ == "__main__":
    main()
