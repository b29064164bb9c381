"""Numbers written by a language model: cross-entropy against cross-entropy plus the number token loss.

Every sentence tells measured numbers and ends in the number to write; a small Llama (a million weights, one token per
character) learns to write it. Sources are scikit-learn's copies of real data:

* diabetes: six features of 442 patients -> disease progression after a year, 25 to 346.
* cells: four features of 569 biopsies, of the mean and of the worst nucleus -> its area, 143 to 4254.
* sums: total cholesterol of two of the diabetes patients -> their sum; as many pairs as sentences are asked for.

A fourth of the people is for testing and a sixth for validation, drawn by seed; training features carry one per cent of
noise, drawn anew for each of the copies of a record. Every loss sees the same sentences and steps. The number is read
digit by digit, taking the most probable digit, from the epoch with the least mean error on the validation sentences.
The weight of the added term is the paper's.

    python tests/replication/number_text.py --output number_text.json --jobs 8
"""

import statistics

import lightning.pytorch as pl
import numpy as np
import torch
from common import Batches, Curve, KeepBest, fit
from runner import key, parse, run_all, settings, show, spread
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lossplug.callbacks import SwapLoss
from lightning_lossplug.integrations.schedule import cosine_per_step
from lightning_lossplug.losses.number_values import number_values

LOSSES = {
    "CE": None,
    "CE + NTL-WAS": ("number_token", {"variant": "was", "weight": 0.3}),
    "CE + NTL-MSE": ("number_token", {"variant": "mse", "weight": 0.3}),
}
TASKS = ("diabetes", "cells", "sums")
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz ="


class Characters:
    """A tokenizer of single characters, as far as value tables need one."""

    def get_vocab(self):
        return {character: index for index, character in enumerate(ALPHABET)}

    def encode(self, text):
        return [ALPHABET.index(character) for character in text]


class Writer(pl.LightningModule):
    """A causal language model trained on the answer's digits, with cross-entropy as a criterion."""

    def __init__(self, digits, lr, width):
        super().__init__()
        size = {"hidden_size": 4 * width, "intermediate_size": 16 * width}
        size |= {"num_hidden_layers": 4, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=len(ALPHABET), max_position_embeddings=256, tie_word_embeddings=True, **size)
        self.model = LlamaForCausalLM(config)
        self.criterion = nn.CrossEntropyLoss()
        self.digits, self.lr = digits, lr

    def training_step(self, batch, batch_idx):
        ids, _, _ = batch
        z = self.model(ids[:, :-1], logits_to_keep=self.digits, use_cache=False).logits
        return self.criterion(z.flatten(0, 1), ids[:, -self.digits :].flatten())

    def validation_step(self, batch, batch_idx):
        prompts, numbers, _ = batch
        self.log("mae", (self.write(prompts) - numbers).abs().float().mean(), batch_size=len(numbers))

    def configure_optimizers(self):
        fused = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1, fused=fused)
        return cosine_per_step(optimizer, self.trainer, warmup_fraction=0.1)

    @torch.no_grad()
    def write(self, prompts):
        """The numbers after the prompts ``[N, T]``, digit by digit."""
        self.eval()
        zero, ids = ALPHABET.index("0"), prompts
        for _ in range(self.digits):
            z = self.model(ids, logits_to_keep=1, use_cache=False).logits[:, -1, zero : zero + 10]
            ids = torch.cat([ids, zero + z.argmax(1, keepdim=True)], dim=1)
        places = 10 ** torch.arange(self.digits - 1, -1, -1, device=ids.device)
        return ((ids[:, -self.digits :] - zero) * places).sum(1)


def records(task):
    """Names, features ``[N, F]`` and the number ``[N]`` of every record, and whom it belongs to."""
    if task == "diabetes":
        data = load_diabetes(scaled=False)
        names, scale = ["bmi", "bp", "s1", "s3", "s5", "s6"], np.array([10, 1, 1, 1, 100, 1])
        features = data.data[:, [data.feature_names.index(name) for name in names]] * scale
        return names, features, data.target.round(), np.arange(len(features))
    data, names = load_breast_cancer(), ["radius", "texture", "smoothness", "symmetry"]
    column = list(data.feature_names).index
    scale, kinds = np.array([100, 10, 1000, 1000]), ("mean", "worst")
    features = [data.data[:, [column(f"{kind} {name}") for name in names]] * scale for kind in kinds]
    areas = [data.data[:, column(f"{kind} area")].round() for kind in kinds]
    return names, np.concatenate(features), np.concatenate(areas), np.tile(np.arange(len(data.data)), 2)


