"""Fashion-MNIST with symmetric label noise: test accuracy by loss.

A part of the training labels moves to one of the nine other classes, drawn by seed; the test labels are clean. Every
loss has the same network, steps, optimizer and seeds. Two protocols:

* published: the parameters of the method's card (paper or official code): the first setting of each list below. The
  LDR paper has no such single setting, it tunes on a grid; first stands the default of its code.
* tuned: four settings for every loss (losses without parameters: four learning rates), one trial each with a seed of
  its own, chosen by accuracy on 10,000 held-out samples whose labels are as noisy; then the seeds as above.

The last epoch is the number to read: nobody can pick the best epoch on clean labels. It is given for comparison.

    python tests/replication/label_noise.py --root DATA --output label_noise.json --jobs 8
"""

import statistics

import torch
from common import fashion_mnist, predict, train_classifier
from runner import key, parse, run_all, settings, show, spread, tune

RATE = 2e-3
RATES = [{"lr": lr} for lr in (RATE, RATE / 2, RATE / 4, RATE * 2)]
LDR = [(1.0, 0.1), (1.0, 1.0), (10.0, 0.1), (10.0, 1.0)]  # lambda, margin
NORMAL = {"normalize": "softplus_l1"}
ALDR = {**NORMAL, "alpha": 2.0, "margin_in_kl": False, "floor": 1e-5}  # as in the official code
LOSSES = {
    "CE": ("cross_entropy", RATES),
    "GCE": ("gce", [{"q": q} for q in (0.7, 0.3, 0.5, 0.9)]),
    "MAE": ("mae", RATES),
    "NCE+RCE": ("active_passive", [{"alpha": a, "beta": b} for a, b in ((1, 1), (10, 0.1), (1, 0.1), (10, 1))]),
    "NCE+MAE": (
        "active_passive",
        [{"passive": "mae", "alpha": a, "beta": b} for a, b in ((1, 1), (10, 1), (1, 10), (10, 0.1))],
    ),
    "SCE": ("symmetric_ce", [{"alpha": a, "beta": b} for a, b in ((0.1, 1), (6, 0.1), (1, 1), (0.01, 1))]),
    "LDR-KL": ("ldr_kl", [{**NORMAL, "lambda_": v, "margin": c} for v, c in LDR]),
    "ALDR-KL": ("aldr_kl", [{**ALDR, "lambda_0": v, "margin": c} for v, c in LDR]),
    "ALDR-KL, table": ("aldr_kl", [{**ALDR, "lambda_0": v, "margin": c, "dataset_size": "all"} for v, c in LDR]),
    "focal": ("focal", [{"gamma": g} for g in (2.0, 0.5, 1.0, 5.0)]),
    "Poly-1": ("poly_loss", [{"epsilon": e} for e in (1.0, -1.0, 2.0, 5.0)]),
}


def flip_symmetric(y, rate, seed, classes=10):
    """Moves exactly ``round(rate * len(y))`` labels, each to one of the other classes with equal probability."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(y), generator=generator)[: round(rate * len(y))]
    step = torch.randint(1, classes, (len(chosen),), generator=generator)
    flipped = y.cpu().clone()
    flipped[chosen] = (flipped[chosen] + step) % classes
    return flipped.to(y.device)


def work(run, root, device):
    """Accuracy on clean test labels, last and best epoch, and on noisy validation labels at the last."""
    data = fashion_mnist(root, run["limit"], device)
    (x, y), (x_val, y_val) = data["train"], data["val"]
    y = flip_symmetric(y, run["noise"], run["seed"])
    y_val = flip_symmetric(y_val, run["noise"], run["seed"] + 1_000_000)
    module, curve = train_classifier(run, (x, y), data["test"], device)
    accuracy = [epoch["accuracy"] for epoch in curve]
    noisy = (predict(module, x_val).argmax(1) == y_val).float().mean()
    return {"last": accuracy[-1], "best": max(accuracy), "noisy_val": float(noisy), "curve": accuracy}


def report(title, chosen, results, describe, arguments):
    """One table per noise rate, and which losses end above cross-entropy."""
    for noise in sorted({noise for _, noise in chosen}):
        rows, median = [], {}
        for name in arguments.losses:
            setting = chosen[name, noise]
            own = [results[key(describe((name, noise), setting, seed))] for seed in arguments.seeds]
            median[name] = statistics.median(r["last"] for r in own)
            shown = [f"{k}={v}" for k, v in setting.items() if k not in (*ALDR, "dataset_size")]
            cells = [name, spread([r["last"] for r in own], 100), spread([r["best"] for r in own], 100)]
            rows.append([*cells, ", ".join(shown)])
        rows.sort(key=lambda row: -median[row[0]])
        above = [name for name in median if median[name] > median.get("CE", 1.0)]
        header = ["loss", "last epoch: median [min, max]", "best epoch", "setting"]
        text = f"Label noise {noise:.0%}, {title}: test accuracy in %. Above CE: {', '.join(above) or 'none'}."
        show(text, header, rows, arguments)


def main(argv=None):
    def extra(parser):
        parser.add_argument("--noise", type=float, nargs="+", default=[0.4, 0.6, 0.0])
        parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
        parser.add_argument("--protocols", nargs="+", choices=["published", "tuned"], default=["published", "tuned"])

    arguments = parse(__doc__, argv, 15, extra, batch=512)

    def describe(case, setting, seed):
        parameters = {k: v for k, v in setting.items() if k != "lr"}
        own = {"noise": case[1], "loss": LOSSES[case[0]][0], "parameters": parameters, "lr": setting.get("lr", RATE)}
        return {**own, "seed": seed, **settings(arguments)}

    def finish(title, chosen):
        runs = [describe(case, setting, seed) for seed in arguments.seeds for case, setting in chosen.items()]
        report(title, chosen, run_all(work, runs, arguments), describe, arguments)

    cases = [(name, noise) for noise in arguments.noise for name in arguments.losses]
    if "published" in arguments.protocols:
        finish("published parameters", {case: LOSSES[case[0]][1][0] for case in cases})
    grids = {case: LOSSES[case[0]][1] for case in cases if case[1] > 0}  # without noise there is nothing to withstand
    if "tuned" in arguments.protocols and grids:
        finish("tuned, 4 trials per loss", tune(work, grids, describe, arguments, "noisy_val"))


if __name__ == "__main__":
    main()
