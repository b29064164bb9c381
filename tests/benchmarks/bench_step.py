"""What the callbacks cost per training step, as ratios against the plain step, measured side by side in one process.

Every variant is an ordinary ``Trainer.fit`` on random images or tokens; the fits take turns after every step (as
greenlets, in one thread: threads of their own would each bring a pool of workers and slow each other down), so that a
round has one step of each variant. Ratios are taken within a round; their median is reported with its 95 % interval
(bootstrap).
``plain again`` is the same as ``plain``: what it shows is the noise of the comparison. ``own`` is the part of a step
spent in the techniques' own code outside forward and backward (clock, masks, penalties), timed directly. Peak memory
is the high-water mark of a process per variant. ``smollm2-N`` is SmolLM2-135M with N of its 30 layers and that share of
its vocabulary, so that the parts of a step keep their proportions, on ``--batch`` sequences of 128 tokens.

Run: OMP_NUM_THREADS=2 python tests/benchmarks/bench_step.py --models vit_tiny_patch16_224 resnet18 --rounds 30
     OMP_NUM_THREADS=2 python tests/benchmarks/bench_step.py --models smollm2-6 --batch 8 --rounds 12
"""

import argparse
import json
import logging
import multiprocessing
import random
import re
import statistics
import time
import warnings
from pathlib import Path

import greenlet
import lightning.pytorch as pl
import torch

from lightning_lossplug.callbacks import QAT, GradientAdaptiveQAT, NMSparsity, SwapLoss
from lightning_lossplug.integrations import CausalLM, ImageClassifier
from lightning_lossplug.surgery.attention import find_attention

VARIANTS = {
    "plain": list,
    "plain again": list,
    "idle (dense phase, cross_entropy for cross_entropy)": lambda: [
        SwapLoss("cross_entropy"),
        NMSparsity(2, 4, "mdgf_linear", dense_fraction=0.9, finetune_fraction=0.0, decay_end=1.0),
    ],
    "2:4 nm_srste, mask every step": lambda: [NMSparsity(2, 4, "nm_srste")],
    "QAT W8A8": lambda: [QAT(8, 8)],
    "QAT W8A8, attention in 8 bits": lambda: [QAT(8, 8, attention_bits=8)],
    "GradientAdaptiveQAT W4A4": lambda: [GradientAdaptiveQAT(4, 4)],
    "2:4 nm_srste, mask every 10 steps": lambda: [NMSparsity(2, 4, "nm_srste", mask_update_every=10)],
    "2:4 mdgf_linear, mask every step": lambda: [NMSparsity(2, 4, "mdgf_linear", dense_fraction=0.0)],
    "1:16 mdgf_exponential, mask every step": lambda: [
        NMSparsity(1, 16, "mdgf_exponential", dense_fraction=0.0, indivisible="skip")
    ],
    "1:16 sdgf_stepwise, mask every step": lambda: [
        NMSparsity(1, 16, "sdgf_stepwise", dense_fraction=0.0, indivisible="skip")
    ],
    "2:4 sdgf_geometric, mask every step": lambda: [NMSparsity(2, 4, "sdgf_geometric", dense_fraction=0.0)],
}
WARM_UP = 2


class Converted(pl.Callback):
    """Another library's QAT: its own conversion of the network, in setup."""

    def __init__(self, convert):
        self.convert = convert

    def setup(self, trainer, pl_module, stage):
        pl_module.model = self.convert(pl_module.model)


def torchao_qat(network):
    """Fake quantisers of torchao (8 bits, weights per channel, inputs per token) in every linear layer."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel")
    quantize_(network, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))
    return network


def brevitas_qat(network):
    """Brevitas' quantised linear layers and convolutions, 8 bits, with its default quantisers of weights and inputs."""
    from brevitas import nn as quantised
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    for name, layer in list(network.named_modules()):
        parent, _, child = name.rpartition(".")
        options = {"weight_quant": Int8WeightPerChannelFloat, "input_quant": Int8ActPerTensorFloat}
        if type(layer) is torch.nn.Linear:
            made = quantised.QuantLinear(layer.in_features, layer.out_features, layer.bias is not None, **options)
        elif type(layer) is torch.nn.Conv2d:
            names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
            shape = {key: getattr(layer, key) for key in names}
            made = quantised.QuantConv2d(**shape, bias=layer.bias is not None, **options)
        else:
            continue
        made.load_state_dict(layer.state_dict(), strict=False)
        setattr(network.get_submodule(parent), child, made)
    return network


# Where they import, which is not in the environment of the tests (Brevitas wants two old packages):
#   pip install --no-deps --target /tmp/others torchao brevitas dependencies==2.0.1 unfoldNd "setuptools<81"
#   OMP_NUM_THREADS=2 PYTHONPATH=/tmp/others python tests/benchmarks/bench_step.py --others --variants QAT
OTHERS = {
    "torchao QAT W8A8 (linear layers only)": lambda: [Converted(torchao_qat)],
    "Brevitas QAT W8A8": lambda: [Converted(brevitas_qat)],
}


