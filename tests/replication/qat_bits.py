"""Quantisation-aware fine-tuning of small timm models by bit width and quantiser, on Fashion-MNIST.

Each seed trains the network in float, then goes on from there: in float as the reference, or quantised, with the same
batches, learning rates and number of steps. First convolution and output layer have 8 bits; below 3 bits only weights
are that short, inputs have 8.

    python tests/replication/qat_bits.py --output qat_bits.json --width 16 --limit 10000
"""

import copy
import functools
import statistics

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from common import Batches, fashion_mnist, fit, predict
from runner import key, parse, run_all, settings, show

from lightning_lossplug.callbacks import QAT
from lightning_lossplug.integrations.schedule import cosine_per_step

SEVERAL = {
    "LSQ": {},
    "LSQ, started as published": {"weight_options": {"init": "auto"}, "activation_options": {"init": "auto"}},
    "LSQ, inputs started as published": {"activation_options": {"init": "auto"}},
    "LSQ, inputs LSQ+": {"activation": "lsq_plus"},
    "LSQ+, started as published": {
        "weight": "lsq_plus",
        "activation": "lsq_plus",
        "weight_options": {"init": "lsq_plus"},
        "activation_options": {"init": "lsq_plus"},
    },
    "EWGS": {"weight": "ewgs", "activation": "ewgs"},
    "DoReFa, inputs PACT": {"weight": "dorefa", "activation": "pact", "activation_options": {"alpha_init": None}},
}
METHODS = {
    "W8A8": SEVERAL,
    "W4A4": SEVERAL,
    "W3A3": SEVERAL,
    "W2A8": {
        "SEQ": {},
        "LSQ": {"weight": "lsq"},
        "LSQ, started as published": {"weight": "lsq", "weight_options": {"init": "auto"}},
        "EWGS": {"weight": "ewgs"},
    },
    "W1.58A8": {"SEQ": {}, "TBT": {"weight": "tbt", "weight_options": {"weight_bits": 2}}},
    "W1A8": {
        "elastic binarisation": {},
        "TBT": {"weight": "tbt"},
        "ReSTE": {"weight": "reste"},
        "BiPer": {"weight": "biper"},
        "BinaryDM, one basis": {"weight": "binarydm", "weight_options": {"order": 1}},
    },
}


def resnet(width):
    """One basic block per stage."""
    shape = {"layers": (1, 1, 1, 1), "channels": tuple(width << level for level in range(4))}
    return timm.create_model("resnet18", in_chans=1, num_classes=10, stem_type="deep", stem_width=width // 2, **shape)


def vit(width):
    """Two blocks on sixteen patches."""
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 4 * width, "depth": 2, "num_heads": max(1, width // 8)}
    return timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, **shape)


def mobilenet(_):
    """MobileNetV3-small at half of its width, whatever ``--width`` says: its names come in three sizes."""
    return timm.create_model("mobilenetv3_small_050", in_chans=1, num_classes=10)


MODELS = {"resnet": resnet, "vit": vit, "mobilenet": mobilenet}


class Network(pl.LightningModule):
    """What a user has: a timm model, F.cross_entropy, AdamW."""

    def __init__(self, model, width, lr):
        super().__init__()
        self.model, self.lr = MODELS[model](width), lr

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01, fused=True)
        return cosine_per_step(optimizer, self.trainer, warmup_fraction=0.05)


def images(run, root, device):
    """Training and test images."""
    data = fashion_mnist(root, None, device)
    return tuple(part[: run["limit"]] for part in data["train"][:2]), data["test"][:2]


@functools.cache
def start(root, device, model, seed, width, lr, batch, epochs, limit):
    """The float network that every method goes on from."""
    torch.manual_seed(seed)
    train = images({"limit": limit}, root, device)[0]
    return fit(Network(model, width, lr), Batches(*train, batch, seed), epochs, device=device).cpu()


def work(run, root, device):
    """Accuracy and loss on all test images, loss on 2,000 training images, after the last step."""
    train, (x, y) = images(run, root, device)
    given = (run[name] for name in ("model", "seed", "width", "lr", "batch", "epochs", "limit"))
    module = copy.deepcopy(start(root, device, *given))
    module.lr = run["qat_lr"]
    callbacks = []
    if run["bits"] is not None:
        w, _, a = run["bits"].removeprefix("W").partition("A")
        callbacks = [QAT(float(w), int(a), **run["options"])]
    torch.manual_seed(run["seed"])
    fit(module, Batches(*train, run["batch"], run["seed"] + 1000), run["qat_epochs"], callbacks, device=device)
    z = predict(module, x, 1000)
    found = {"accuracy": float((z.argmax(1) == y).float().mean()), "test_loss": float(F.cross_entropy(z, y))}
    z = predict(module, train[0][:2000], 1000)
    return {**found, "train_loss": float(F.cross_entropy(z, train[1][:2000]))}


def main(argv=None):
    def extra(parser):
        parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
        parser.add_argument("--bits", nargs="+", choices=list(METHODS), default=list(METHODS))
        parser.add_argument("--methods", nargs="+", default=None, help="names of the quantisers; default: all")
        parser.add_argument("--lr", type=float, default=2e-3)
        parser.add_argument("--qat-lr", type=float, default=1e-3)
        parser.add_argument("--qat-epochs", type=int, default=3)

    arguments = parse(__doc__, argv, 10, extra, batch=128)
    own = {name: getattr(arguments, name) for name in ("lr", "qat_lr", "qat_epochs")} | settings(arguments)

    def describe(model, bits, method, seed):
        options = METHODS[bits][method] if bits else {}
        return {"model": model, "bits": bits, "options": options, "seed": seed, **own}

    wanted = [(b, m) for b in arguments.bits for m in METHODS[b] if m in (arguments.methods or METHODS[b])]
    cases = [(model, *case) for model in arguments.models for case in [(None, None), *wanted]]
    results = run_all(work, [describe(*case, seed) for seed in arguments.seeds for case in cases], arguments)
    for model in arguments.models:
        rows, reference = [], [results[key(describe(model, None, None, seed))] for seed in arguments.seeds]
        for bits, method in [(None, None), *wanted]:
            found = [results[key(describe(model, bits, method, seed))] for seed in arguments.seeds]
            values = [100 * one["accuracy"] for one in found]
            gaps = [100 * (one["accuracy"] - other["accuracy"]) for one, other in zip(found, reference, strict=True)]
            std = [f" ({statistics.stdev(v):.2f})" if len(v) > 1 else "" for v in (values, gaps)]
            cells = [f"{statistics.mean(values):.2f}{std[0]}", f"{statistics.median(values):.2f}"]
            cells += [f"{statistics.mean(gaps):+.2f}{std[1]}" if bits else ""]
            cells += [f"{statistics.mean(one['train_loss'] for one in found):.3f}"]
            rows.append([bits or "float", method or "", *cells])
        header = ["bits", "quantiser", "accuracy in %: mean (std)", "median", "against float: mean (std)"]
        show(model, [*header, "training loss"], rows, arguments)


if __name__ == "__main__":
    main()
