"""Which layer of the teacher teaches which of the student: by name, by depth, or to be learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lossplug.distillation.distilbert import spaced_layers
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number

Layers = dict[str, str | list[str]] | int | str | None


def depth_places(student: int, teacher: int) -> list[int]:
    """Returns the teacher's layer, from 0, at the depth of each of the student's; the last are paired."""
    if student > teacher:
        return [max(1, round((i + 1) * teacher / student)) - 1 for i in range(student)]
    # the first of the evenly spaced depths is the input, which no layer gives
    return [max(1, depth) - 1 for depth in spaced_layers(teacher + 1, student + 1)[1:]]


def depth_prior(student: int, teacher: int, spread: float) -> Tensor:
    r"""Returns the log-weights [S, T] to begin with: a bell of width ``spread`` (a share of the depth) in each row.

    :math:`-\frac{1}{2}\left(\frac{j - j_i}{\sigma T}\right)^2`, normalised, with :math:`j_i` of :func:`depth_places`;
    for ``spread`` 0 all weight is there.
    """
    centre = torch.tensor(depth_places(student, teacher), dtype=torch.float64)
    apart = (torch.arange(teacher, dtype=torch.float64) - centre[:, None]) / teacher
    if spread == 0:
        return torch.where(apart == 0, 0.0, -torch.inf).to(torch.float64)
    return (-0.5 * (apart / spread).square()).log_softmax(dim=1)


def stack_of_blocks(network: nn.Module, who: str) -> list[str]:
    """Returns the paths of a network's blocks: the list of equal modules that holds most of its parameters.

    Raises:
        LossplugError: No list holds at least half of the parameters outside embeddings.
    """
    skipped = (nn.Embedding,)
    held = {id(p) for m in network.modules() if isinstance(m, skipped) for p in m.parameters()}
    total = sum(p.numel() for p in network.parameters() if id(p) not in held)
    best, found = 0, ""
    for name, module in network.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        if len({type(child) for child in module}) == 1:
            size = sum(p.numel() for p in module.parameters())
            if size > best:
                best, found = size, name
    if 2 * best < total or not best:
        raise LossplugError(
            f"{who} ({type(network).__name__}) has no single stack of blocks to count layers in",
            where="layers",
            remedy="Name the layers: layers={'student path': 'teacher path'}",
        )
    stack = network.get_submodule(found)
    return [f"{found}.{name}" if found else name for name, _ in stack.named_children()]


def pairs_by_depth(student: nn.Module, teacher: nn.Module, count: int) -> dict[str, str]:
    """Returns ``count`` pairs of blocks at equal depths, evenly spaced, the last blocks among them.

    Args:
        student: Network with one stack of blocks, as transformers are.
        teacher: The same.
        count: Number of pairs.

    Raises:
        LossplugError: A network without such a stack, or with fewer blocks.
    """
    check_number("layers", "the number of layers", count, least=1)
    chosen = []
    for network, who in ((student, "the student"), (teacher, "the teacher")):
        blocks = stack_of_blocks(network, who)
        if count > len(blocks):
            raise LossplugError(f"{who} has {len(blocks)} blocks, {count} pairs are asked for", where="layers")
        chosen.append([blocks[i] for i in depth_places(count, len(blocks))])
    return dict(zip(*chosen, strict=True))


class Pairing:
    """Which layers of two networks are compared: named, at equal depths, or all from which weights are learned.

    Args:
        layers: As in ``Distillation``.
        where: Who asks, for messages.

    Raises:
        LossplugError: Another word than ``learned``, or a layer without any to follow.
    """

    def __init__(self, layers: Layers, where: str) -> None:
        if isinstance(layers, str) and layers != "learned":
            raise LossplugError(
                f"layers is {layers!r}",
                where=where,
                remedy="Give {'student path': 'teacher path'}, a number or 'learned'",
            )
        self.layers = layers
        self.named = dict(layers) if isinstance(layers, dict) else {}
        self.learned = layers == "learned" or any(not isinstance(paths, str) for paths in self.named.values())
        for path, paths in self.named.items():
            if not paths:
                raise LossplugError(f"the student's {path!r} has no layer of the teacher to follow", where=where)
        self.student: list[str] = list(self.named)
        self.choices = [[paths] if isinstance(paths, str) else list(paths) for paths in self.named.values()]
        self.teacher: list[str] = [path for paths in self.choices for path in paths]
        if self.learned:
            self.teacher = list(dict.fromkeys(self.teacher))  # each is read once

    def find(self, student: nn.Module, teacher: nn.Module) -> None:
        """Finds the paths where they are not given.

        Raises:
            LossplugError: A network without a stack of blocks, or with too few.
        """
        if isinstance(self.layers, int):
            pairs = pairs_by_depth(student, teacher, self.layers)
            self.student, self.teacher = list(pairs), list(pairs.values())
        elif self.layers == "learned":
            self.student = stack_of_blocks(student, "the student")
            self.teacher = stack_of_blocks(teacher, "the teacher")

    def prior(self, spread: float) -> Tensor:
        """Returns the logarithms [S, T] of the weights to begin with: by depth, or equal among named layers."""
        if not self.named:
            return depth_prior(len(self.student), len(self.teacher), spread)
        given = torch.tensor([[float(path in paths) for path in self.teacher] for paths in self.choices])
        return (given / given.sum(dim=1, keepdim=True)).double().log()