class Start(pl.Callback):
    """First in the list: starts the clock."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.started = time.perf_counter(), time.process_time()


class End(pl.Callback):
    """Last in the list: stops the clock, and lets the next variant go on."""

    def __init__(self, start):
        self.start, self.seconds, self.own = start, [], [0.0]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        wall, cpu = self.start.started
        self.seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
        self.own.append(0.0)
        parent = greenlet.getcurrent().parent
        if parent is not None:
            parent.switch()


def timed(function, seconds):
    """The function, which adds the seconds it takes to the last entry of a list."""

    def call(*arguments, **options):
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[-1] += time.perf_counter() - start

    return call


def fit(module, callbacks, batch, steps):
    """Runs ``steps`` steps; returns the seconds of each and those spent in the techniques' own code."""
    start = Start()
    end = End(start)
    for technique in (c.technique for c in callbacks if hasattr(c, "technique")):
        for method in ("before_step", "after_step", "advance"):
            setattr(technique, method, timed(getattr(technique, method), end.own))
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        callbacks=[start, *callbacks, end],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader_for(batch, module))
    return end.seconds, end.own[:-1]


def loader_for(batch, module=None):
    """Random images or tokens, always the same batch."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, CausalLM):
        ids = torch.randint(0, module.model.config.vocab_size, (batch, 128), generator=generator)
        return torch.utils.data.DataLoader([{"input_ids": ids, "labels": ids}] * 1000, batch_size=None)
    images = torch.randn(batch, 3, 224, 224, generator=generator)
    labels = torch.randint(0, 1000, (batch,), generator=generator)
    return torch.utils.data.DataLoader([(images, labels)] * 1000, batch_size=None)


def build(model):
    """A timm classifier, or a part of SmolLM2 with random weights."""
    if not model.startswith("smollm2-"):
        return ImageClassifier(model)
    layers = int(model.removeprefix("smollm2-"))
    size = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    size |= {"num_hidden_layers": layers, "vocab_size": 49152 * layers // 30, "tie_word_embeddings": True}
    return CausalLM(from_config={"model_type": "llama", **size})


def side_by_side(model, batch, rounds, variants):
    """Seconds of every step by variant, one step of each per round, in an order drawn anew."""
    steps, found, order = rounds + WARM_UP, {}, list(variants)

    def run(name):
        torch.manual_seed(0)
        found[name] = fit(build(model), VARIANTS[name](), batch, steps)

    fits = {name: greenlet.greenlet(run) for name in variants}
    for _ in range(steps):
        random.shuffle(order)
        for name in order:
            fits[name].switch(*() if fits[name] else (name,))
    for name in variants:
        fits[name].switch()  # to the end of its fit
    return {name: found[name] for name in variants}


def interval(ratios, draws=2000):
    """The 95 % interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def peak_memory(model, variant, batch, queue):
    """High-water mark of a few steps, in MiB, in a process of its own."""
    quiet()
    torch.set_num_threads(2)
    fit(build(model), VARIANTS[variant](), batch, 3)
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    queue.put(int(peak[1]) / 1024)


def quiet():
    """No tips, no warnings."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "resnet18"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--others", action="store_true", help="with the QAT of torchao and Brevitas, where they import")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", default=None)
    parser.add_argument("--variants", nargs="+", default=None, help="words of the variants' names; default: all")
    arguments = parser.parse_args()
    words = arguments.variants or [""]
    if arguments.others:
        VARIANTS.update(OTHERS)
    variants = [name for name in VARIANTS if any(word in name for word in words)]
    quiet()
    results = []
    for model in arguments.models:
        own = dict.fromkeys(["plain", *variants])
        if not find_attention(build(model)):
            own = [name for name in own if "attention" not in name]
        found = side_by_side(model, arguments.batch, arguments.rounds, list(own))
        plain = found["plain"][0][WARM_UP:]
        for name, (seconds, own) in found.items():
            pairs = list(zip(seconds[WARM_UP:], plain, strict=True))
            wall, cpu = ([a[k] / b[k] for a, b in pairs] for k in (0, 1))
            row = {
                "model": model,
                "variant": name,
                "seconds": statistics.median(a[0] for a, _ in pairs),
                "wall_ratio": statistics.median(wall),
                "wall_interval": interval(wall),
                "cpu_ratio": statistics.median(cpu),
                "cpu_interval": interval(cpu),
                "own": statistics.mean(own[WARM_UP:]) / statistics.median(b[0] for _, b in pairs),
            }
            if not arguments.no_memory:
                context = multiprocessing.get_context("spawn")
                queue = context.Queue()
                process = context.Process(target=peak_memory, args=(model, name, arguments.batch, queue))
                process.start()
                row["peak_mib"] = queue.get()
                process.join()
            results.append(row)
            print(
                f"{model:22} {name:52} {row['seconds']:7.3f} s  wall x{row['wall_ratio']:.3f} "
                f"[{row['wall_interval'][0]:.3f}, {row['wall_interval'][1]:.3f}]  cpu x{row['cpu_ratio']:.3f} "
                f"[{row['cpu_interval'][0]:.3f}, {row['cpu_interval'][1]:.3f}]  own {row['own']:.2%}"
                + (f"  peak {row['peak_mib']:.0f} MiB" if "peak_mib" in row else ""),
                flush=True,
            )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
