r"""What distillation costs per training step beyond the work it cannot do without, measured side by side.

Every variant is an ordinary ``Trainer.fit`` of a timm model on random images; the fits take turns after every step (see
``bench_step.py``), and ratios are taken within a round:

    online   OnlineDistillation (BD-KD)       against  the student's step + the teacher's step
    frozen   Distillation from a network      against  the student's step + the teacher's forward pass
    cached   Distillation from stored logits  against  the student's step

``plain again`` is the noise: the student's step against itself. ``memory`` is the peak of a language model's divergence
and its gradients above what it starts from, fused against materialised logits, in a process each.

Run: OMP_NUM_THREADS=2 python tests/benchmarks/bench_distillation.py --rounds 10

``--others`` puts frozen teachers of ModelOpt (converted student, loss in the step) and torchdistill (its own loop, no
Lightning) beside ours; the first loss of each is printed, since all do the same job. They are measured where they
import, which is not in the environment of the tests::

    pip install --no-deps --target /tmp/others torchdistill nvidia-modelopt omegaconf antlr4-python3-runtime==4.9.3 \
        pulp nvidia-ml-py ninja
    OMP_NUM_THREADS=2 PYTHONPATH=/tmp/others python tests/benchmarks/bench_distillation.py --only time --others
"""

import argparse
import importlib
import json
import multiprocessing
import random
import re
import statistics
import tempfile
import time
from pathlib import Path

import greenlet
import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from bench_step import WARM_UP, End, Start, interval, loader_for, quiet

from lightning_lossplug.callbacks import Distillation, OnlineDistillation
from lightning_lossplug.distillation import cache_teacher, create
from lightning_lossplug.losses.fused import fused_linear_divergence


class Plain(pl.LightningModule):
    """What a user has."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.net = timm.create_model(name)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class First(pl.Callback):
    """Keeps the first loss that is differentiated."""

    def __init__(self, losses, name):
        self.losses, self.name = losses, name

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses.setdefault(self.name, loss.item())


def teacher_of(name):
    torch.manual_seed(1)
    return timm.create_model(name)


class WithModelOpt(Plain):
    """Edited as ModelOpt wants it: the student is converted, the step adds the loss."""

    def __init__(self, name, teacher):
        super().__init__(name)
        distill = importlib.import_module("modelopt.torch.distill")
        criterion = distill.LogitsDistillationLoss(temperature=4.0, reduction="batchmean")
        config = {"teacher_model": teacher_of(teacher), "criterion": criterion, "loss_balancer": None}
        self.net = distill.convert(self.net, mode=[("kd_loss", config)])

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + self.net.compute_kd_loss()


def torchdistill(student, teacher, batch, steps, losses):
    """Seconds of each step of its own loop."""
    box = importlib.import_module("torchdistill.core.distillation").DistillationBox
    importlib.import_module("torchdistill.losses.mid_level")
    paths = {f"{side}_module_path": "." for side in ("student", "teacher")}
    ends = {f"{side}_module_io": "output" for side in ("student", "teacher")}
    options = {**paths, **ends, "temperature": 4.0, "alpha": 1.0, "beta": 1.0, "reduction": "batchmean"}
    terms = {"kd": {"criterion": {"key": "KDLoss", "kwargs": options}, "weight": 1.0}}
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": 1e-4}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    made = box(teacher_of(teacher), Plain(student).net, {}, config, torch.device("cpu"), None, False, 1.0)
    made.pre_epoch_process()
    made.teacher_model.eval()
    images, labels = next(iter(loader_for(batch)))
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        loss = made.forward_process(images, labels, None)
        losses.setdefault("torchdistill", loss.item())
        made.post_forward_process(loss)
        seconds.append(time.perf_counter() - begun)
        greenlet.getcurrent().parent.switch()
    return seconds


def fit(module, callbacks, batch, steps):
    """Seconds of each step."""
    start = Start()
    end = End(start)
    pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        callbacks=[start, *callbacks, end],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader_for(batch))
    return [wall for wall, _ in end.seconds]


def forward(network, batch, steps):
    """Seconds of the teacher's forward pass, one per turn."""
    images, _ = next(iter(loader_for(batch)))
    network.eval()
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        with torch.no_grad():
            network(images)
        seconds.append(time.perf_counter() - begun)
        greenlet.getcurrent().parent.switch()
    return seconds


