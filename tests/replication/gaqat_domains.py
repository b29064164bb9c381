"""Quantisation-aware training for a domain that was never seen: LSQ, LSQ with flat minima, GAQAT, on Fashion-MNIST.

Images are dealt to four domains (rotated, on a background, blurred, inverted). One is held out, the network trains on
domain-balanced batches of the other three, first in float, then quantised from there with each method for as many
epochs; the test is the domain that was held out. All four are held out in turn; a seed's number is their mean. At
full strength nothing is left of a small network in the unseen domain; the default is half of it.

* float: goes on without quantisers; LSQ: one pass
* LSQ+SAM, LSQ+SAGM: two passes, no scale is ever frozen
* GAQAT: SAGM, and the task gradients of the fifth of the scales with the least disorder are frozen, window by window

    python tests/replication/gaqat_domains.py --root DATA --output gaqat_domains.json
"""

import copy
import functools
import statistics

import torch
import torch.nn.functional as F
from common import Classifier, fit, predict
from runner import key, parse, run_all, settings, show

from lightning_lossplug.callbacks import QAT, GradientAdaptiveQAT
from lightning_lossplug.integrations import DomainShiftData
from lightning_lossplug.integrations.data.domains import DOMAINS

# Scales of few bits start as LSQ published them, those of the first and last layers from the range.
START = {"weight_options": {"init": "auto"}, "activation_options": {"init": "auto"}}


def two_passes(bits, run, sharpness, fraction):
    """GradientAdaptiveQAT with a share of the scales frozen, or none."""
    options = {"disorder_window": run["window"], "freeze_fraction": fraction, "sharpness": sharpness}
    return GradientAdaptiveQAT(bits, bits, **options, **START)


METHODS = {
    "float": lambda bits, run: None,
    "LSQ": lambda bits, run: QAT(bits, bits, **START),
    "LSQ+SAM": lambda bits, run: two_passes(bits, run, "sam", 0.0),
    "LSQ+SAGM": lambda bits, run: two_passes(bits, run, "sagm", 0.0),
    "GAQAT": lambda bits, run: two_passes(bits, run, "sagm", 0.2),
}


class Network(Classifier):
    """The classifier on batches without indices."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


@functools.cache
def data_for(root, held_out, seed, batch, limit, strength):
    """The data module, set up once."""
    data = DomainShiftData(held_out, root, batch, val_split=1 / 6, train_limit=limit, seed=seed, strength=strength)
    data.setup("fit")
    return data


@functools.cache
def start(root, held_out, seed, batch, limit, strength, width, epochs, device):
    """The float network that every method goes on from."""
    torch.manual_seed(seed)
    data = data_for(root, held_out, seed, batch, limit, strength)
    return fit(Network(lr=2e-3, width=width), data.train_dataloader(), epochs, device=device).cpu()


@torch.no_grad()
def accuracy(module, part, device):
    """Share of a whole split that is right."""
    x, y = part.__getitems__(list(range(len(part))))[:2]
    return float((predict(module, x.to(device)).argmax(1) == y.to(device)).float().mean())


def work(run, root, device):
    """Accuracy on the domain held out, and on unseen images of the three others."""
    where = (root, *(run[name] for name in ("held_out", "seed", "batch", "limit", "strength")))
    module = copy.deepcopy(start(*where, run["width"], run["epochs"], device))
    data, callback = data_for(*where), METHODS[run["method"]](run["bits"], run)
    module.lr = run["qat_lr"]
    torch.manual_seed(run["seed"])
    fit(module, data.train_dataloader(), run["qat_epochs"], [callback] if callback else [], device=device)
    found = {"unseen": accuracy(module, data.test_set, device), "seen": accuracy(module, data.val_set, device)}
    if isinstance(callback, GradientAdaptiveQAT):
        gate = callback.technique.gate
        found |= {"disorder": float(gate.disorder.mean()), "frozen": float(gate.frozen.float().mean())}
    return found


def main(argv=None):
    def extra(parser):
        parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
        parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
        parser.add_argument("--held-out", nargs="+", choices=DOMAINS, default=list(DOMAINS))
        parser.add_argument("--qat-epochs", type=int, default=5)
        parser.add_argument("--qat-lr", type=float, default=5e-4)
        parser.add_argument("--strength", type=float, default=0.5, help="of the domains, above 0 to 1")
        parser.add_argument("--window", type=int, default=50, help="optimizer steps between two decisions of GAQAT")

    arguments = parse(__doc__, argv, 10, extra, batch=96)
    names = ("qat_epochs", "qat_lr", "window", "strength")
    own = {name: getattr(arguments, name) for name in names} | settings(arguments)

    def describe(method, bits, domain, seed):
        bits = None if method == "float" else bits
        return {"method": method, "bits": bits, "held_out": domain, "seed": seed, **own}

    domains = [(s, d) for s in arguments.seeds for d in arguments.held_out]  # all that go on from one float network
    runs = [describe(m, b, d, s) for s, d in domains for b in arguments.bits for m in arguments.methods]
    results = run_all(work, runs, arguments)
    for bits in arguments.bits:
        rows = []
        for method in arguments.methods:
            table = [[results[key(describe(method, bits, d, s))] for d in arguments.held_out] for s in arguments.seeds]
            cells = [method]
            for measure in ("unseen", "seen"):
                seeds = [100 * statistics.mean(r[measure] for r in row) for row in table]
                spread = statistics.stdev(seeds) if len(seeds) > 1 else 0.0
                cells.append(f"{statistics.mean(seeds):.2f} ± {spread:.2f}")
            for column in range(len(arguments.held_out)):
                cells.append(f"{100 * statistics.mean(row[column]['unseen'] for row in table):.2f}")
            rows.append(cells)
        header = ["method", "unseen domain: mean ± std over seeds", "seen domains", *arguments.held_out]
        show(f"W{bits}A{bits}: accuracy in %; the last columns are the domains held out.", header, rows, arguments)


if __name__ == "__main__":
    main()
