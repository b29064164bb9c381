"""One of every callback, as tests of all of them use it."""

import torch
from torch import nn

from lightning_lossplug.callbacks import (
    QAT,
    SAM,
    ActivationDensity,
    Distillation,
    DistillationReport,
    ExactResume,
    GradientAdaptiveQAT,
    KVChannelShrink,
    NMSparsity,
    OnlineDistillation,
    SelfDistillation,
    SparsityHealth,
    StepTrace,
    SwapLoss,
)


def teacher():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))


CALLBACKS = {
    "SwapLoss": lambda: SwapLoss("focal"),
    "NMSparsity": lambda: NMSparsity(2, 4, "mdgf_linear"),
    "SparsityHealth": lambda: SparsityHealth(plot=False),
    "ActivationDensity": lambda: ActivationDensity(),
    "QAT": lambda: QAT(4, 8),
    "GradientAdaptiveQAT": lambda: GradientAdaptiveQAT(4, 8),
    "OnlineDistillation": lambda: OnlineDistillation(teacher(), "bdkd"),
    "Distillation": lambda: Distillation(teacher()),
    "SelfDistillation": lambda: SelfDistillation(),
    "DistillationReport": lambda: DistillationReport(on="train", plot=False),
    "SAM": lambda: SAM(),
    "StepTrace": lambda: StepTrace(),
    "ExactResume": lambda: ExactResume(),
}
LANGUAGE = {"KVChannelShrink": lambda: KVChannelShrink(0.5, 0.5, calib_batches=2, window=2, sinks=1)}
WATCHED = {  # what a callback that only looks needs beside it
    "SparsityHealth": lambda: NMSparsity(2, 4, "nm_srste"),
    "DistillationReport": lambda: Distillation(teacher()),
}


def run_of(name):
    """The callbacks of a run with one of ``CALLBACKS``."""
    watched = [WATCHED[name]()] if name in WATCHED else []
    return [*watched, CALLBACKS[name]()]
