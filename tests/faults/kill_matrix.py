"""Runs that are killed with SIGKILL at random moments and go on from their last checkpoint, for every callback.

``kill_matrix.py FOLDER [--trials N] [--kills K] [--seed S] [--callbacks NAME ...] [--strategies NAME ...]``
prints a line of JSON per case. One process imports everything and never computes; each run is forked from it, so that
a trial takes a second instead of twenty. Distributed runs are killed all ranks together, as by a lost machine.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch._dynamo  # FSDP2 would import it in every fork
import torch.distributed as dist
from callback_runs import OrderedLoader, Plain, data
from callback_table import CALLBACKS, LANGUAGE, run_of, teacher
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from tiny_models import LLAMA, Wrapped
from tiny_moe import MoE
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from lightning_lossplug import LossplugError, callbacks
from lightning_lossplug.surgery.shards import full

RANKS = {"single": 1, "ddp": 2, "fsdp2": 2}
BATCHES, EPOCHS, EVERY = 8, 2, 2  # per rank and epoch, epochs, batches between two checkpoints
PATIENCE = 120


def sgd(module):
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05)
    return module


def language(kind):
    def build(rank):
        torch.manual_seed(0)
        module = MoE("deepseek_v3") if kind == "moe" else Wrapped(AutoModelForCausalLM.from_config(LLAMA))
        # Lightning 2.6 can't load the empty state of plain SGD under FSDP2
        module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(rank)
        loader = OrderedLoader()
        loader.batches = [torch.randint(0, 64, (2, 16), generator=generator) for _ in range(BATCHES)]
        return module, loader

    return build


def classifier(rank):
    torch.manual_seed(0)
    loader = OrderedLoader()
    loader.batches = list(data(16 * BATCHES))[rank::2]
    return Plain(dropout=0.1), loader


def plain_sgd(rank):
    module, loader = classifier(rank)
    return sgd(module), loader


C = callbacks
for _name in C.__all__:
    getattr(C, _name)  # imported here, once, and not in every fork
CASES = {  # what trains, and with what; ExactResume is in every run
    **{name: (classifier, partial(run_of, name)) for name in CALLBACKS},
    **{name: (language("llama"), lambda make=make: [make()]) for name, make in LANGUAGE.items()},
    "ExactResume": (classifier, list),
    "SparsityHealth": (classifier, lambda: [C.NMSparsity(2, 4, "nm_srste"), C.SparsityHealth(plot=False, every=2)]),
    "CompressedGradients": (plain_sgd, lambda: [C.CompressedGradients(ratio=0.1, min_numel=32)]),
    "LocalUpdates": (plain_sgd, lambda: [C.LocalUpdates(ratio=0.1, local_steps=3, min_numel=32)]),
    "MoEBalancing": (language("moe"), lambda: [C.MoEBalancing()]),
    "together": (
        classifier,
        lambda: [
            C.SwapLoss("poly_loss"),
            C.NMSparsity(2, 4, "mdgf_linear", decay_end=0.5, finetune_fraction=0.3),
            C.QAT(8, 8),
            C.OnlineDistillation(teacher(), "bdkd"),
        ],
    ),
}


def pair_of(case):
    """``A+B``: one of the callbacks that exchange gradients and any other, in the order of the name."""
    made = {name: CASES[name][1] for name in case.split("+")}
    return plain_sgd, lambda: [callback for make in made.values() for callback in make()]


class Pace(pl.Callback):
    """Tells how far a run is, and slows it down so that a signal can fall anywhere into a step."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_global_zero:
            self.path.write_text(str(trainer.global_step))
        time.sleep(0.004)


def shard(module):
    def configure_model():
        if hasattr(module, "sharded"):
            return
        module.sharded = True
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        for layer in (*(layers if isinstance(module, Plain) else ()), *module.children()):  # others tie their weights
            fully_shard(layer, mesh=module.device_mesh["data_parallel"])

    return configure_model


class Sharded(Plain):
    """The layers are made in __init__, where callbacks find them, and sharded later."""

    def configure_model(self):
        shard(self)()


class ShardedWrapped(Wrapped):
    configure_model = Sharded.configure_model


class ShardedMoE(MoE):
    configure_model = Sharded.configure_model


SHARDED = {Plain: Sharded, Wrapped: ShardedWrapped, MoE: ShardedMoE}


def strategy_of(name):
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    return DDPStrategy(process_group_backend="gloo") if name == "ddp" else "auto"


