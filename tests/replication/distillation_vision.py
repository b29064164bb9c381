"""A small student beside a teacher four times as wide: accuracy and calibration error of both, by method.

Fashion-MNIST with few images; every student gets the same updates of the same SGD from the same seed, every frozen
teacher is the same network trained alone, and the teachers that learn with the student start as it started. Weights
and temperatures are those that the methods' papers or code use on CIFAR-100 (``lossplug show NAME``), none is tuned.

    python tests/replication/distillation_vision.py --output distillation_vision.json --width 4 --limit 4000
"""

import functools

import torch
from common import Batches, Classifier, fashion_mnist, fit, predict
from runner import key, parse, run_all, settings, show, spread
from scoring import scores

from lightning_lossplug.callbacks import Distillation, OnlineDistillation
from lightning_lossplug.integrations.schedule import cosine_per_step
from lightning_lossplug.schedules import Linear

FROZEN = {
    "KD": {"loss": "kd", "weight": 0.9, "ce_weight": 0.1},
    "DOT (KD, delta 0.075)": {"loss": "kd", "weight": 0.9, "ce_weight": 0.1, "dot_delta": 0.075},
    "DKD": {"loss": "dkd", "weight": Linear(0.0, 1.0, finish=0.1)},
    "WTTM": {"loss": "wttm", "weight": 4.0},
    "DHKD": {"loss": "dhkd"},
    "DHKD, nonlinear, aligned": {"loss": "dhkd", "parameters": {"head": "nonlinear"}, "align": "all"},
}
ONLINE = {
    "DML": ("dml", {}),
    "BD-KD": ("bdkd", {}),
    "BD-KD, delta 1": ("bdkd", {"delta": 1.0}),
}
METHODS = ["alone", *FROZEN, *ONLINE]


class Momentum(Classifier):
    """The classifier of the other scripts with SGD, which DOT needs."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        return cosine_per_step(optimizer, self.trainer, warmup_fraction=0.05)


def network(run, times=1):
    return Momentum(lr=run["lr"], weight_decay=5e-4, width=times * run["width"])


@functools.cache
def trained_teacher(seed, width, lr, epochs, batch, limit, times, root, device):
    """The teacher of a seed, trained alone."""
    run = {"width": width, "lr": lr}
    data = fashion_mnist(root, limit, device)
    torch.manual_seed(seed + 1000)
    module = network(run, times)
    fit(module, Batches(*data["train"], batch, seed), epochs, device=device)
    return module.net.eval()


def work(run, root, device):
    """Scores of the student and of its teacher on the test images, and how often they agree."""
    data = fashion_mnist(root, run["limit"], device)
    x, y = data["test"]
    teacher, callbacks = None, []
    if run["method"] in ONLINE:
        torch.manual_seed(run["seed"] + 1000)
        teacher = network(run, run["times"]).net
        callbacks = [OnlineDistillation(teacher, *ONLINE[run["method"]])]
    else:
        names = ("seed", "width", "lr", "epochs", "batch", "limit", "times")
        teacher = trained_teacher(*(run[name] for name in names), root, device)
        if run["method"] in FROZEN:
            callbacks = [Distillation(teacher, **FROZEN[run["method"]])]
    torch.manual_seed(run["seed"])
    module = network(run)
    fit(module, Batches(*data["train"], run["batch"], run["seed"]), run["epochs"], callbacks, device=device)
    z, z_t = predict(module, x), predict(teacher.to(device), x)
    result = {f"student {k}": v for k, v in scores(z, y).items()}
    result |= {f"teacher {k}": v for k, v in scores(z_t, y).items()}
    return result | {"agreement": float((z.argmax(1) == z_t.argmax(1)).float().mean())}


def main(argv=None):
    def extra(parser):
        parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
        parser.add_argument("--times", type=int, default=4, help="width of the teacher over the student's")
        parser.add_argument("--lr", type=float, default=0.05)

    arguments = parse(__doc__, argv, 20, extra, batch=128)

    def describe(name, seed):
        more = {"times": arguments.times, "lr": arguments.lr}
        return {"method": name, "seed": seed, **settings(arguments), **more}

    results = run_all(work, [describe(n, s) for s in arguments.seeds for n in arguments.methods], arguments)
    columns = [
        ("student accuracy", 100),
        ("student ece", 100),
        ("teacher accuracy", 100),
        ("teacher ece", 100),
        ("agreement", 100),
    ]
    rows = []
    for name in arguments.methods:
        own = [results[key(describe(name, seed))] for seed in arguments.seeds]
        rows.append([name, *(spread([r[c] for r in own], s) for c, s in columns)])
    header = [
        "method",
        *(f"{c} in %: median [min, max]" if i == 0 else f"{c} in %" for i, (c, _) in enumerate(columns)),
    ]
    show("Test images, last epoch", header, rows, arguments)


if __name__ == "__main__":
    main()
