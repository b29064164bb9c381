"""Pass keys and key-value pairs: texts of the asked length, answers counted; pictures of a calibration."""

import pytest
import torch
from families import model_of
from test_kv_generate import FULL, HALF

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache import (
    RetrievalCase,
    key_value_case,
    passkey_case,
    plot_kv_factors,
    record_moments,
    retrieval_accuracy,
    shrink_kv,
)
from lightning_lossplug.kv_cache import fit_factors


class Letters:
    """A tokenizer of one token per letter, within the tiny models' 97."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}


@pytest.mark.parametrize("make", [passkey_case, key_value_case])
def test_length_depth_and_answer(make):
    tokenizer = Letters()
    for length, depth in ((400, 0.0), (777, 0.5), (1500, 1.0)):
        case = make(tokenizer, length, depth, seed=3)
        ids = case.input_ids[0].tolist()
        answer = ids[-case.answer :]
        assert case.prefill == length
        assert case.answer == (6 if make is passkey_case else 4)
        text = ids[:length]
        places = [i for i in range(length) if text[i : i + len(answer)] == answer]
        assert places, "the answer stands in the text"
        assert min(abs(p / length - depth) for p in places) < 0.3
        assert torch.equal(make(tokenizer, length, depth, seed=3).input_ids, case.input_ids)
    assert not torch.equal(make(tokenizer, 400, 0.5, seed=4).input_ids, make(tokenizer, 400, 0.5, seed=3).input_ids)
    with pytest.raises(LossplugError, match=r"depth is 1.5, allowed is \[0, 1\]"):
        make(tokenizer, 400, 1.5)
    with pytest.raises(LossplugError, match="length is 20, the fact takes"):
        make(tokenizer, 20)


def test_accuracy_counts_what_greedy_decoding_gives():
    model = model_of("llama")
    ids = model.generate(torch.arange(5, 25)[None], max_new_tokens=6, do_sample=False)
    right, wrong = RetrievalCase(ids, 15, 6), ids.clone()
    wrong[0, -1] = (wrong[0, -1] + 1) % 97
    cases = [right, RetrievalCase(wrong, 15, 6)]
    full = shrink_kv(model, [torch.arange(3, 93).view(2, 45)], FULL)
    for factors in (None, full):
        assert retrieval_accuracy(model, factors, cases) == {"exact": 0.5, "tokens": 11 / 12}
    with pytest.raises(LossplugError, match="there are no cases"):
        retrieval_accuracy(model, None, [])


def test_pictures(tmp_path):
    model = model_of("gemma3")
    recorder = record_moments(model, [torch.arange(3, 93).view(2, 45)])
    factors = fit_factors(model, recorder, HALF)
    for more in ({}, {"recorder": recorder}):
        assert plot_kv_factors(factors, tmp_path / "a.png", **more).stat().st_size > 1000
    with pytest.raises(LossplugError, match="can't be written"):
        plot_kv_factors(factors, tmp_path / "a.nothing")
