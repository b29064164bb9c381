"""Fashion-MNIST with a long tail: macro accuracy of re-weighting, focal, Poly and LDR losses at equal tuning.

The class of rank r keeps ``ratio^(-r/9)`` of its training images (ratio 100: 5000 down to 50); which class has which
rank is drawn by seed. Test and validation sets are balanced. Every method has four settings, the published one first
(cross-entropy: four learning rates, the best of which all others use), one trial each on a seed of its own, the best by
macro accuracy on the validation images; then the seeds, with the same network and steps. Last epoch.

    python tests/replication/long_tail.py --root DATA --output long_tail.json --jobs 8
"""

import statistics

import torch
from common import fashion_mnist, predict, train_classifier
from runner import key, parse, run_all, settings, show, spread, tune

LDR = [{"margin": c, "lambda": v} for v, c in ((1.0, 0.1), (1.0, 1.0), (10.0, 0.1), (10.0, 1.0))]
POWERS = (1.0, 0.75, 0.5, 0.25)  # class weights n^-power
WATCHED = 1000  # test images of the curve over the epochs; the results are on all of them
NORMAL = {"normalize": "softplus_l1"}
ALDR = {**NORMAL, "alpha": 2.0, "margin_in_kl": False, "floor": 1e-5, "dataset_size": "all"}
METHODS = {
    "CE": ("cross_entropy", [{"lr": lr} for lr in (1e-3, 5e-4, 2.5e-4, 2e-3)]),
    "CE, class weights": ("cross_entropy", [{"power": p} for p in POWERS]),
    "focal": ("focal", [{"gamma": g} for g in (2.0, 0.5, 1.0, 5.0)]),
    "Poly-1": ("poly_loss", [{"epsilon": e} for e in (1.0, -1.0, 2.0, 5.0)]),
    "Poly-1, class weights": ("poly_loss", [{"epsilon": 1.0, "power": p} for p in POWERS]),
    "LDR-KL": ("ldr_kl", [{**NORMAL, "lambda_": s["lambda"], "margin": s["margin"]} for s in LDR]),
    "LDR-KL, class weights": ("ldr_kl", [{**NORMAL, "lambda_": 1.0, "margin": 0.1, "power": p} for p in POWERS]),
    "ALDR-KL": ("aldr_kl", [{**ALDR, "lambda_0": s["lambda"], "margin": s["margin"]} for s in LDR]),
}


def long_tail(y, ratio, seed, classes=10):
    """Returns the samples kept, and how many each class keeps."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.randperm(classes, generator=generator)
    available = y.bincount(minlength=classes).cpu()
    counts = (available * ratio ** (-rank / (classes - 1))).round().long().clamp_min(1)
    order = torch.randperm(len(y), generator=generator).to(y.device)
    kept = [order[y[order] == c][: int(counts[c])] for c in range(classes)]
    return torch.cat(kept), counts


def recalls(module, x, y):
    """Share of each class that is recognised."""
    right = predict(module, x).argmax(1) == y
    return torch.stack([right[y == c].float().mean() for c in range(10)]).cpu()


def work(run, root, device):
    """Macro accuracy on test and validation images, and of the three rarest classes."""
    data = fashion_mnist(root, run["limit"], device)
    x, y = data["train"]
    index, counts = long_tail(y, run["ratio"], run["seed"])
    parameters = dict(run["parameters"])
    if power := parameters.pop("power", None):
        weight = counts.float() ** -power
        parameters["weight"] = (weight / weight.mean()).tolist()
    swapped = {**run, "parameters": parameters}
    watched = tuple(t[:WATCHED] for t in data["test"])
    module, curve = train_classifier(swapped, (x[index], y[index]), watched, device)
    test, val = recalls(module, *data["test"]), recalls(module, *data["val"])
    return {
        "macro": float(test.mean()),
        "rarest": float(test[counts.argsort()[:3]].mean()),
        "val": float(val.mean()),
        "curve": [epoch["accuracy"] for epoch in curve],
    }


def main(argv=None):
    def extra(parser):
        parser.add_argument("--ratio", type=float, default=100.0)
        parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))

    arguments = parse(__doc__, argv, 30, extra)

    rate = {"lr": 1e-3}

    def describe(name, setting, seed):
        parameters = {k: v for k, v in setting.items() if k != "lr"}
        own = {"loss": METHODS[name][0], "parameters": parameters, "lr": setting.get("lr", rate["lr"])}
        return {**own, "ratio": arguments.ratio, "seed": seed, **settings(arguments)}

    chosen = tune(work, {"CE": METHODS["CE"][1]}, describe, arguments, "val")
    rate.update(chosen["CE"])
    others = [name for name in arguments.methods if name != "CE"]
    grids = {"CE": METHODS["CE"][1], **{name: METHODS[name][1] for name in others}}
    chosen |= tune(work, {name: grids[name] for name in others}, describe, arguments, "val")
    runs = [describe(name, chosen[name], seed) for seed in arguments.seeds for name in grids]
    results = run_all(work, runs, arguments)
    of = {name: [results[key(describe(name, chosen[name], s))] for s in arguments.seeds] for name in grids}
    rows = []
    for name, own in of.items():
        base = of["CE"]
        gain = statistics.median(100 * (r["macro"] - b["macro"]) for r, b in zip(own, base, strict=True))
        shown = [f"{k}={v}" for k, v in chosen[name].items() if k not in ALDR]
        cells = [spread([r["macro"] for r in own], 100), f"{gain:+.2f}", spread([r["rarest"] for r in own], 100)]
        rows.append([name, *cells, ", ".join(shown)])
    header = ["method", "macro accuracy in %: median [min, max]", "median of gain over CE", "rarest three", "setting"]
    show(f"Long tail, ratio {arguments.ratio:g}, 4 trials per method, last epoch", header, rows, arguments)


if __name__ == "__main__":
    main()
