"""Two classes that look alike, T-shirt and shirt: ``cape``, a binary method, against cross-entropy.

Cross-entropy with early stopping on the validation loss; and from there on, for equally many epochs and with equal
stopping, cross-entropy or CaPE. Calibration error by torchmetrics, 15 bins, probability of the second class.

    python tests/replication/probability.py --root DATA --output probability.json --jobs 3
"""

import lightning.pytorch as pl
import torch
from common import Batches, Classifier, KeepBest, fashion_mnist, fit, predict
from runner import key, parse, run_all, settings, show
from scoring import HEADER, score_rows, scores, temperature

from lightning_lossplug.callbacks import SwapLoss

PAIR = (0, 6)


class EmpiricalTargets(pl.Callback):
    """CaPE's schedule: targets from predictions of the whole training set before each epoch on probabilities."""

    def __init__(self, loss, x, y):
        self.loss, self.x, self.y = loss, x, y

    def on_train_epoch_start(self, trainer, pl_module):
        if self.loss.probability_epoch:
            self.loss.update(predict(pl_module, self.x).softmax(1)[:, 1], self.y)
            pl_module.train()

    def on_train_epoch_end(self, trainer, pl_module):
        self.loss.advance_epoch()


def work(run, root, device):
    """All rows of the binary comparison, from one seed."""
    parts = fashion_mnist(root, run["limit"], device)
    data = {}
    for name, (x, y) in parts.items():
        keep = (y == PAIR[0]) | (y == PAIR[1])
        data[name] = x[keep], (y[keep] == PAIR[1]).long()
    (x, y), (x_val, y_val), (x_test, y_test) = data["train"], data["val"], data["test"]
    result = {}

    def train(start, epochs, lr, callbacks):
        torch.manual_seed(run["seed"])
        module, best = Classifier(2, lr=lr, width=run["width"]), KeepBest()
        if start:
            module.load_state_dict(start)
        validate = Batches(x_val, y_val, 2500)
        fit(module, Batches(x, y, run["batch"], run["seed"]), epochs, [*callbacks, best], validate, device)
        return module, best.state

    module, state = train(None, run["epochs"], 1e-3, [])
    result["CE, last epoch"] = scores(predict(module, x_test), y_test)
    module.load_state_dict(state)
    z, z_val = predict(module, x_test), predict(module, x_val)
    result["CE, early stopped"] = scores(z, y_test)
    result["CE, early stopped, temperature"] = scores(z / temperature(z_val, y_val), y_test)
    cape = {
        f"CaPE, {mode}, k={k}": SwapLoss("cape", {"mode": mode, "k": k, "dataset_size": len(y)}, sample_index=2)
        for mode in ("bin", "kde")
        for k in (5, 2)  # the range that the method's card gives, its default first
    }
    for name, swap in {"CE continued": None, **cape}.items():
        callbacks = [swap, EmpiricalTargets(swap.loss, x, y)] if swap else []
        module, best = train(state, run["cape_epochs"], 1e-4, callbacks)
        result[f"{name}, last epoch"] = scores(predict(module, x_test), y_test)
        module.load_state_dict(best)
        result[f"{name}, early stopped"] = scores(predict(module, x_test), y_test)
    return result


def main(argv=None):
    def extra(parser):
        parser.add_argument(
            "--cape-epochs", type=int, default=12, help="two rounds of CaPE's schedule with k=5, four with k=2"
        )

    arguments = parse(__doc__, argv, 20, extra)
    runs = [{"seed": s, "cape_epochs": arguments.cape_epochs, **settings(arguments)} for s in arguments.seeds]
    results = run_all(work, runs, arguments)
    show("T-shirt or shirt, test images", HEADER, score_rows([results[key(run)] for run in runs]), arguments)


if __name__ == "__main__":
    main()
