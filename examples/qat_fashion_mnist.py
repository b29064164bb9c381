"""A small convolutional network on Fashion-MNIST: float, then W8A8, W4A4, W3A3, W2A8 and ternary weights from it.

    python examples/qat_fashion_mnist.py             # 12,000 images, 8 float epochs, 3 of QAT: about 10 min on one core
    python examples/qat_fashion_mnist.py --short     # 512 images: about a minute

Every run starts from the same float network and trains for as long; ``float`` goes on without quantisers. Test
accuracy is over all 10,000 images, of the fake-quantised network and of its integers (int8 products, packed file).
"""

import argparse
import copy
import json
import warnings
from pathlib import Path
from time import perf_counter

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lossplug.callbacks import QAT, GradientAdaptiveQAT
from lightning_lossplug.integrations import FashionMNISTData
from lightning_lossplug.integrations.packed import save_packed
from lightning_lossplug.quantization import integer_model

RUNS = {
    "float": lambda: None,
    "W8A8": lambda: QAT(8, 8),
    "W4A4": lambda: QAT(4, 4),
    "W4A4 gradient-adaptive": lambda: GradientAdaptiveQAT(4, 4),
    "W3A3": lambda: QAT(3, 3),
    "W2A8": lambda: QAT(2, 8),
    "W1.58A8": lambda: QAT(1.58, 8),
}
SHORT = ("float", "W8A8", "W4A4 gradient-adaptive")


class Network(pl.LightningModule):
    """What a user has: nothing in it knows of quantisation."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 32, 2), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))

    def training_step(self, batch: tuple, batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch: tuple, batch_idx: int) -> None:
        """Logs the accuracy."""
        logits = self.net(batch[0])
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self) -> dict:
        """AdamW on one cycle."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer(epochs: int, arguments: argparse.Namespace, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A Trainer on one CPU, without files."""
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        limit_test_batches=4 if arguments.short else 1.0,
    )


def finetune(run: str, start: Network, data: pl.LightningDataModule, arguments: argparse.Namespace) -> dict:
    """One run from the float network; its accuracy in fake quantisation and in integers."""
    pl.seed_everything(arguments.seed, verbose=False)
    module, callback = copy.deepcopy(start), RUNS[run]()
    module.lr = arguments.qat_lr
    fit = trainer(1 if arguments.short else arguments.qat_epochs, arguments, [callback] if callback else [])
    begin = perf_counter()
    fit.fit(module, data)
    found = {"run": run, "seconds": perf_counter() - begin}
    found["accuracy"] = fit.test(module, data, verbose=False)[0]["accuracy"]
    if callback is not None:
        report = save_packed(module, arguments.output / f"{run.replace(' ', '_')}.safetensors")
        integers, left = integer_model(module)
        plain = trainer(1, arguments, [])  # without the callback, which would look for float layers
        found |= {"integer_accuracy": plain.test(integers, data, verbose=False)[0]["accuracy"], "left": left}
        found |= {"bytes": report["bytes"], "float_bytes": report["float_bytes"]}
        found |= {key: float(value) for key, value in callback.technique.logs().items()}
    return found


def main() -> None:
    """Trains the float network, then every run from it, and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="little data, few steps: what CI runs")
    parser.add_argument("--root", default=None, help="folder with the IDX files; default: Debian's package")
    parser.add_argument("--train-limit", type=int, default=12000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--qat-epochs", type=int, default=3)
    parser.add_argument("--qat-lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=None)
    parser.add_argument("--output", type=Path, default=Path("outputs/qat_fashion_mnist"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning|torch")
    arguments.output.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(arguments.seed, verbose=False)
    data = FashionMNISTData(
        root=arguments.root, batch_size=128, train_limit=512 if arguments.short else arguments.train_limit
    )
    start = Network()
    trainer(1 if arguments.short else arguments.epochs, arguments, []).fit(start, data)
    results = []
    print("run                     accuracy  in integers  weight bytes  seconds", flush=True)
    for run in arguments.runs or (SHORT if arguments.short else RUNS):
        r = finetune(run, start, data, arguments)
        results.append(r)
        whole = f"{r['integer_accuracy']:11.4f}  {r['bytes']:12d}" if "bytes" in r else " " * 25
        print(f"{run:22}  {r['accuracy']:8.4f}  {whole}  {r['seconds']:7.1f}", flush=True)
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
