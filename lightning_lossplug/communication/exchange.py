"""Compressed exchange of gradients between processes, and the DDP communication hook on top of it."""

# No "from __future__ import annotations": DDP compares the annotations of a hook with its own types.
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lossplug.communication.base import Compressor, Draw, Message
from lightning_lossplug.communication.rules import ErrorFeedback, State
from lightning_lossplug.communication.sparse import Identity
from lightning_lossplug.errors import LossplugError

RESYNC_EVERY = 1000  # steps between two broadcasts of what is equal on all ranks anyway


@dataclass
class _Job:
    """One compressed gradient on its way."""

    name: str
    gradient: Tensor
    state: State
    target: Tensor
    own: Tensor
    compressor: Compressor
    message: Message
    draw: Draw


class GradientExchange:
    """Replaces gradients by the estimate of their mean over all ranks, with few bytes; one per training run.

    State is kept per parameter name, never per bucket, because DDP lays its buckets out anew after the first step. The
    messages of one call travel in at most two collectives: values on a common support in one all-reduce, all else as
    bytes in one all-gather, summed in rank order so that every rank gets the same bits. They are waited for, so that
    they do not overlap with the backward pass.

    If a gradient of any rank is not finite, the whole step leaves the state of every rank as it was, and the gradients
    of that call become NaN on all ranks, for a gradient scaler or a guard to see.

    Args:
        rule: Error feedback.
        compressor: Contractive compressor.
        parameters: Names and parameters of the model.
        min_numel: Smaller tensors travel uncompressed, as do those whose message would be longer than themselves.
        seed: Of random compressors, equal on all ranks.

    Raises:
        LossplugError: The compressor doesn't suit the rule.
    """

    def __init__(
        self,
        rule: ErrorFeedback,
        compressor: Compressor,
        parameters: Iterable[tuple[str, nn.Parameter]],
        min_numel: int = 1024,
        seed: int = 0,
    ) -> None:
        rule.check(compressor)
        self.rule, self.compressor, self.min_numel, self.seed = rule, compressor, min_numel, seed
        self.parameters = dict(parameters)
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.states: dict[str, State] = {}
        self.step = 0
        self.skipped = 0  # steps with a gradient that was not finite
        self.bytes_sent = 0  # by this rank, handed to collectives
        self.bytes_dense = 0  # what an uncompressed all-reduce would have been handed
        self.relative_error: Tensor | None = None  # of the last step's messages of this rank
        self._begin()

    def _begin(self) -> None:
        self._pending: dict[str, State] = {}
        self._broken: list[Tensor] = []
        self._dropped: list[Tensor] = []
        self._wanted: list[Tensor] = []

    def compresses(self, gradient: Tensor) -> bool:
        """Returns whether a tensor of this shape is compressed."""
        size = torch.promote_types(gradient.dtype, torch.float32).itemsize
        return (
            gradient.numel() >= self.min_numel
            and self.compressor.message_bytes(gradient.shape, size) <= gradient.numel() * size
        )

    def bucket(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], first: bool, last: bool) -> None:
        """Exchanges the gradients of one bucket and overwrites them; the state moves with the last bucket of a step."""
        if first:
            self._begin()  # what a step that ended in an exception left
        names = [self.names[id(parameter)] for parameter in parameters]
        self.exchange(dict(zip(names, gradients, strict=True)))
        if last:
            self.commit()

    @torch.no_grad()
    def exchange(self, gradients: dict[str, Tensor]) -> None:
        """Overwrites gradients by the estimate of their mean; :meth:`commit` ends the step."""
        if any(gradient.is_sparse for gradient in gradients.values()):
            raise LossplugError(
                "a gradient is a sparse tensor", where=self.rule.name, remedy="Use nn.Embedding(sparse=False)"
            )
        ranks, rank = dist.get_world_size(), dist.get_rank()
        weights = self.rule.weights(ranks, self.step)
        dtype = torch.promote_types(next(iter(gradients.values())).dtype, torch.float32)
        broken = torch.stack([~gradient.isfinite().all() for gradient in gradients.values()]).any()
        summed: list[Tensor] = []
        jobs: list[_Job] = []
        for name, gradient in gradients.items():
            clean = torch.where(broken, 0.0, gradient.to(dtype)).contiguous()  # gloo takes nothing else
            compressed = self.compresses(gradient)
            if compressed or self.rule.everywhere:
                job = self._prepare(name, clean, self.compressor if compressed else Identity(), weights[rank])
                jobs.append(job)
                if job.compressor.reducible:
                    summed.append(job.message[0] * weights[rank])
            else:
                summed.append(clean.flatten() / ranks)
        total = torch.cat([*summed, broken.to(dtype)[None]])
        parts = [_bytes(part) for job in jobs if not job.compressor.reducible for part in job.message]
        self.bytes_sent += total.nbytes + sum(part.numel() for part in parts)
        self.bytes_dense += sum(gradient.nbytes for gradient in gradients.values())
        dist.all_reduce(total)
        gathered = _all_gather(torch.cat(parts), ranks) if parts else []
        self._broken.append(total[-1])
        lost = torch.where(total[-1] > 0, torch.nan, 0.0)
        at = offset = 0
        by_name = {job.name: job for job in jobs}
        for name, gradient in gradients.items():
            found = by_name.get(name)
            if found is None:
                estimate, at = total[at : at + gradient.numel()].reshape(gradient.shape), at + gradient.numel()
            else:
                if found.compressor.reducible:
                    end = at + found.message[0].numel()
                    mean = found.compressor.decode((total[at:end],), found.target, found.draw)
                    at = end
                else:
                    mean, offset = self._mean(found, gathered, weights, offset)
                estimate, self._pending[name] = self.rule.apply(
                    found.state, found.gradient, found.target, found.own, mean, weights[rank], ranks
                )
                self._dropped.append((found.target - found.own).square().sum())
                self._wanted.append(found.target.square().sum())
            gradient.copy_(estimate + lost)

    def _prepare(self, name: str, gradient: Tensor, compressor: Compressor, weight: float) -> _Job:
        compressor, state = self.rule.begin(self.states.get(name), gradient, compressor)
        target = self.rule.target(state, gradient, compressor, weight, dist.get_world_size())
        draw = Draw(self.seed, self.step, name, dist.get_rank())
        message = compressor.encode(target, draw)
        own = compressor.decode(message, target, draw)
        return _Job(name, gradient, state, target, own, compressor, message, draw)

    def _mean(self, job: _Job, gathered: list[Tensor], weights: list[float], offset: int) -> tuple[Tensor, int]:
        mean = torch.zeros_like(job.target)
        end = offset
        for rank, received in enumerate(gathered):
            end, message = offset, []
            for part in job.message:
                size = part.nbytes
                message.append(received[end : end + size].clone().view(part.dtype).reshape(part.shape))
                end += size
            draw = Draw(job.draw.seed, job.draw.step, job.draw.name, rank)
            mean += weights[rank] * job.compressor.decode(tuple(message), job.target, draw)
        return mean, end

    def commit(self) -> None:
        """Ends a step: takes the new states over, unless a gradient of some rank was not finite."""
        if bool(torch.stack(self._broken).sum() > 0):
            self.skipped += 1
        else:
            self.states.update(self._pending)
            if self._wanted:
                wanted = torch.stack(self._wanted).sum()
                dropped = torch.stack(self._dropped).sum()
                self.relative_error = torch.where(wanted > 0, dropped / wanted, 0.0).sqrt()
        self.step += 1
        self._begin()
        if self.step % RESYNC_EVERY == 0:
            for name in sorted(self.states):
                for key in self.rule.shared:
                    dist.broadcast(self.states[name][key], 0)

    def logs(self) -> dict[str, float | Tensor]:
        """Returns bytes so far, their share of uncompressed ones, skipped steps, and what the last messages missed.

        ``relative_error`` is the norm of what this rank's compressor dropped over the norm of what it was given.
        """
        values: dict[str, float | Tensor] = {
            "bytes_sent": float(self.bytes_sent),
            "share_of_dense": self.bytes_sent / max(1, self.bytes_dense),
            "skipped_steps": float(self.skipped),
        }
        return values if self.relative_error is None else {**values, "relative_error": self.relative_error}

    def adopt(self, other: "GradientExchange") -> None:
        """Goes on where another exchange of the same run stopped."""
        for key in ("states", "step", "skipped", "bytes_sent", "bytes_dense", "relative_error"):
            setattr(self, key, getattr(other, key))

    def gather_state(self) -> dict[str, Any]:
        """Returns the states of all ranks on rank 0, on the CPU; a collective call. Others get the shared part."""
        ranks, rank = dist.get_world_size(), dist.get_rank()
        tensors: dict[str, dict[str, list[Tensor]]] = {}
        for name in sorted(self.states):
            kept: dict[str, list[Tensor]] = {}
            for key in self.rule.local:
                mine = self.states[name][key].contiguous()
                into = [torch.empty_like(mine) for _ in range(ranks)] if rank == 0 else None
                dist.gather(mine, into, 0)
                kept[key] = [tensor.cpu() for tensor in into or []]
            for key in self.rule.shared:
                kept[key] = [self.states[name][key].cpu().clone()]
            tensors[name] = kept
        return {
            "rule": self.rule.name,
            "ranks": ranks,
            "step": self.step,
            "skipped": self.skipped,
            "bytes_sent": self.bytes_sent,
            "bytes_dense": self.bytes_dense,
            "tensors": tensors,
        }

    def load_state(self, saved: dict[str, Any]) -> bool:
        """Restores :meth:`gather_state` of rank 0.

        Returns:
            Whether the number of ranks is the one that saved it. If not, what is local to a rank starts again from what
            all ranks share.

        Raises:
            LossplugError: Another rule, or a tensor that the model doesn't have in this shape.
        """
        if saved["rule"] != self.rule.name:
            raise LossplugError(
                f"the checkpoint holds the state of {saved['rule']!r}, the run uses {self.rule.name!r}",
                where="GradientExchange",
                remedy=f"Resume with rule={saved['rule']!r}, or start from the weights alone",
            )
        same = saved["ranks"] == dist.get_world_size()
        states = {}
        for name, kept in saved["tensors"].items():
            parameter = self.parameters.get(name)
            shapes = {tuple(tensor.shape) for tensors in kept.values() for tensor in tensors}
            if parameter is None or any(shape != tuple(parameter.shape) for shape in shapes):
                there = "no such parameter" if parameter is None else f"a parameter of shape {tuple(parameter.shape)}"
                raise LossplugError(
                    f"the checkpoint holds a state of shape {next(iter(shapes), ())}, the model has {there}", where=name
                )
            shared = {key: kept[key][0].to(parameter.device) for key in self.rule.shared}
            if same:
                mine = {key: kept[key][dist.get_rank()].to(parameter.device) for key in self.rule.local}
                states[name] = {**mine, **shared}
            elif shared:
                states[name] = self.rule.restart(shared)
        self.states = states
        for key in ("step", "skipped", "bytes_sent", "bytes_dense"):
            setattr(self, key, saved[key])
        return same

    def notes(self, ranks: int) -> list[str]:
        """Returns what a person should know before the run: tensors taken, more traffic than without, a large eta.

        With n ranks a gathered message is received n - 1 times, while a ring all-reduce moves each value about twice.
        """
        taken = [p for p in self.parameters.values() if p.requires_grad and self.compresses(p)]
        if not taken:
            return [f"no tensor is compressed: none has {self.min_numel} elements or more and a shorter message"]
        sizes = [torch.promote_types(p.dtype, torch.float32).itemsize for p in taken]
        sent = sum(self.compressor.message_bytes(p.shape, s) for p, s in zip(taken, sizes, strict=True))
        dense = sum(p.nbytes for p in taken)
        found = [f"{len(taken)} tensors are compressed, {sent} bytes of {dense} per step ({sent / dense:.2%})"]
        ring = 2 * (ranks - 1) / ranks * dense
        if not self.compressor.reducible and (ranks - 1) * sent > ring:
            found.append(
                f"with {ranks} ranks each receives {(ranks - 1) * sent} bytes per step, an uncompressed all-reduce "
                f"about {int(ring)}: compress more"
            )
        return found + self.rule.notes(self.compressor, max(p.numel() for p in taken))


def _bytes(part: Tensor) -> Tensor:
    return part.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _all_gather(mine: Tensor, ranks: int) -> list[Tensor]:
    received = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(received, mine)
    return received


def compression_hook(state: GradientExchange, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The DDP communication hook: ``model.register_comm_hook(GradientExchange(...), compression_hook)``.

    It is called on synchronising backward passes only, so that gradient accumulation with ``no_sync`` hands it the
    accumulated gradient.
    """
    state.bucket(bucket.gradients(), bucket.parameters(), bucket.index() == 0, bucket.is_last())
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
