"""What the callbacks cost per training step, as ratios against the plain step, measured side by side in one process.

Every round runs each variant for a few steps of an ordinary ``Trainer.fit`` on random images, one variant after the
other; a ratio is taken within its round, and the median over rounds is reported with the spread. Peak memory is the
growth of the process's high-water mark in a process per variant.

Run: python tests/benchmarks/bench_step.py --models vit_tiny_patch16_224 resnet18 --rounds 7 --steps 4
"""

import argparse
import json
import logging
import multiprocessing
import resource
import statistics
import time
import warnings

import lightning.pytorch as pl
import torch

from lightning_lossplug.callbacks import NMSparsity, SwapLoss
from lightning_lossplug.integrations import ImageClassifier

VARIANTS = {
    "plain": list,
    "idle (dense phase, cross_entropy for cross_entropy)": lambda: [
        SwapLoss("cross_entropy"),
        NMSparsity(2, 4, "mdgf_linear", dense_fraction=0.9, finetune_fraction=0.0, decay_end=1.0),
    ],
    "2:4 nm_srste, mask every step": lambda: [NMSparsity(2, 4, "nm_srste")],
    "2:4 nm_srste, mask every 10 steps": lambda: [NMSparsity(2, 4, "nm_srste", mask_update_every=10)],
    "1:16 mdgf_exponential, mask every step": lambda: [
        NMSparsity(1, 16, "mdgf_exponential", dense_fraction=0.0, indivisible="skip")
    ],
}


class Clock(pl.Callback):
    """Seconds of every step, first ones of a fit left out."""

    def __init__(self, skip: int) -> None:
        self.skip, self.wall, self.cpu, self.count = skip, [], [], 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.count >= self.skip:
            self.started = time.perf_counter(), time.process_time()
        self.count += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.count > self.skip:
            self.wall.append(time.perf_counter() - self.started[0])
            self.cpu.append(time.process_time() - self.started[1])


def fit(module, callbacks, loader, steps, skip=1):
    """Runs ``steps`` steps and returns the median seconds of one, wall and processor time."""
    clock = Clock(skip)
    # The clock stands first at the start of a step and last at its end: every callback's work is inside.
    start, end = clock.on_train_batch_start, clock.on_train_batch_end
    first, last = pl.Callback(), pl.Callback()
    first.on_train_batch_start, last.on_train_batch_end = start, end
    trainer = pl.Trainer(
        max_steps=steps + skip,
        accelerator="cpu",
        devices=1,
        callbacks=[first, *callbacks, last],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return statistics.median(clock.wall), statistics.median(clock.cpu)


def loader_for(batch):
    """Random images, always the same batch."""
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
    return torch.utils.data.DataLoader([(images, labels)] * 64, batch_size=None)


def peak_memory(model, variant, batch, queue):
    """Growth of the high-water mark over a few steps, in MiB, in a process of its own."""
    quiet()
    torch.set_num_threads(2)
    module, loader = ImageClassifier(model), loader_for(batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fit(module, VARIANTS[variant](), loader, 2)
    queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def quiet():
    """No tips, no warnings."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "resnet18"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", default=None)
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(arguments.threads)
    results = []
    for model in arguments.models:
        torch.manual_seed(0)
        loader = loader_for(arguments.batch)
        modules = {name: ImageClassifier(model) for name in VARIANTS}
        callbacks = {name: make() for name, make in VARIANTS.items()}
        rounds = {name: [] for name in VARIANTS}
        for _ in range(arguments.rounds):
            for name in VARIANTS:
                rounds[name].append(fit(modules[name], callbacks[name], loader, arguments.steps))
        for name in VARIANTS:
            ratios = [[a[k] / b[k] for a, b in zip(rounds[name], rounds["plain"], strict=True)] for k in (0, 1)]
            row = {
                "model": model,
                "variant": name,
                "seconds": statistics.median(wall for wall, _ in rounds[name]),
                "wall_ratio": statistics.median(ratios[0]),
                "cpu_ratio": statistics.median(ratios[1]),
                "cpu_ratio_spread": [min(ratios[1]), max(ratios[1])],
            }
            if not arguments.no_memory:
                queue = multiprocessing.get_context("spawn").Queue()
                process = multiprocessing.get_context("spawn").Process(
                    target=peak_memory, args=(model, name, arguments.batch, queue)
                )
                process.start()
                row["peak_mib"] = queue.get()
                process.join()
            results.append(row)
            print(
                f"{model:22} {name:52} {row['seconds']:7.3f} s  wall x{row['wall_ratio']:.3f}  "
                f"cpu x{row['cpu_ratio']:.3f} [{min(ratios[1]):.3f}, {max(ratios[1]):.3f}]"
                + (f"  peak {row['peak_mib']:.0f} MiB" if "peak_mib" in row else ""),
                flush=True,
            )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
