"""Memory of a training step with masks, against the same step without: a model of wide linear layers.

Every variant runs in a process of its own: ``--layers`` linear layers of ``--width`` squared, AdamW, a few steps. The
peak is the high-water mark of the process beyond what it held before the model was built; ``kept`` is what the masks
hold between steps. Both are told per weight of the masked layers, ``over plain`` being the difference to the plain
step. A 32-bit weight is 4 bytes, one bit is 0.125; ``one layer`` says what a tensor of one layer's size counts for.
With many rows in a batch the peak lies at the end of the forward pass, with few of them in the optimizer's step.

Run: OMP_NUM_THREADS=2 python tests/benchmarks/bench_mask_memory.py
"""

import argparse
import logging
import multiprocessing
import os
import re
import warnings
from pathlib import Path

import torch
from torch import nn

from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import ASTAdamW, NMSettings, NMTechnique

VARIANTS = {
    "plain": None,
    "nm_oneshot": {},
    "nm_ste": {},
    "nm_srste": {},
    "mdgf_linear": {"dense_fraction": 0.0},
    "sdgf_geometric": {"dense_fraction": 0.0},
    "nm_sste": {},
    "nm_cast": {},
    "nm_ast": {},
}
STEPS = 2


def high_water():
    """Bytes the process has held at most."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


def work(variant, width, layers, rows, optimizer, queue):
    """A few steps; puts the peak and what the masks keep."""
    warnings.filterwarnings("ignore")
    logging.disable()
    torch.manual_seed(0)
    x = torch.randn(rows, width)
    nn.Linear(8, 8)(x[:, :8]).sum().backward()  # the libraries' own memory
    before = high_water()
    model = nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width, bias=False), nn.Tanh())))
    plain = sum(b.numel() * b.element_size() for b in model.buffers())
    technique = None
    if VARIANTS[variant] is not None:
        everything = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]  # the last one, too
        technique = NMTechnique(NMSettings(2, 4, variant, include=everything, **VARIANTS[variant]))
        technique.attach(model)
        technique.advance(Progress(0, 100))
    build = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    stepper = ASTAdamW(model.parameters()) if variant == "nm_ast" else build(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        stepper.zero_grad()
        model(x).square().mean().backward()
        if technique is not None:
            technique.before_step(stepper)
        stepper.step()
        if technique is not None:
            technique.after_step(stepper)
            technique.advance(Progress(step + 1, 100))
    kept = sum(b.numel() * b.element_size() for b in model.buffers()) - plain
    queue.put((high_water() - before, kept))


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 4096])
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed tensors go back to the system, and are no noise
    weights = arguments.layers * arguments.width**2
    print(f"{weights / 1e6:.1f} million masked weights; one layer {4 / arguments.layers:.3f} bytes per weight")
    context = multiprocessing.get_context("spawn")
    for rows in arguments.rows:
        base = None
        for variant in dict.fromkeys(["plain", *arguments.variants]):
            queue = context.Queue()
            settings = (variant, arguments.width, arguments.layers, rows, arguments.optimizer, queue)
            process = context.Process(target=work, args=settings)
            process.start()
            peak, kept = queue.get()
            process.join()
            base = peak if base is None else base
            print(
                f"rows {rows:6} {variant:15} peak {peak / 2**20:8.1f} MiB  over plain {(peak - base) / weights:+.3f} "
                f"bytes per weight  kept {kept / weights:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
