"""Number tokens from real tokenizers: byte-level BPE, SentencePiece, WordPiece, GGUF."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations import smollm2_path
from lightning_lossplug.losses import create
from lightning_lossplug.losses.number_values import attach_values, number_values, token_value

TEXT = [
    "the price is 3 and 42, not 1.5 or 7 or 80 69",
    "years 2024 2025 2024 2025 in 10 10 10 units",
    "0 1 2 3 4 5 6 7 8 9",
]


def bpe(split_digits):
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if split_digits
        else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, min_frequency=1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<pad>"]
    )
    tokenizer.train_from_iterator(TEXT * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def fixed(tokens, kind=models.WordLevel):
    tokenizer = Tokenizer(kind({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=tokens[0])


DIGITS = [str(d) for d in range(10)]


@pytest.mark.parametrize(
    ("token", "digit", "marked", "number"),
    [
        ("7", 7, 7, 7),
        ("Ġ7", None, 7, 7),
        ("▁7", None, 7, 7),
        ("##7", None, 7, 7),
        (" 7", None, 7, 7),
        ("42", None, None, 42),
        ("Ġ3.5", None, None, 3.5),
        ("-1", None, None, -1),
        ("1_0", None, None, None),
        ("٣", None, None, None),
        ("²", None, None, None),
        ("nan", None, None, None),
        ("inf", None, None, None),
        ("1e999", None, None, None),
        ("Ġ", None, None, None),
        ("7 ", None, None, None),
        ("", None, None, None),
        (b"7", 7, 7, 7),
    ],
)
def test_what_a_token_stands_for(token, digit, marked, number):
    found = token_value(token), token_value(token, markers=True), token_value(token, digit_level=False)
    for value, expected in zip(found, (digit, marked, number), strict=True):
        assert math.isnan(value) if expected is None else value == expected


def test_byte_level_bpe_digits_and_numbers():
    tokenizer = bpe(split_digits=True)
    table = number_values(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(DIGITS)
    assert table[ids].tolist() == list(range(10))
    assert int(table.isfinite().sum()) == 10
    encoded = tokenizer("is 42, 7")["input_ids"]
    assert table[encoded][table[encoded].isfinite()].tolist() == [4, 2, 7]
    whole = bpe(split_digits=False)
    numbers = number_values(whole, digit_level=False)
    spelled = [whole.decode([i]).strip() for i in numbers.isfinite().nonzero().flatten().tolist()]
    assert [float(text) for text in spelled] == numbers[numbers.isfinite()].tolist()
    assert {10.0, 2024.0, 2025.0} <= set(numbers.tolist())


def test_the_tokenizer_is_only_read():
    tokenizer = fixed(["<unk>", "a", *DIGITS[:5]])
    before = tokenizer.get_vocab(), len(tokenizer), tokenizer.backend_tokenizer.to_str()
    with pytest.raises(LossplugError, match="digits 5, 6, 7, 8, 9"):
        number_values(tokenizer)
    assert (tokenizer.get_vocab(), len(tokenizer), tokenizer.backend_tokenizer.to_str()) == before


@pytest.mark.parametrize("mark", ["▁", "Ġ", "##"])
def test_digits_with_markers(mark):
    tokens = ["<unk>", "a", *(mark + d for d in DIGITS)]
    with pytest.raises(LossplugError, match="markers=True"):
        number_values(fixed(tokens))
    assert number_values(fixed(tokens), markers=True)[2:].tolist() == list(range(10))
    both = fixed([*tokens, *DIGITS])
    assert int(number_values(both).isfinite().sum()) == 10
    assert int(number_values(both, markers=True).isfinite().sum()) == 20


def test_tokenizers_without_numbers_are_refused():
    plain = fixed(["<unk>", "a", "b"])
    with pytest.raises(LossplugError, match="no token for the digits 0, 1"):
        number_values(plain)
    with pytest.raises(LossplugError, match="is a number"):
        number_values(plain, digit_level=False)
    with pytest.raises(LossplugError, match="vocab_size"):
        number_values(fixed(["<unk>", *DIGITS]), vocab_size=5)


def test_table_of_a_padded_model_and_the_loss():
    tokenizer = bpe(split_digits=True)
    size = len(tokenizer) + 7
    loss = attach_values(create("number_token", weight=1.0), tokenizer, vocab_size=size)
    torch.manual_seed(0)
    y = torch.tensor([tokenizer("is 42, 7")["input_ids"]])
    z = torch.randn(*y.shape, size, requires_grad=True)
    value = loss(z, y)
    assert value > 0
    grad = torch.autograd.grad(value, z)[0]
    assert (grad[..., -7:] == 0).all()
    assert attach_values(create("dist2"), tokenizer, vocab_size=size)(z, y) > 0
    general = create("number_token", digit_level=False)
    attach_values(general, bpe(split_digits=False))
    assert int(general.values.isfinite().sum()) > 10
    with pytest.raises(LossplugError, match="tokens, the logits"):
        attach_values(create("number_token"), tokenizer)(z, y)


@pytest.mark.slow
def test_gguf_tokenizer():
    path = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    table = number_values(tokenizer, vocab_size=49152)
    assert table[tokenizer.convert_tokens_to_ids(DIGITS)].tolist() == list(range(10))
    assert int(table.isfinite().sum()) == 10
    ids = tokenizer("it costs 42.5")["input_ids"]
    assert table[ids][table[ids].isfinite()].tolist() == [4, 2, 5]
