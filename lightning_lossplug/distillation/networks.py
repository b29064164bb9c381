"""Teachers as plain networks outside the student: frozen, averaged, kept the same on all processes."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.surgery.chain import wrapped_methods


def freeze(network: nn.Module) -> list[nn.Parameter]:
    """Puts a network in eval mode without gradients; returns the parameters that had them, to give them back.

    Raises:
        LossplugError: A part of it stays in training mode.
    """
    had = [p for p in network.parameters() if p.requires_grad]
    for p in had:
        p.requires_grad_(False)
    to_eval(network)
    return had


def to_eval(network: nn.Module) -> None:
    """Puts every part of a network in eval mode.

    Raises:
        LossplugError: A part of it stays in training mode.
    """
    network.eval()
    stuck = [name or type(module).__name__ for name, module in network.named_modules() if module.training]
    if stuck:
        raise LossplugError(
            f"{stuck[0]} of the teacher stays in training mode after eval()",
            remedy="Its train() or eval() is overridden: a frozen teacher has to be in eval mode",
        )


def fingerprint(network: nn.Module) -> str:
    """Returns class, number of parameters and a hash of up to eight tensors: tells one teacher from another."""
    tensors = [t for t in network.state_dict().values() if isinstance(t, Tensor) and t.numel()]
    chosen = tensors[:: max(1, len(tensors) // 8)][:8]
    digest = hashlib.sha256()
    for t in chosen:
        digest.update(t.detach().flatten()[:1024].to("cpu", torch.float64).numpy().tobytes())
    size = sum(p.numel() for p in network.parameters())
    return f"{type(network).__name__} {size} {digest.hexdigest()[:16]}"


def check_apart(student: nn.Module, teachers: Iterable[nn.Module], where: str) -> None:
    """Raises when a teacher shares a parameter with the student or with another teacher.

    Raises:
        LossplugError: It does.
    """
    seen = {id(p) for p in student.parameters()}
    for teacher in teachers:
        mine = {id(p) for p in teacher.parameters()}
        if mine & seen:
            raise LossplugError(
                f"the teacher ({type(teacher).__name__}) shares parameters with the student or another teacher",
                where=where,
                remedy="Give it weights of its own: copy.deepcopy(network)",
            )
        seen |= mine


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Tells whether two networks have the same parameters, name by name and bit by bit."""
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    if not ours or ours.keys() != theirs.keys():
        return False
    return all(p.shape == theirs[k].shape and torch.equal(p.cpu(), theirs[k].cpu()) for k, p in ours.items())


def plain_copy(network: nn.Module) -> nn.Module:
    """Returns a deep copy without the methods that techniques have wrapped (they would call the original)."""
    twin = copy.deepcopy(network)
    for name, module in network.named_modules():
        for method in wrapped_methods(module):
            vars(twin.get_submodule(name)).pop(method, None)
    return twin


@torch.no_grad()
def average_into(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Moves the teacher's parameters: ``decay`` of themselves, the rest of the student's; buffers are copied."""
    for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        mine.lerp_(theirs.to(mine), 1 - decay)
    for buffer, live in zip(teacher.buffers(), student.buffers(), strict=True):
        buffer.copy_(live)
    share(teacher.buffers())


def several_processes() -> bool:
    """Tells whether training runs on several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def share(tensors: Iterable[Tensor]) -> None:
    """Gives every process the tensors of the first."""
    if several_processes():
        for t in tensors:
            dist.broadcast(t, 0)


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Averages gradients over the processes; a parameter without one anywhere stays without."""
    if not several_processes() or not parameters:
        return
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    dist.all_reduce(present)
    waiting = []
    for p, count in zip(parameters, present.tolist(), strict=True):
        if count:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            waiting.append(dist.all_reduce(p.grad, async_op=True))
    for work in waiting:
        work.wait()
    for p in parameters:
        if p.grad is not None:
            p.grad.div_(dist.get_world_size())
