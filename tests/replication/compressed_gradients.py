"""Fashion-MNIST on two processes with gradients in about 1 % of the bytes, with and without error feedback.

Plain SGD and the same network, steps and seeds for every method; the learning rate of each is chosen on a seed of its
own and 10,000 validation images. ``mixed``: both processes draw from all classes; ``classes``: five classes each, the
case in which compression alone has a bias. Bytes are those that a process hands to the collectives, as counted.

    python tests/replication/compressed_gradients.py --root DATA --output compressed.json --epochs 4
"""

import json
import os
import time

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from common import Batches, fashion_mnist, predict
from runner import TRIAL_SEED, key, parse, prepare, settings, show, spread
from torch import nn

from lightning_lossplug.callbacks import CompressedGradients

# An entry of topk takes 8 bytes instead of 4, one of block_topk 5.
METHODS = {
    "uncompressed": None,
    "Top-k, no feedback": {"rule": "none", "compressor": "topk", "ratio": 0.005},
    "Top-k, EF14": {"rule": "ef14", "compressor": "topk", "ratio": 0.005},
    "Top-k, EControl": {"rule": "econtrol", "compressor": "topk", "ratio": 0.005},
    "Top-k, EF21-SGDM": {"rule": "ef21_sgdm", "compressor": "topk", "ratio": 0.005},
    "block Top-1, EF21-SGDM": {"rule": "ef21_sgdm", "compressor": "block_topk", "block_size": 125},
    "Rand-k, no feedback": {"rule": "none", "compressor": "randk", "ratio": 0.01},
    "Rand-k, EF14": {"rule": "ef14", "compressor": "randk", "ratio": 0.01},
}
RANKS = 2


class Network(pl.LightningModule):
    """Two convolutions and two linear layers without normalisation, plain SGD."""

    def __init__(self, width, lr):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(98 * width, 8 * width), nn.ReLU(), nn.Linear(8 * width, 10)),
        )
        self.lr = lr

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Tested(pl.Callback):
    """Loss and accuracy on held-out images after every epoch."""

    def __init__(self, x, y):
        self.x, self.y, self.curve = x, y, []

    def on_train_epoch_end(self, trainer, pl_module):
        z = predict(pl_module, self.x)
        pl_module.train()
        values = {"loss": F.cross_entropy(z, self.y), "accuracy": (z.argmax(1) == self.y).float().mean()}
        self.curve.append({name: float(value) for name, value in values.items()})


def shard(x, y, split, seed):
    """The images of one process: every second one, or those of its classes."""
    rank = dist.get_rank()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    mine = order[rank::RANKS] if split == "mixed" else order[(y[order] // 5) == rank]
    mine = mine[: len(y) // RANKS * 9 // 10]  # equal numbers of steps
    return x[mine], y[mine]


def work(run, root):
    """One fit, on both processes."""
    data = fashion_mnist(root, run["limit"], "cpu")
    torch.manual_seed(run["seed"])
    module = Network(run["width"], run["lr"])
    compression = (
        [] if run["options"] is None else [CompressedGradients(**run["options"], min_numel=64, seed=run["seed"])]
    )
    tested = Tested(*data["val" if run["seed"] == TRIAL_SEED else "test"])
    batches = Batches(*shard(*data["train"], run["split"], run["seed"]), run["batch"], run["seed"])
    trainer = pl.Trainer(
        max_epochs=run["epochs"],
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp",
        use_distributed_sampler=False,
        callbacks=[*compression, tested],
        logger=False,
        log_every_n_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches)
    result = {**tested.curve[-1], "curve": tested.curve, "share": 1.0}
    if compression:
        exchange = compression[0].exchange
        result |= {"share": exchange.bytes_sent / exchange.bytes_dense, "bytes": exchange.bytes_sent}
    return result


def process(rank, runs, arguments, meeting):
    """One of the two; the first writes every result as it comes."""
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    prepare(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    records = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for run in runs:
        start = time.perf_counter()
        result = work(run, arguments.root)
        if rank == 0:
            records.append({"run": run, "result": result, "seconds": time.perf_counter() - start})
            part = arguments.output.with_suffix(".part")
            part.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
            part.replace(arguments.output)
            brief = {name: round(result[name], 4) for name in ("loss", "accuracy", "share")}
            print(f"{records[-1]['seconds']:.1f} s {key(run)} -> {brief}", flush=True)
    dist.destroy_process_group()


def run_all(runs, arguments):
    """Does what ``--output`` lacks in one pair of processes; returns ``{key(run): result}``."""

    def known():
        records = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
        return {key(record["run"]): record["result"] for record in records}

    todo = [run for run in runs if key(run) not in known()]
    if todo:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        meeting = arguments.output.resolve().with_suffix(".meeting")
        meeting.unlink(missing_ok=True)
        mp.spawn(process, args=(todo, arguments, str(meeting)), nprocs=RANKS)
        meeting.unlink(missing_ok=True)
    found = known()
    return {key(run): found[key(run)] for run in runs}


def main(argv=None):
    """Learning rates, then the runs, then the tables."""

    def extra(parser):
        parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
        parser.add_argument("--splits", nargs="+", default=["mixed", "classes"], choices=["mixed", "classes"])
        parser.add_argument("--lrs", type=float, nargs="+", default=[0.03, 0.1, 0.3])

    arguments = parse(__doc__, argv, epochs=4, extra=extra, batch=64)

    def described(method, split, lr, seed):
        return {**settings(arguments), "options": METHODS[method], "split": split, "lr": lr, "seed": seed}

    cases = [(method, split) for split in arguments.splits for method in arguments.methods]
    trials = {case: [described(*case, lr, TRIAL_SEED) for lr in arguments.lrs] for case in cases}
    tried = run_all([run for runs in trials.values() for run in runs], arguments)
    best = {case: max(runs, key=lambda run: tried[key(run)]["accuracy"])["lr"] for case, runs in trials.items()}
    runs = {case: [described(*case, best[case], seed) for seed in arguments.seeds] for case in cases}
    results = run_all([run for own in runs.values() for run in own], arguments)
    for split in arguments.splits:
        rows = []
        for method in arguments.methods:
            own = [results[key(run)] for run in runs[method, split]]
            numbers = [spread([r["accuracy"] for r in own], 100), spread([r["loss"] for r in own], 1, 3)]
            rows.append([method, f"{own[0]['share']:.2%}", f"{best[method, split]:g}", *numbers])
        header = ["method", "bytes", "lr", "test accuracy, %", "test loss"]
        title = f"{split}, {len(arguments.seeds)} seeds, median [min, max]"
        show(title, header, rows, arguments)


if __name__ == "__main__":
    main()
