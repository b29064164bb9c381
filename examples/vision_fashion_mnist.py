"""A timm model on Fashion-MNIST: dense, 2:4 and 1:16, by adding callbacks to one Trainer.

    python examples/vision_fashion_mnist.py             # all 60,000 images, 10 epochs per run: about 1 h on two cores
    python examples/vision_fashion_mnist.py --short     # 512 images, 2 epochs: about a minute

Debian's package ``dataset-fashion-mnist`` brings the images; ``--root`` takes any folder with the four IDX files.
Each run is evaluated on the test images with torchmetrics and leaves as a folder that plain timm loads.
"""

import argparse
import json
import warnings
from pathlib import Path
from time import perf_counter

import lightning.pytorch as pl
import torch

from lightning_lossplug.callbacks import ExactResume, NMSparsity, SwapLoss
from lightning_lossplug.integrations import FashionMNISTData, ImageClassifier
from lightning_lossplug.integrations.artifact import export_artifact

RUNS = {
    "dense": [],
    "dense + poly_loss": [("loss", {})],
    "2:4 nm_srste": [("sparsity", {"n": 2, "m": 4, "recipe": "nm_srste"})],
    "2:4 mdgf_exponential": [("sparsity", {"n": 2, "m": 4, "recipe": "mdgf_exponential"})],
    "1:16 nm_srste": [("sparsity", {"n": 1, "m": 16, "recipe": "nm_srste"})],
    "1:16 mdgf_exponential": [("sparsity", {"n": 1, "m": 16, "recipe": "mdgf_exponential"})],
    "1:16 mdgf_exponential + poly_loss": [
        ("loss", {}),
        ("sparsity", {"n": 1, "m": 16, "recipe": "mdgf_exponential"}),
    ],
}
SHORT = ("dense", "2:4 nm_srste", "1:16 mdgf_exponential + poly_loss")
VIT = {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}  # 28 x 28 pixels are 49 patches


def callbacks(run: str) -> list[pl.Callback]:
    """The callbacks of one run: all that differs between the runs."""
    make = {"loss": lambda **options: SwapLoss("poly_loss", options), "sparsity": NMSparsity}
    return [make[kind](**options) for kind, options in RUNS[run]]


def train(run: str, arguments: argparse.Namespace) -> dict[str, float | str]:
    """One run from the same seed, its test metrics and its artifact."""
    pl.seed_everything(arguments.seed, verbose=False)
    vit = arguments.model.startswith("vit_")
    module = ImageClassifier(
        arguments.model,
        num_classes=10,
        in_chans=1,
        img_size=28 if vit else None,
        model_kwargs=VIT if vit else None,
        lr=1e-3,
    )
    data = FashionMNISTData(
        root=arguments.root, batch_size=128, train_limit=512 if arguments.short else None, augment=not arguments.short
    )
    own = callbacks(run)
    trainer = pl.Trainer(
        max_epochs=2 if arguments.short else arguments.epochs,
        accelerator="cpu",
        devices=1,
        callbacks=[*own, ExactResume()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=2 if arguments.short else 1.0,
        limit_test_batches=4 if arguments.short else 1.0,
    )
    start = perf_counter()
    trainer.fit(module, data)
    seconds = perf_counter() - start
    metrics = trainer.test(module, data, verbose=False)[0]
    folder = arguments.output / run.replace(":", "to").replace(" ", "_")
    techniques = [c.technique for c in own if isinstance(c, NMSparsity)]
    export_artifact(module, folder, techniques=techniques, overwrite=True)
    sparsity = float(techniques[0].logs()["sparsity"]) if techniques else 0.0
    return {
        "run": run,
        "test_accuracy": metrics["test_accuracy"],
        "test_calibration_error": metrics["test_calibration_error"],
        "sparsity_of_sparse_layers": sparsity,
        "seconds": seconds,
        "artifact": str(folder),
    }


def main() -> None:
    """Trains every run and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="little data, few steps: what CI runs")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="any timm model")
    parser.add_argument("--root", default=None, help="folder with the IDX files; default: Debian's package")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=None)
    parser.add_argument("--output", type=Path, default=Path("outputs/vision_fashion_mnist"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning|torch")
    torch.set_float32_matmul_precision("high")
    results = [train(run, arguments) for run in arguments.runs or (SHORT if arguments.short else RUNS)]
    width = max(len(str(result["run"])) for result in results)
    print(f"\n{'run':{width}}  accuracy  calibration error  sparsity  seconds")
    for r in results:
        print(
            f"{r['run']:{width}}  {r['test_accuracy']:8.4f}  {r['test_calibration_error']:17.4f}  "
            f"{r['sparsity_of_sparse_layers']:8.3f}  {r['seconds']:7.1f}"
        )
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nresults.json and one folder per run in {arguments.output}; timm loads each with")
    print(f'timm.create_model("local-dir:{results[-1]["artifact"]}", pretrained=True)')


if __name__ == "__main__":
    main()
