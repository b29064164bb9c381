"""Text that the student writes itself, for the teacher to judge."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lossplug.distillation.divergences import forward_kl
from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses.checks import check_number, upcast
from lightning_lossplug.surgery.modes import evaluating

WHERE = "on_policy"
IGNORED = -100


@dataclass(frozen=True)
class OnPolicy:
    """How often, and how, a language model learns from completions it samples itself (GKD, arXiv 2306.13649).

    Args:
        fraction: Probability in [0, 1] that a step uses the student's own completions of the batch's prompts.
        max_new_tokens: Length of a completion at most.
        temperature: Of the sampling, > 0; that of the loss is the loss's.
        top_k: Sample among so many tokens; 0: among all.
        prompt_tokens: The prompt is the first so many tokens of each row; None: the tokens before the first label
            that is not -100.
        seq_kd: In the other steps the teacher writes the completions, instead of the batch's own.
        corrections: How often a completion is corrected (MGSR, arXiv 2407.10068): where the two models' top tokens
            differ and the divergence is largest, the teacher's token is put and the rest is sampled anew.
        adaptive: Off-policy learning as in DistiLLM (arXiv 2402.03898): starts with the batch's text; whenever the
            validation loss got worse by ``tolerance`` completions are used more often, by 0.1; they are kept and used
            again. ``fraction`` is not read then.
        monitor: The metric of ``adaptive``.
        tolerance: Of that metric, >= 0.
        buffer: Completions kept for ``adaptive``.
        seed: Of the choice of steps; the sampling itself draws from the global generator.
    """

    fraction: float = 0.5
    max_new_tokens: int = 128
    temperature: float = 0.9
    top_k: int = 0
    prompt_tokens: int | None = None
    seq_kd: bool = False
    corrections: int = 0
    adaptive: bool = False
    monitor: str = "val_loss"
    tolerance: float = 0.1
    buffer: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(WHERE, "fraction", self.fraction, least=0, most=1)
        check_number(WHERE, "temperature", self.temperature, above=0)
        check_number(WHERE, "tolerance", self.tolerance, least=0)
        for name, least in {"max_new_tokens": 1, "top_k": 0, "corrections": 0, "buffer": 1}.items():
            check_number(WHERE, name, getattr(self, name), least=least)
        if self.prompt_tokens is not None:
            check_number(WHERE, "prompt_tokens", self.prompt_tokens, least=1)


@dataclass
class Sampler:
    """Decides, step by step, whose text a batch holds; its state goes into checkpoints.

    Args:
        how: The settings.
    """

    how: OnPolicy
    threshold: float = 0.0  # of adaptive
    previous: float | None = None
    draws: int = 0
    kept: list[tuple[list[int], int]] = field(default_factory=list)  # tokens, and how many of them are the prompt

    def choose(self, done: float) -> str:
        """Returns whose text comes next: ``student``, ``replay``, ``teacher`` or ``data``.

        Args:
            done: Fraction of the run.
        """
        draw = random.Random(self.how.seed * 1_000_003 + self.draws).random()
        self.draws += 1
        if self.how.adaptive:
            fresh = draw < self.threshold * (1 - done) or len(self.kept) < self.how.buffer
            if draw < self.threshold:
                return "student" if fresh else "replay"
        elif draw < self.how.fraction:
            return "student"
        return "teacher" if self.how.seq_kd else "data"

    def validated(self, value: float) -> None:
        """Takes the validation metric: worse by the tolerance means more of the student's own text."""
        if self.previous is not None and value >= self.previous + self.how.tolerance:
            self.threshold = min(1.0, self.threshold + 0.1)
        self.previous = value

    def keep(self, batch: dict[str, Tensor]) -> None:
        """Puts completions into the buffer, the oldest out."""
        for row, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            tokens, new = row[mask.bool()].tolist(), int((labels != IGNORED).sum())
            self.kept.append((tokens, len(tokens) - new))
        del self.kept[: -self.how.buffer]

    def replay(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        """Returns completions drawn from the buffer."""
        drawn = random.Random(self.how.seed * 1_000_003 + 500_000_009 + self.draws)
        return pack([self.kept[drawn.randrange(len(self.kept))] for _ in range(rows)], device)

    def state_dict(self) -> dict[str, Any]:
        """In plain types."""
        return {"threshold": self.threshold, "previous": self.previous, "draws": self.draws, "kept": list(self.kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.threshold, self.previous, self.draws = state["threshold"], state["previous"], state["draws"]
        self.kept = [(list(tokens), int(prompt)) for tokens, prompt in state["kept"]]


def pack(rows: list[tuple[list[int], int]], device: torch.device) -> dict[str, Tensor]:
    """Returns a batch, padded on the right with 0s that no mask counts, of (tokens, length of the prompt)."""
    longest = max(len(tokens) for tokens, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, (tokens, prompt) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        labels[i, prompt : len(tokens)] = ids[i, prompt : len(tokens)]
    return {k: v.to(device) for k, v in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()}


def prompts(batch: Any, how: OnPolicy) -> list[list[int]]:
    """Returns the prompt of each row of a batch.

    Raises:
        LossplugError: The batch is no mapping with ``input_ids``, or a row has no prompt.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise LossplugError(
            f"the batch ({type(batch).__name__}) has no 'input_ids'",
            where=WHERE,
            remedy="Give batches as transformers' collators make them: input_ids, attention_mask, labels",
        )
    ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    found = []
    for i, row in enumerate(ids):
        held = torch.ones_like(row, dtype=torch.bool) if mask is None else mask[i].bool()
        if how.prompt_tokens is not None:
            tokens = row[held][: how.prompt_tokens]
        else:
            wanted = torch.nonzero(labels[i] != IGNORED).flatten() if labels is not None else row.new_zeros(1)
            end = int(wanted[0]) if len(wanted) else len(row)
            tokens = row[:end][held[:end]]
        if not len(tokens):
            raise LossplugError(
                "a row of the batch has no prompt: no token before its first label",
                where=WHERE,
                remedy="Set the labels of the prompts to -100, or say OnPolicy(prompt_tokens=N)",
            )
        found.append(tokens.tolist())
    return found


@torch.no_grad()
def complete(network: nn.Module, begun: list[list[int]], how: OnPolicy, device: torch.device) -> list[list[int]]:
    """Returns the begun texts with what a Hugging Face model samples behind them, up to the end token.

    Raises:
        LossplugError: The network can't generate.
    """
    model: Any = network
    if not callable(getattr(model, "generate", None)):
        raise LossplugError(
            f"{type(network).__name__} has no generate()",
            where=WHERE,
            remedy="Name the Hugging Face model with student='PATH'",
        )
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = getattr(settings, "pad_token_id", None)
    pad = (ends or [0])[0] if pad is None else pad
    longest = max(len(tokens) for tokens in begun)
    ids = torch.full((len(begun), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(begun):  # padded on the left, where generation wants it
        ids[i, longest - len(tokens) :] = torch.tensor(tokens)
        mask[i, longest - len(tokens) :] = 1
    with evaluating(model):
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=how.max_new_tokens,
            do_sample=True,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=1.0,
            pad_token_id=pad,
            use_cache=True,
        )
    done = []
    for tokens, row in zip(begun, out[:, longest:].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        done.append([*tokens, *row[:end]])
    return done


def correction_position(z_s: Tensor, z_t: Tensor, mask: Tensor) -> Tensor:
    """Returns the position [N] in each row where top tokens differ and KL(teacher, student) is largest; -1: nowhere.

    Args:
        z_s: Logits [N, L, V] of the student.
        z_t: Logits of the teacher.
        mask: Positions that may be corrected, bool [N, L].
    """
    rows = forward_kl(upcast(z_s).flatten(0, 1), upcast(z_t).flatten(0, 1)).view(mask.shape)
    differ = mask & (z_s.argmax(dim=-1) != z_t.argmax(dim=-1))
    best = rows.masked_fill(~differ, -1.0).argmax(dim=1)
    return torch.where(differ.any(dim=1), best, torch.full_like(best, -1))


@torch.no_grad()
def corrected(
    student: nn.Module, teacher: nn.Module, rows: list[tuple[list[int], int]], how: OnPolicy, device: torch.device
) -> list[tuple[list[int], int]]:
    """Returns completions after one correction each; those that need none stay."""
    batch = pack(rows, device)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with evaluating(student):
        z_s, z_t = (network(**inputs).logits[:, :-1] for network in (student, teacher))
    at = correction_position(z_s, z_t, (batch["labels"] != IGNORED)[:, 1:]).tolist()
    todo = [i for i, position in enumerate(at) if position >= 0]
    if not todo:
        return rows
    # logits at a position predict the token behind it
    begun = [[*rows[i][0][: at[i] + 1], int(z_t[i, at[i]].argmax())] for i in todo]
    mended = list(rows)
    for i, tokens in zip(todo, complete(student, begun, how, device), strict=True):
        limit = rows[i][1] + how.max_new_tokens
        mended[i] = (tokens[:limit], rows[i][1])
    return mended


def write(
    sampler: Sampler, source: str, student: nn.Module, teacher: nn.Module | None, batch: Any
) -> dict[str, Tensor]:
    """Returns a batch of completions of the prompts of another batch; labels are -100 except on what was written.

    Args:
        sampler: The settings and the buffer.
        source: ``student``, ``replay`` or ``teacher``.
        student: A Hugging Face model.
        teacher: The same, for ``teacher`` and for corrections.
        batch: Where the prompts are.

    Raises:
        LossplugError: There are no prompts, or a model can't generate.
    """
    how = sampler.how
    begun, device = prompts(batch, how), batch["input_ids"].device
    if source == "replay":
        return sampler.replay(len(begun), device)
    writer = student if source == "student" or teacher is None else teacher
    rows = [(tokens, len(prompt)) for prompt, tokens in zip(begun, complete(writer, begun, how, device), strict=True)]
    if source == "student" and teacher is not None:
        for _ in range(how.corrections):
            rows = corrected(student, teacher, rows, how, device)
    made = pack(rows, device)
    if source == "student" and how.adaptive:
        sampler.keep(made)
    return made
