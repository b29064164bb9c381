"""Two gloo ranks exchange compressed gradients: DDP alone on quadratics, then Trainers that stop and go on.

Run as a script it writes ``<folder>/rank<r>.pt``. The second rank waits while the first trains alone.
"""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from callback_runs import OrderedLoader, data
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lossplug.callbacks import CompressedDDPStrategy, CompressedGradients, LocalUpdates
from lightning_lossplug.communication import GradientExchange, compression_hook, create, create_rule

SHAPES = {"a": (6, 5), "b": (40,), "c": (3,)}  # the last is below min_numel
RULES = {
    "none": {},
    "ef14": {},
    "econtrol": {"eta": 0.1},
    "ef21": {},
    "ef21_w": {"weights": [0.7, 0.3]},
    "ef21_sgdm": {"beta": 0.3, "init": "dense"},
}
COMPRESSORS = {
    "identity": {},
    "topk": {"ratio": 0.1},
    "block_topk": {"block_size": 8},
    "randk": {"ratio": 0.2},
    "scaled_sign": {},
    "natural": {},
    "qsgd": {"levels": 7},
    "lowrank": {"rank": 1},
}
STEPS, LR, MIN_NUMEL = 25, 0.05, 10


class Quadratic(nn.Module):
    """The loss of a rank is sum h (p - goal)^2 / 2 with curvatures and goals of its own."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape, dtype=dtype)))

    def forward(self, pieces):
        return sum((h * (p - goal).square()).sum() / 2 for p, (h, goal) in zip(self.parameters(), pieces, strict=True))


def pieces(rank, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rank)
    return [
        (
            0.5 + torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype),
            3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),
        )
        for shape in SHAPES.values()
    ]


def quadratics(rule, compressor, steps=STEPS, micro=1, spike=None, dtype=torch.float64, bucket_cap_mb=25):
    """Trains by SGD; returns the parameters and the exchange. ``spike``: the step at which rank 1 has a NaN."""
    model, rank = Quadratic(dtype), dist.get_rank()
    exchange = GradientExchange(rule, compressor, model.named_parameters(), MIN_NUMEL, seed=5)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
    wrapped.register_comm_hook(exchange, compression_hook)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    mine = pieces(rank, dtype)
    for step in range(steps):
        optimizer.zero_grad()
        for _ in range(micro - 1):
            with wrapped.no_sync():
                (wrapped(mine) / micro).backward()
        loss = wrapped(mine) / micro
        (loss * float("nan") if step == spike and rank == 1 else loss).backward()
        if step == spike:
            assert all(bool(p.grad.isnan().all()) for p in model.parameters())
        else:
            optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, exchange


def hooks():
    found = {}
    for rule, options in RULES.items():
        for compressor, parameters in COMPRESSORS.items():
            made = quadratics(create_rule(rule, **options), create(compressor, **parameters))
            found[rule, compressor] = (*made[:1], made[1].bytes_sent, made[1].bytes_dense)
    rule, top = create_rule("econtrol"), create("topk", ratio=0.1)
    found["float32"] = quadratics(rule, top, dtype=torch.float32)[0]
    found["small buckets"] = quadratics(rule, top, bucket_cap_mb=0.0001)[0]
    found["large buckets"] = quadratics(rule, top)[0]
    found["accumulated"] = quadratics(rule, top, micro=4)[0]
    found["spiked"], exchange = quadratics(rule, top, steps=STEPS + 1, spike=7)
    found["skipped"] = exchange.skipped
    _, exchange = quadratics(create_rule("ef21_sgdm", beta=0.3), create("natural"), steps=1010, dtype=torch.float32)
    found["long"] = exchange.states
    return found


class Net(pl.LightningModule):
    """Every rank sees its own batches, in order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        loader = OrderedLoader()
        loader.batches = list(data(128))[dist.get_rank() :: 2]
        return loader


