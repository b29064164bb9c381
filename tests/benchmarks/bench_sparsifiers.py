r"""Mask and masked weight at 2:4, time and temporary memory: this library, argsort, torch.ao, torchao and ModelOpt.

One turn makes a new mask from the weight and the masked weight that a forward pass reads, with the gradient's graph.
Ways take turns in one process. torchao and ModelOpt are measured where they import, which is not in the environment of
the tests::

    pip install --no-deps --target /tmp/others torchao nvidia-modelopt omegaconf antlr4-python3-runtime==4.9.3 pulp \
        nvidia-ml-py ninja
    OMP_NUM_THREADS=2 PYTHONPATH=/tmp/others python tests/benchmarks/bench_sparsifiers.py
"""

import argparse
import importlib
import statistics
import time
import warnings

import torch
from bench_nm_mask import by_argsort, temporaries
from torch import nn

from lightning_lossplug.sparsity import NMSettings, NMTechnique, masked_ste, nm_mask


def ours(layer):
    return lambda: masked_ste(layer.weight, nm_mask(layer.weight, 2, 4))


def plugged(layer):
    """Through the technique, as NMSparsity runs it: with the mask's copy into its buffer and the flip rate."""
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4))
    technique = NMTechnique(NMSettings(2, 4, "nm_ste", include=["1"]))
    technique.attach(model)
    found = technique.layers["1"]
    found.transform.set_decay(0.0)
    found.pattern = (2, 4)

    def turn():
        technique._new_mask("1", found, (2, 4))
        return layer.weight

    return turn


def argsort(layer):
    return lambda: layer.weight * by_argsort(layer.weight.detach(), 2, 4, 1)


def sparsifier(module):
    def build(layer):
        kind = importlib.import_module(module).WeightNormSparsifier
        model = nn.Sequential(layer)
        found = kind(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
        found.prepare(model, [{"tensor_fqn": "0.weight"}])

        def turn():
            found.step()
            return layer.weight

        return turn

    return build


def modelopt(layer):
    mask = importlib.import_module("modelopt.torch.sparsity.weight_sparsity.magnitude").create_asp_mask
    return lambda: layer.weight * mask(layer.weight.detach(), "2:4 sparsity")


WAYS = {
    "nm_mask, masked_ste": ours,
    "NMSparsity (with flip rate)": plugged,
    "argsort": argsort,
    "torch.ao.pruning": sparsifier("torch.ao.pruning"),
    "torchao": sparsifier("torchao.prototype.sparsity.sparsifier.weight_norm_sparsifier"),
    "ModelOpt": modelopt,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1536x576", "4096x4096"])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for shape in arguments.shapes:
        rows, columns = map(int, shape.split("x"))
        calls, seconds = {}, {}
        for name, build in WAYS.items():
            torch.manual_seed(0)
            try:
                calls[name] = build(nn.Linear(columns, rows, bias=False))
            except ImportError as error:
                print(f"{name}: not measured, {error}")
                continue
            kept = (calls[name]() != 0).reshape(-1, 4).sum(1)
            print(f"{name}: {'two of every four are kept' if (kept == 2).all() else 'not 2:4'}")
            seconds[name] = []
        for turn in range(arguments.rounds):
            for name in sorted(calls, reverse=bool(turn % 2)):
                begin = time.perf_counter()
                calls[name]()
                seconds[name].append(time.perf_counter() - begin)
        base = seconds["nm_mask, masked_ste"]
        for name, values in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
            memory = temporaries(calls[name]) / (4 * rows * columns)
            print(f"{shape:>10} {name:28} {1e3 * statistics.median(values):9.2f} ms  x{ratio:.1f}  ", end="")
            print(f"temporaries {memory:.2f} weights", flush=True)


if __name__ == "__main__":
    main()
