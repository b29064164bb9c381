"""Calibration error (torchmetrics, 15 bins) of losses and of post-hoc calibrators, with the accuracy beside it.

Fashion-MNIST: the same network, steps and seeds for every training loss, parameters as published, last epoch. Every
network is also given with one temperature fitted on 10,000 validation images. The network trained with cross-entropy
is then calibrated by a temperature per sample on the same images: once with cross-entropy as it stands in the
calibrator's step, twice with ``correctness_aware`` swapped in. That keeps its accuracy.

    python tests/replication/calibration.py --root DATA --output calibration.json --jobs 8
"""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from common import Batches, fashion_mnist, fit, predict, train_classifier
from runner import key, parse, run_all, settings, show
from scoring import HEADER, score_rows, scores, temperature

from lightning_lossplug.callbacks import SwapLoss
from lightning_lossplug.losses import SampleTemperature

LOSSES = {
    "CE": (None, {}),  # the step as it is, no swap
    "label smoothing 0.05": ("cross_entropy", {"label_smoothing": 0.05}),
    "label smoothing 0.1": ("cross_entropy", {"label_smoothing": 0.1}),
    "focal, gamma 2": ("focal", {"gamma": 2.0}),
    "focal, gamma 3": ("focal", {"gamma": 3.0}),
    "Poly-1, epsilon 1": ("poly_loss", {"epsilon": 1.0}),
    "Poly-1, epsilon -1": ("poly_loss", {"epsilon": -1.0}),
}
CALIBRATORS = {
    "CE": [],
    "correctness_aware": [("correctness_aware", {})],
    "correctness_aware, unbalanced": [("correctness_aware", {"balance": False})],
}


class Calibrator(pl.LightningModule):
    """Post-hoc training of a temperature per sample, with F.cross_entropy in the step."""

    def __init__(self, views):
        super().__init__()
        self.calibrator = SampleTemperature(views=views)

    def training_step(self, batch, batch_idx):
        z, y, _ = batch
        return F.cross_entropy(self.calibrator(*z.unbind(1)), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@torch.no_grad()
def views(module, x):
    """Logits of the images, of mirrored and of slightly turned copies, ``[N, 3, C]``."""
    turn = torch.tensor([[[0.97, -0.26, 0.0], [0.26, 0.97, 0.0]]], device=x.device)
    grid = F.affine_grid(turn, [1, *x.shape[1:]], align_corners=False)
    turned = [F.grid_sample(p, grid.expand(len(p), -1, -1, -1), "bilinear", "border", False) for p in x.split(2500)]
    return torch.stack([predict(module, v) for v in (x, x.flip(-1), torch.cat(turned))], dim=1)


def work(run, root, device):
    """One training loss; for plain cross-entropy also the calibrators."""
    data = fashion_mnist(root, run["limit"], device)
    module, _ = train_classifier(run, data["train"], data["test"], device)
    (x_val, y_val), (x, y) = data["val"], data["test"]
    z, z_val = predict(module, x), predict(module, x_val)
    result = {"as trained": scores(z, y), "temperature": scores(z / temperature(z_val, y_val), y)}
    if run["loss"] is None:
        many_val, many = views(module, x_val), views(module, x)
        for name, swap in CALIBRATORS.items():
            torch.manual_seed(run["seed"])
            own = Calibrator(many.shape[1])
            batches = Batches(many_val, y_val, 1000, run["seed"])
            fit(own, batches, run["calibrator_epochs"], [SwapLoss(*s) for s in swap], device=device)
            with torch.no_grad():
                result[f"calibrator: {name}"] = scores(own.calibrator(*many.unbind(1)), y)
    return result


def main(argv=None):
    def extra(parser):
        parser.add_argument("--calibrator-epochs", type=int, default=100)
        parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))

    arguments = parse(__doc__, argv, 30, extra)

    def describe(name, seed):
        loss, parameters = LOSSES[name]
        more = {"calibrator_epochs": arguments.calibrator_epochs} if loss is None else {}
        return {"loss": loss, "parameters": parameters, "lr": 1e-3, "seed": seed, **settings(arguments), **more}

    results = run_all(work, [describe(name, seed) for seed in arguments.seeds for name in arguments.losses], arguments)
    rows = [
        row
        for name in arguments.losses
        for row in score_rows([results[key(describe(name, seed))] for seed in arguments.seeds], f"{name}: ")
    ]
    show("Ten classes, last epoch, test images", HEADER, rows, arguments)


if __name__ == "__main__":
    main()