def fit(devices, epochs, *callbacks, ckpt=None, save=None, strategy=None):
    module = Net()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=devices,
        strategy=strategy or DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=ckpt)
    if save:
        trainer.save_checkpoint(save)
    found = {"net": {name: value.clone() for name, value in module.net.state_dict().items()}}
    for callback in callbacks[:1] or [c for c in trainer.callbacks if isinstance(c, CompressedGradients)]:
        states = {name: {k: v.clone() for k, v in state.items()} for name, state in callback.exchange.states.items()}
        logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
        found |= {"states": states, "step": callback.exchange.step, "logged": logged}
    return found


class Begin(pl.Callback):
    """Keeps the states with which training starts."""

    def __init__(self, callback):
        self.callback, self.states = callback, {}

    def on_train_start(self, trainer, pl_module):
        exchange = self.callback.exchange
        self.states = {name: {k: v.clone() for k, v in state.items()} for name, state in exchange.states.items()}


def compress(**options):
    return CompressedGradients(min_numel=32, **options)


def local(**options):
    return LocalUpdates(min_numel=32, **options)


def local_rounds(folder):
    """Rounds of 3 steps in epochs of 8; the checkpoint after step 4 is inside one."""
    options = {"ratio": 0.2, "local_steps": 3, "participation": 0.5}
    every = {"every_n_train_steps": 4, "save_top_k": -1, "filename": "{step}"}
    found = {"straight": fit(2, 2, local(**options), ModelCheckpoint(folder / "local", **every))}
    found["resumed"] = fit(2, 2, local(**options), ckpt=folder / "local" / "step=4.ckpt")
    options = {"method": "scallion", "compressor": "qsgd", "levels": 7, "local_steps": 2}
    found["scallion"] = fit(2, 1, local(**options, alpha=0.5))
    found["every step"] = fit(2, 1, local(compressor="identity", beta=1.0, local_steps=1))
    found["plain"] = fit(2, 1)
    return found


def as_strategies(folder):
    """By name with the defaults, with options, and from a checkpoint of the callback."""
    options = {"rule": "ef14", "ratio": 0.05, "min_numel": 32}
    path = folder / "callback.ckpt"
    found = {"callback": fit(2, 2, CompressedGradients(**options))}
    found["strategy"] = fit(2, 2, strategy=CompressedDDPStrategy(**options))
    fit(2, 1, CompressedGradients(**options), save=path)
    found["resumed"] = fit(2, 2, strategy=CompressedDDPStrategy(**options), ckpt=path)
    found["name"] = fit(2, 1, strategy="lossplug_ddp_ef21")
    return found


TRAINED = {
    "topk": {"ratio": 0.05},
    "randk": {"ratio": 0.05, "rule": "econtrol"},
    "scaled_sign": {"rule": "ef14"},
}


def work(rank, folder):
    folder = Path(folder)
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")

    def join(name, ranks):
        dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=ranks)

    join("first", 2)
    found = {"hooks": hooks()}
    for name, options in TRAINED.items():
        options, path = {"compressor": name, **options}, folder / f"{name}.ckpt"
        straight = fit(2, 2, compress(**options))
        fit(2, 1, compress(**options), save=path)
        found[name] = (straight, fit(2, 2, compress(**options), ckpt=path))
    found["local"] = local_rounds(folder)
    found["strategy"] = as_strategies(folder)
    dist.destroy_process_group()
    if rank == 0:
        join("alone", 1)
        found["alone"] = fit(1, 2, compress(ratio=0.05), ckpt=folder / "topk.ckpt", save=folder / "alone.ckpt")
        dist.destroy_process_group()
    join("second", 2)
    callback = compress(ratio=0.05)
    begin = Begin(callback)
    found["longer"] = fit(2, 3, callback, begin, ckpt=folder / "alone.ckpt")
    found["again"] = begin.states
    try:
        fit(2, 2, compress(rule="ef14"), ckpt=folder / "topk.ckpt")
    except ValueError as error:
        found["other rule"] = str(error)
    dist.destroy_process_group()
    torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1],), nprocs=2)