def side_by_side(student, teacher, batch, rounds, others):
    """Seconds of every turn by variant."""
    steps, found, losses = rounds + WARM_UP, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        cache_teacher(timm.create_model(teacher), [next(iter(loader_for(batch)))], folder)
        work = {
            "plain": lambda: fit(Plain(student), [], batch, steps),
            "plain again": lambda: fit(Plain(student), [], batch, steps),
            "teacher's step": lambda: fit(Plain(teacher), [], batch, steps),
            "teacher's forward": lambda: forward(timm.create_model(teacher), batch, steps),
            "online": lambda: fit(Plain(student), [OnlineDistillation(timm.create_model(teacher))], batch, steps),
            "frozen": lambda: fit(
                Plain(student), [Distillation(teacher_of(teacher)), First(losses, "frozen")], batch, steps
            ),
            "cached": lambda: fit(Plain(student), [Distillation(f"cache:{folder}")], batch, steps),
        }

        if others:
            more = {
                "ModelOpt": lambda: fit(WithModelOpt(student, teacher), [First(losses, "ModelOpt")], batch, steps),
                "torchdistill": lambda: torchdistill(student, teacher, batch, steps, losses),
            }
            for name, module in {"ModelOpt": "modelopt.torch.distill", "torchdistill": "torchdistill"}.items():
                try:
                    importlib.import_module(module)
                    work[name] = more[name]
                except ImportError as error:
                    print(f"{name}: not measured, {error}")

        def run(name):
            found[name] = work[name]()

        turns = {name: greenlet.greenlet(run) for name in work}
        order = list(work)
        for _ in range(steps):
            random.shuffle(order)
            for name in order:
                turns[name].switch(*() if turns[name] else (name,))
        for name in work:
            turns[name].switch()
    if others:
        print("first loss: " + ", ".join(f"{name} {value:.6f}" for name, value in losses.items()))
    return {name: seconds[WARM_UP : WARM_UP + rounds] for name, seconds in found.items()}


def peak(fused, tokens, width, vocabulary, queue):
    """High-water mark of one loss with its gradients above where it began, in MiB."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    hidden, theirs = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    head, other = (torch.randn(vocabulary, width, generator=generator) / width**0.5 for _ in range(2))
    hidden.requires_grad_()
    head.requires_grad_()
    head.grad, hidden.grad = torch.zeros_like(head), torch.zeros_like(hidden)  # training has these anyway

    def resident(field):
        return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before = resident("VmRSS")
    if fused:
        value = fused_linear_divergence(hidden, head, theirs, other, kind="jsd", beta=0.5)
    else:
        value = create("gkd")(hidden @ head.T, theirs @ other.T)
    value.backward()
    queue.put((resident("VmHWM") - before, value.item()))


def memory(tokens, width, vocabulary):
    """Peak MiB and value of both forms."""
    found = {}
    for name, fused in (("materialised", False), ("fused", True)):
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=peak, args=(fused, tokens, width, vocabulary, queue))
        process.start()
        found[name] = queue.get()
        process.join()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="vit_tiny_patch16_224")
    parser.add_argument("--teacher", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--others", action="store_true", help="ModelOpt and torchdistill too")
    parser.add_argument("--only", choices=["time", "memory"])
    parser.add_argument("--json", default=None)
    arguments = parser.parse_args()
    quiet()
    record = vars(arguments).copy()
    if arguments.only != "memory":
        found = side_by_side(arguments.student, arguments.teacher, arguments.batch, arguments.rounds, arguments.others)
        against = {
            "plain again": [found["plain"]],
            "online": [found["plain"], found["teacher's step"]],
            "frozen": [found["plain"], found["teacher's forward"]],
            "cached": [found["plain"]],
            **{name: [found["plain"], found["teacher's forward"]] for name in ("ModelOpt", "torchdistill")},
        }
        against = {name: parts for name, parts in against.items() if name in found}
        for name, parts in against.items():
            ratios = [own / sum(others) for own, *others in zip(found[name], *parts, strict=True)]
            low, high = interval(ratios)
            record[name] = {"ratio": statistics.median(ratios), "interval": (low, high)}
            seconds = statistics.median(found[name])
            print(f"{name:12} {seconds:.3f} s  x{statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]", flush=True)
    if arguments.only != "time":
        peaks = memory(arguments.tokens, arguments.width, arguments.vocabulary)
        share = peaks["fused"][0] / peaks["materialised"][0]
        record["memory"] = {**{k: v[0] for k, v in peaks.items()}, "share": share}
        (fused, value), (whole, same) = peaks["fused"], peaks["materialised"]
        print(
            f"memory       {fused:.0f} of {whole:.0f} MiB: {share:.1%}; values {value:.6f} and {same:.6f}", flush=True
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
