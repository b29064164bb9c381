"""What a masked step costs on one and the same model: the technique is attached for a step and taken off for the next.

Fits beside each other (``bench_step.py``) have memory of their own, whose luck differs by several per cent on a small
machine, as their second plain fit shows. Here weights, gradients, moments and data are the same ones for both, so that
a ratio says what the technique does: forward and backward pass with masked weights, pull, optimizer, clock, a new mask.
Each masked step has a plain one right beside it, before or after as the draw goes; ``plain again`` is a plain step in
its place.

Run: OMP_NUM_THREADS=2 python tests/benchmarks/bench_masked_step.py --models smollm2-6 --batch 8 --rounds 30
"""

import argparse
import random
import statistics
import time

import torch
from bench_step import build, interval, loader_for, quiet

from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import NMSettings, NMTechnique

PHASES = {"dense_fraction": 0.0, "finetune_fraction": 0.0}
RECIPES = {
    "2:4 nm_srste": (2, 4, "nm_srste", {}),
    "2:4 mdgf_linear": (2, 4, "mdgf_linear", PHASES),
    "2:4 mdgf_exponential": (2, 4, "mdgf_exponential", PHASES),
    "1:16 mdgf_exponential": (1, 16, "mdgf_exponential", PHASES),
    "1:16 sdgf_stepwise": (1, 16, "sdgf_stepwise", PHASES),
    "2:4 sdgf_stepwise": (2, 4, "sdgf_stepwise", PHASES),
    "2:4 sdgf_geometric": (2, 4, "sdgf_geometric", PHASES),
}


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "smollm2-6"])
    parser.add_argument("--batch", type=int, default=8, help="images, or sequences of 128 tokens")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    arguments = parser.parse_args()
    quiet()
    for model in arguments.models:
        module = build(model)
        batch = next(iter(loader_for(arguments.batch, module)))
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
        module.log = module.log_dict = lambda *_, **__: None  # there is no Trainer

        def step(name, module=module, batch=batch, optimizer=optimizer):
            technique = None
            if name in RECIPES:
                n, m, recipe, options = RECIPES[name]
                technique = NMTechnique(NMSettings(n, m, recipe, indivisible="skip", total_steps=100, **options))
                technique.attach(module)
                technique.advance(Progress(10))
            wall, cpu = time.perf_counter(), time.process_time()
            module.training_step(batch, 0).backward()
            if technique is not None:
                technique.before_step(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            if technique is not None:
                technique.after_step(optimizer)
                technique.advance(Progress(11))
            seconds = time.perf_counter() - wall, time.process_time() - cpu
            if technique is not None:
                technique.detach(module)
            return seconds

        names = ["plain again", *arguments.recipes]
        for name in ("plain", *names):
            step(name)
        found = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in random.sample(names, len(names)):
                pair = {beside: step(beside) for beside in random.sample(("plain", name), 2)}
                found[name].append((pair["plain"], pair[name]))
        for name, pairs in found.items():
            wall, cpu = ([masked[k] / plain[k] for plain, masked in pairs] for k in (0, 1))
            low, high = interval(wall)
            print(
                f"{model:22} {name:24} {statistics.median(masked[0] for _, masked in pairs):7.3f} s  wall "
                f"x{statistics.median(wall):.3f} [{low:.3f}, {high:.3f}]  cpu x{statistics.median(cpu):.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
