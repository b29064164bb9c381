"""Plain text in blocks of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.data.module import BatchedDataModule


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Consecutive blocks of a token sequence; ``labels`` are the ``input_ids``, as transformers expects.

    Args:
        tokens: Token ids, shape ``[tokens]``; an incomplete last block is left out.
        block_size: Tokens per block.
    """

    def __init__(self, tokens: Tensor, block_size: int) -> None:
        count = len(tokens) // block_size
        self.blocks = tokens[: count * block_size].reshape(count, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Returns a finished batch of two int64 ``[B, block_size]``."""
        blocks = self.blocks[torch.tensor(indices)].long()
        return {"input_ids": blocks, "labels": blocks.clone()}


class TextData(BatchedDataModule):
    """Texts for a causal language model: the first part for training, the tail for validation and test.

    The documents (files, or the chapters of the default text) are put one after the other and cut twice; with several
    documents each cut is moved to the nearest document boundary. No block reaches across a cut. A batch is a dict with
    ``input_ids`` and ``labels``, int64 ``[B, block_size]``.

    Args:
        tokenizer: ``bytes`` (256 ids, the UTF-8 bytes), a hub name, a local folder, a ``.gguf`` file, or a tokenizer
            object of transformers. The one that belongs to the model.
        files: Plain-text files (UTF-8), or null for the Python language reference that is embedded in CPython
            (``pydoc_data.topics``, about 465 kB).
        block_size: Tokens per sample.
        batch_size: Samples per process and batch.
        val_fraction: Part of the tokens for validation.
        test_fraction: Part of the tokens for the test, after the validation part.
        train_limit: Keep only so many training blocks, from the front.
        num_workers: Worker processes of each loader.
        seed: Seed of the order.

    Raises:
        LossplugError: In ``setup``: missing or unreadable files, no tokenizer, or a part shorter than one block.
    """

    def __init__(
        self,
        tokenizer: str | Any,
        files: list[str] | None = None,
        block_size: int = 256,
        batch_size: int = 2,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        train_limit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.save_hyperparameters(ignore=[] if isinstance(tokenizer, str) else ["tokenizer"], logger=False)
        if block_size < 2:
            raise LossplugError(f"block_size is {block_size}", where="TextData", remedy="Give at least 2")
        if min(val_fraction, test_fraction) <= 0 or val_fraction + test_fraction >= 1:
            raise LossplugError(
                f"val_fraction is {val_fraction} and test_fraction is {test_fraction}",
                where="TextData",
                remedy="Both have to be above 0, their sum below 1",
            )
        self.tokenizer, self.files, self.block_size = tokenizer, files, block_size
        self.val_fraction, self.test_fraction, self.train_limit = val_fraction, test_fraction, train_limit

    def setup(self, stage: str) -> None:
        """Reads, tokenises (once) and cuts the text."""
        if hasattr(self, "train_set"):
            return
        texts = default_documents() if self.files is None else [_read_text(Path(file)) for file in self.files]
        documents = tokenize(self.tokenizer, texts)
        train, val, test = cut(documents, [self.val_fraction, self.test_fraction])
        limit = None if self.train_limit is None else self.train_limit * self.block_size
        self.train_set = self._blocks("training", train[:limit])
        self.val_set = self._blocks("validation", val)
        self.test_set = self._blocks("test", test)

    def get_vocab(self) -> dict[str, int]:
        """Returns token -> id of the tokenizer; the 256 single bytes for ``bytes``."""
        if not isinstance(self.tokenizer, str):
            vocabulary: dict[str, int] = self.tokenizer.get_vocab()
            return vocabulary
        if self.tokenizer == "bytes":
            return {chr(byte): byte for byte in range(256)}
        from lightning_lossplug.integrations.pretrained import load_tokenizer

        return dict(load_tokenizer(self.tokenizer).get_vocab())

    def _blocks(self, part: str, tokens: Tensor) -> TokenBlocks:
        if len(tokens) < self.block_size:
            raise LossplugError(
                f"the {part} part has {len(tokens)} tokens, fewer than one block of {self.block_size}",
                where="TextData",
                remedy="Give more text, larger fractions or a smaller block_size",
            )
        return TokenBlocks(tokens, self.block_size)


def default_documents() -> list[str]:
    """Returns the chapters of Python's language reference that CPython ships for ``help()``, in alphabetical order."""
    from pydoc_data import topics

    return [text for _, text in sorted(topics.topics.items())]


def tokenize(tokenizer: str | Any, texts: list[str]) -> list[Tensor]:
    """Returns the token ids of each text, int32, and after them the end-of-text token; a newline for ``bytes``."""
    if isinstance(tokenizer, str) and tokenizer == "bytes":
        return [torch.tensor(list(f"{text}\n".encode()), dtype=torch.int32) for text in texts]
    if isinstance(tokenizer, str):
        from lightning_lossplug.integrations.pretrained import load_tokenizer

        tokenizer = load_tokenizer(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # verbose=False: the warning that a text is longer than the model's context does not apply, it is cut into blocks
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    return [torch.tensor([*part, *end], dtype=torch.int32) for part in ids]


def opening(tokenizer: str | Any) -> list[int]:
    """Returns the token that a tokenizer begins a text with, or nothing; models that know one need it badly."""
    if isinstance(tokenizer, str):
        if tokenizer == "bytes":
            return []
        from lightning_lossplug.integrations.pretrained import load_tokenizer

        tokenizer = load_tokenizer(tokenizer)
    ids = tokenizer("")["input_ids"][:1]
    return list(ids) if ids and ids[0] == tokenizer.bos_token_id else []


def cut(documents: list[Tensor], fractions: list[float]) -> list[Tensor]:
    """Cuts documents, put one after the other, into a first part and one part per fraction, the tail last.

    With several documents a cut goes to the document boundary nearest to it. Parts do not overlap and together are the
    whole sequence.

    Args:
        documents: Token ids, shape ``[tokens]`` each.
        fractions: Fraction of all tokens for each part after the first.

    Returns:
        ``1 + len(fractions)`` parts; one may be empty when the documents are few and unequal.
    """
    tokens = torch.cat(documents)
    cuts = [round(len(tokens) * (1.0 - sum(fractions[i:]))) for i in range(len(fractions))]
    if len(documents) > 1:
        boundaries = torch.tensor([len(document) for document in documents]).cumsum(0)
        cuts = [int(boundaries[(boundaries - position).abs().argmin()]) for position in cuts]
    return list(tokens.tensor_split(cuts))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        what, remedy = f"cannot be read ({error.strerror})", "Check TextData.files"
    except UnicodeDecodeError as error:
        what, remedy = f"is not UTF-8 text ({error.reason})", "Convert it"
    raise LossplugError(what, where=str(path), remedy=remedy)
