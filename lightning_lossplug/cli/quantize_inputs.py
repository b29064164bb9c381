"""What ``lossplug quantize`` works on: a language model and text, or a network and a data module."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_lossplug.cli.evaluate import parse_data
from lightning_lossplug.cli.shrink_kv import read_text
from lightning_lossplug.errors import LossplugError, require


@dataclass
class Source:
    """A model with its calibration batches.

    Args:
        model: In eval mode.
        batches: Arguments of the model.
        samples: What was taken for calibration, in words.
        measure: Metrics of a model on held-out data; None where nothing is to be evaluated.
        save_dense: Writes the folded model into a folder for its own library.
        build: How the model is built again, for the hint at the end.
    """

    model: Any
    batches: list[Any]
    samples: str
    measure: Callable[[Any], dict[str, float]] | None
    save_dense: Callable[[Any, Path], None]
    build: str


def from_text(options: Any) -> Source:
    """Loads a language model and cuts text into blocks.

    Raises:
        LossplugError: A model or text that can't be read, or too little text.
    """
    import torch

    from lightning_lossplug.integrations.data.text import tokenize
    from lightning_lossplug.integrations.pretrained import load_causal_lm, load_tokenizer

    texts = [read_text(path) for path in options.text]
    name = options.model.removeprefix("hf:")
    if name.partition(":")[0] in ("timm", "checkpoint", "artifact") or name.endswith(".ckpt"):
        raise LossplugError(
            "--text calibrates language models of transformers",
            where=options.model,
            remedy="Give --data NAME for another network, or for a checkpoint",
        )
    model = load_causal_lm(name, dtype=options.dtype).to(options.device).eval()
    tokenizer = load_tokenizer(name)
    tokens = torch.cat(tokenize(tokenizer, texts)).long().to(options.device)
    size = options.block_size
    held = (options.evaluate or 0) * size
    usable = min(options.tokens, max(len(tokens) - held, 0)) // size * size
    if not usable:
        raise LossplugError(
            f"the text has {len(tokens)} tokens, one block of {size} and {held} for the evaluation are needed",
            remedy="Give more text, or a smaller --block-size",
        )
    blocks = tokens[:usable].view(-1, size)
    batches = [{"input_ids": part, "use_cache": False} for part in blocks.split(options.batch_size)]
    test = tokens[len(tokens) - held :].view(-1, size)

    def save(folded: Any, folder: Path) -> None:
        folded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    measure = (lambda net: {"perplexity": perplexity(net, test)}) if held else None
    return Source(model, batches, f"{usable:,} tokens", measure, save, f'load_causal_lm("{name}")')


def perplexity(model: Any, blocks: Any) -> float:
    """Returns the perplexity over every token but the first of each block."""
    import torch

    total = 0.0
    with torch.no_grad():
        for block in blocks:
            ids = block[None]
            total += float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    return float(torch.tensor(total / len(blocks), dtype=torch.float64).exp())


def from_data(options: Any, data_arguments: list[str]) -> Source:
    """Loads a checkpoint or artifact, and takes calibration samples from the training split of a data module.

    Raises:
        LossplugError: Something that can't be read, or no batch.
    """
    import torch

    from lightning_lossplug.integrations.evaluation import is_language, load_subject, task_metrics
    from lightning_lossplug.integrations.network import library_of
    from lightning_lossplug.integrations.vision import images_and_labels
    from lightning_lossplug.quantization.post.walk import call

    sys.path.insert(0, str(Path.cwd()))  # the class of a training script in this folder
    try:
        data, subject = parse_data(data_arguments), load_subject(options.model)
    finally:
        sys.path.pop(0)
    model = subject.network.to(options.device)
    data.prepare_data()
    data.setup("fit")
    batches: list[Any] = []
    count = 0
    for batch in data.train_dataloader():
        language = is_language(batch)
        x = (batch["input_ids"] if language else images_and_labels(batch)[0])[: options.samples - count]
        x = x.to(options.device)
        batches.append({"input_ids": x, "use_cache": False} if language else x)
        count += len(x)
        if count >= options.samples:
            break
    if not batches:
        raise LossplugError("the training split has no batch", where=type(data).__name__)
    try:
        with torch.no_grad():
            call(model.eval(), batches[0])
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        what = f"the model can't compute a batch of {type(data).__name__}: {reason}"
        raise LossplugError(what, where=options.model) from error

    def measure(net: Any) -> dict[str, float]:
        data.setup("test")
        return task_metrics(net, islice(data.test_dataloader(), options.evaluate), options.device)

    def save(folded: Any, folder: Path) -> None:
        library = library_of(folded)
        if library == "timm":
            require("timm.models", "timm", "lossplug quantize --dense").save_for_hf(folded, str(folder))
        elif library == "transformers":
            folded.save_pretrained(folder)
        else:
            raise LossplugError(
                f"{type(folded).__name__} is of no library that loads folders", remedy="Leave --dense out"
            )

    kind, _, name = options.model.partition(":")
    build = f'timm.create_model("{name}")' if kind == "timm" else "network"
    return Source(model, batches, f"{count:,} samples", measure if options.evaluate else None, save, build)