def fit(case, strategy, rank, folder, epochs=EPOCHS, exact=True):
    """Trains from the last checkpoint if there is one; returns what the run ended with."""
    build, made = pair_of(case) if "+" in case else CASES[case]
    module, loader = build(rank)
    if strategy == "fsdp2":
        module.__class__ = SHARDED[type(module)]
    pl.seed_everything(5 + rank, verbose=False)
    used = made()
    saver = ModelCheckpoint(folder, filename="last", every_n_train_steps=EVERY, enable_version_counter=False)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=RANKS[strategy],
        strategy=strategy_of(strategy),
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[*used, saver, Pace(folder / "pace"), *([C.ExactResume()] if exact else [])],
        logger=False,
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None)
    return {
        "model": {name: plain(value) for name, value in module.state_dict().items()},
        "callbacks": [plain(callback.state_dict()) for callback in used],
        "step": trainer.global_step,
    }


def plain(value):
    """Copies of tensors, whole ones where they are sharded."""
    if isinstance(value, torch.Tensor):
        return (full(value) if isinstance(value, DTensor) else value).detach().clone()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def differences(one, two, path=""):
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        alike = one.dtype == two.dtype and one.shape == two.shape
        return [] if alike and torch.equal(one.nan_to_num(7), two.nan_to_num(7)) else [path]
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [d for key in one for d in differences(one[key], two[key], f"{path}.{key}")]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [d for i, (a, b) in enumerate(zip(one, two, strict=True)) for d in differences(a, b, f"{path}[{i}]")]
    same = type(one) is type(two) and (one == two or one != one)
    return [] if same else [path]


def work(case, strategy, rank, folder, attempt, **options):
    ranks = RANKS[strategy]
    if ranks > 1:
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{attempt}", rank=rank, world_size=ranks)
    try:
        found = fit(case, strategy, rank, folder, **options)
    except LossplugError as error:
        found = {"refused": str(error)}
    torch.save(found, folder / f"final-{rank}.pt")
    if ranks > 1:
        dist.barrier()