def sentences(task, seed, copies):
    """``(texts, numbers)`` of train, val and test; the texts end before the number."""
    generator = np.random.default_rng(seed)
    names, features, numbers, people = records("diabetes" if task == "sums" else task)
    order = generator.permutation(people.max() + 1)
    cuts = np.split(order, [len(order) // 4, len(order) // 4 + len(order) // 6])
    parts = {}
    for part, group in zip(("test", "val", "train"), cuts, strict=True):
        rows = np.flatnonzero(np.isin(people, group))
        if task == "sums":
            cholesterol = features[:, names.index("s1")].round()
            pairs = cholesterol[generator.choice(rows, (len(rows) * (copies if part == "train" else 4), 2))]
            parts[part] = [f"{a:03.0f} plus {b:03.0f} = " for a, b in pairs], pairs.sum(1)
            continue
        rows = np.tile(rows, copies) if part == "train" else rows
        noise = 1 + (part == "train") * 0.01 * generator.standard_normal((len(rows), len(names)))
        told = (features[rows] * noise).round()
        texts = [" ".join(f"{name} {value:04.0f}" for name, value in zip(names, row, strict=True)) for row in told]
        parts[part] = [f"{text} = " for text in texts], numbers[rows]
    return parts


def tensors(texts, numbers, digits, device):
    """Token ids of the prompts ``[N, T]`` and of the whole sentences ``[N, T + digits]``, and the numbers ``[N]``."""
    encode = Characters().encode
    prompts = torch.tensor([encode(text) for text in texts], device=device)
    answers = torch.tensor([encode(f"{number:0{digits}.0f}") for number in numbers], device=device)
    return prompts, torch.cat([prompts, answers], dim=1), torch.tensor(numbers, device=device).long()


def work(run, root, device):
    """Errors of the written numbers on the test sentences."""
    parts = sentences(run["task"], run["seed"], run["copies"])
    digits = max(len(f"{number:.0f}") for _, numbers in parts.values() for number in numbers)
    parts = {part: tensors(*own, digits, device) for part, own in parts.items()}
    train = parts["train"][1][: run["limit"]]
    torch.manual_seed(run["seed"])
    module, best, curve = Writer(digits, run["lr"], run["width"]), KeepBest("mae"), Curve()
    callbacks = [best, curve]
    if run["loss"]:
        parameters = {**run["parameters"], "values": number_values(Characters())}
        callbacks.append(SwapLoss(run["loss"], parameters, mode="add", where="criterion"))
    batches = Batches(train, train[:, -1], run["batch"], run["seed"])
    fit(module, batches, run["epochs"], callbacks, Batches(*parts["val"][::2], 512), device)
    result = {"val_curve": [epoch["mae"] for epoch in curve.values]}
    prompts, _, numbers = parts["test"]
    for prefix, state in (("last_", None), ("", best.state)):
        if state:
            module.load_state_dict(state)
        error = (module.write(prompts) - numbers).abs().double()
        result[f"{prefix}mae"] = float(error.mean())
        result[f"{prefix}rmse"] = float(error.square().mean().sqrt())
        result[f"{prefix}exact"] = float((error == 0).double().mean())
    return {**result, "constant": float((numbers - numbers.median()).abs().double().mean())}


def main(argv=None):
    def extra(parser):
        parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
        parser.add_argument("--copies", type=int, default=16, help="noisy copies per training record")

    arguments = parse(__doc__, argv, 30, extra, batch=128)

    def describe(task, name, seed):
        loss, parameters = LOSSES[name] or (None, {})
        own = {"task": task, "loss": loss, "parameters": parameters, "copies": arguments.copies, "lr": 1e-3}
        return {**own, "seed": seed, **settings(arguments)}

    runs = [describe(task, name, seed) for seed in arguments.seeds for task in arguments.tasks for name in LOSSES]
    results = run_all(work, runs, arguments)
    for task in arguments.tasks:
        of = {name: [results[key(describe(task, name, seed))] for seed in arguments.seeds] for name in LOSSES}
        rows = []
        for name, own in of.items():
            ratio = statistics.median(r["mae"] / b["mae"] for r, b in zip(own, of["CE"], strict=True))
            cells = [spread([r["mae"] for r in own]), f"{ratio:.3f}", spread([r["rmse"] for r in own])]
            more = [spread([r["exact"] for r in own], 100), spread([r["last_mae"] for r in own])]
            rows.append([name, *cells, *more])
        constant = spread([r["constant"] for r in of["CE"]])
        header = ["loss", "MAE: median [min, max]", "MAE / MAE of CE, median", "RMSE", "exact in %", "MAE, last epoch"]
        show(f"{task}: written number, test sentences (MAE of their median: {constant})", header, rows, arguments)


if __name__ == "__main__":
    main()
