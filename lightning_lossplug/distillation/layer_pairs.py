"""Which layer of the teacher teaches which of the student, by depth."""

from __future__ import annotations

from torch import nn

from lightning_lossplug.distillation.distilbert import spaced_layers
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number


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
        # the first of count + 1 evenly spaced depths is the input, which no block gives
        places = [max(1, depth) - 1 for depth in spaced_layers(len(blocks) + 1, count + 1)[1:]]
        chosen.append([blocks[i] for i in places])
    return dict(zip(*chosen, strict=True))