def start(case, strategy, folder, attempt, **options):
    """Forks the processes of one run, in a group of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pace").unlink(missing_ok=True)
    found = []
    for rank in range(RANKS[strategy]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setpgid(0, found[0] if found else 0)
                log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.chdir(folder)
                work(case, strategy, rank, folder, attempt, **options)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.setpgid(pid, found[0] if found else 0)
        found.append(pid)
    return found


def finish(pids, folder, all_of_them=False):
    """Waits for a run; returns its results, or what went wrong. A failure of one rank ends the others, unless asked."""
    codes, until = {}, time.monotonic() + PATIENCE
    while len(codes) < len(pids) and time.monotonic() < until and (all_of_them or not any(codes.values())):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = status
        time.sleep(0.002)
    if len(codes) < len(pids) or any(codes.values()):
        kill(pids, set(pids) - set(codes))
        text = "did not end: " if time.monotonic() >= until else ""
        text += "".join(path.read_text()[-1500:] for path in sorted(folder.glob("log*")))
        return f"ended with {list(codes.values())}: {text}"
    return [torch.load(folder / f"final-{rank}.pt", weights_only=True) for rank in range(len(pids))]


def kill(pids, alive):
    if alive:
        os.killpg(pids[0], signal.SIGKILL)
        for pid in alive:
            os.waitpid(pid, 0)


def killed(case, strategy, folder, attempt, step, generator, lost=None):
    """Starts a run and kills it at a random moment after a step and its first checkpoint; whether it still ran.

    With ``lost`` only that rank is killed, and the others have to end by themselves, with an error.
    """
    pids = start(case, strategy, folder, attempt)
    pace, until = folder / "pace", time.monotonic() + PATIENCE
    while time.monotonic() < until:
        ended = any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids)
        done = int(pace.read_text() or 0) if pace.exists() else 0
        if ended or (done >= step and (folder / "last.ckpt").exists()):
            break
        time.sleep(0.001)
    time.sleep(generator.uniform(0, 0.02))
    alive = (folder / "last.ckpt").exists() and not (folder / "final-0.pt").exists()
    if lost is not None and alive:
        os.kill(pids[lost], signal.SIGKILL)
        text = finish(pids, folder, all_of_them=True)
        assert isinstance(text, str), "a run ended well without one of its ranks"
        assert "did not end" not in text, text
    else:
        kill(pids, set(pids))
    return alive


def trial(case, strategy, folder, straight, generator, kills, lose_a_rank):
    """One run, killed ``kills`` times and then left to end; returns the kills and what differs from the straight one.

    A run that came to its end before its signal proves nothing: that is no kill, and the trial doesn't count.
    """
    lost = generator.randrange(RANKS[strategy]) if lose_a_rank else None
    steps = sorted(generator.sample(range(1, BATCHES * EPOCHS - 3), kills))
    try:
        for attempt, step in enumerate(steps):
            if not killed(case, strategy, folder, attempt, step, generator, lost):
                return 0, []
    except AssertionError as error:
        return kills, [str(error)]
    for path in folder.glob("final-*.pt"):
        path.unlink()
    resumed = finish(start(case, strategy, folder, kills), folder)
    if isinstance(resumed, str):
        return kills, [resumed]
    left = {path.name for path in folder.iterdir()} - {path.name for path in (folder.parent / "straight").iterdir()}
    left = [name for name in left if "meeting" not in name]
    return kills, [f"left behind: {name}" for name in left] + differences(straight, resumed, case)


def elastic(case, folder, first, second):
    """Half of a run on some processes, the rest on another number of them."""
    began = time.monotonic()
    folder = folder / f"{case}-{first}-{second}"
    report = {"case": case, "strategy": f"{first} to {second}", "failures": []}
    for attempt, (strategy, epochs) in enumerate(((first, 1), (second, 2))):
        for path in folder.glob("final-*.pt"):
            path.unlink()
        found = finish(start(case, strategy, folder, attempt, epochs=epochs, exact=False), folder)
        if isinstance(found, str):
            report["failures"].append(found)
            break
        if "refused" in found[0]:
            report["refused"] = found[0]["refused"]
            break
        if not all(value.isfinite().all() for value in found[0]["model"].values()):
            report["failures"].append("a weight is not finite")
        if len(found) == 2 and case != "LocalUpdates" and differences(found[0]["model"], found[1]["model"]):
            report["failures"].append("the ranks ended with other weights")
    else:
        report["step"] = found[0]["step"]
    return {**report, "seconds": round(time.monotonic() - began, 1)}


def pair(one, two, folder):
    """Both orders of two callbacks on two processes: the same bits, or the same line that refuses them."""
    began, found = time.monotonic(), []
    report = {"case": f"{one}+{two}", "strategy": "ddp", "failures": []}
    for case in (f"{one}+{two}", f"{two}+{one}"):
        found.append(finish(start(case, "ddp", folder / case, 0, epochs=1), folder / case))
    texts = [ranks if isinstance(ranks, str) else ranks[0].get("refused") for ranks in found]
    if any(isinstance(ranks, str) for ranks in found) or (texts[0] is None) != (texts[1] is None):
        report["failures"] += [str(text) for text in texts]
    elif texts[0] is not None:
        report["refused"] = texts[0]
    else:
        report["failures"] += differences(*[[rank["model"] for rank in ranks] for ranks in found])
    return {**report, "seconds": round(time.monotonic() - began, 1)}


def run(case, strategy, folder, trials, kills, seed, lose_a_rank):
    began = time.monotonic()
    folder = folder / f"{case}-{strategy}"
    straight = finish(start(case, strategy, folder / "straight", 0), folder / "straight")
    report = {"case": case, "strategy": strategy, "trials": 0, "kills": 0, "failures": []}
    if isinstance(straight, str):
        report["failures"].append(straight)
    elif "refused" in straight[0]:
        report["refused"] = straight[0]["refused"]
        if any(found.get("refused") != report["refused"] for found in straight):
            report["failures"].append("ranks disagree")
    else:
        generator = random.Random(f"{seed} {case} {strategy}")
        for number in range(3 * trials):
            if report["trials"] == trials:
                break
            hit, wrong = trial(case, strategy, folder / str(number), straight, generator, kills, lose_a_rank)
            report["trials"] += hit > 0
            report["kills"] += hit
            report["failures"] += [f"trial {number}: {line}" for line in wrong]
    return {**report, "seconds": round(time.monotonic() - began, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--kills", type=int, default=1, help="times that each run is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--callbacks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--strategies", nargs="+", default=list(RANKS), choices=list(RANKS))
    parser.add_argument("--lose-a-rank", action="store_true", help="kill one rank alone; the others have to end")
    parser.add_argument("--elastic", action="store_true", help="resume with another number of processes instead")
    parser.add_argument("--pairs", action="store_true", help="every pair with one that exchanges gradients instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.pairs:
        for one in ("CompressedGradients", "LocalUpdates"):
            for two in (
                [name for name in (*CALLBACKS, "LocalUpdates") if name != one] if one in options.callbacks else []
            ):
                print(json.dumps(pair(one, two, options.folder.resolve())), flush=True)
        return
    if options.elastic:
        for first, second in (("single", "ddp"), ("ddp", "single")):
            for case in options.callbacks:
                print(json.dumps(elastic(case, options.folder.resolve(), first, second)), flush=True)
        return
    for strategy in options.strategies:
        for case in options.callbacks:
            how = options.trials, options.kills, options.seed, options.lose_a_rank
            print(json.dumps(run(case, strategy, options.folder.resolve(), *how)), flush=True)


if __name__ == "__main__":
    main()
