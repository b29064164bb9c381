"""Every two callbacks in one run: the same bits in either order of the list, or one line that refuses them."""

from itertools import combinations

import pytest
import torch
from callback_runs import Plain, assert_equal, data, make_trainer, state_of
from callback_table import CALLBACKS, LANGUAGE
from tiny_models import LLAMA, Wrapped
from tiny_moe import MoE
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import MoEBalancing
from lightning_lossplug.registry import registry

# MoEBalancing needs a model with routers (below), the other two need two processes (tests/faults/test_kill_matrix.py).
ELSEWHERE = {"MoEBalancing", "CompressedGradients", "LocalUpdates"}
REFUSED = {
    frozenset({"QAT", "GradientAdaptiveQAT"}): "two techniques want the quantization stage",
    frozenset({"SAM", "GradientAdaptiveQAT"}): "another callback makes a second pass",
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # SparsityHealth and DistillationReport write files


def fit(module, loader, names):
    """Returns the module's state, or what refused the callbacks."""
    torch.manual_seed(0)
    table = CALLBACKS | LANGUAGE | {"MoEBalancing": MoEBalancing}
    try:
        make_trainer(max_steps=4, max_epochs=-1, callbacks=[table[name]() for name in names]).fit(module, loader)
    except LossplugError as error:
        return str(error)
    return state_of(module)


def both_orders(build, names):
    found = []
    for order in (names, names[::-1]):
        torch.manual_seed(0)
        found.append(fit(*build(), order))
    return found


def refusal(names):
    if set(names) == {"SparsityHealth", "DistillationReport"}:
        return "in this run to"  # either has nothing to watch
    if "DistillationReport" in names and not any(name.endswith("Distillation") for name in names):
        return "there is no distillation in this run"
    if "SparsityHealth" in names and "NMSparsity" not in names:
        return "NMSparsity"
    return REFUSED.get(frozenset(names))


def test_the_table_is_complete():
    ours = {entry.name for entry in registry if entry.kind == "callback"}
    assert ours == set(CALLBACKS) | set(LANGUAGE) | ELSEWHERE


@pytest.mark.parametrize("first", CALLBACKS)
def test_pairs_on_a_classifier(first):
    rest = [name for one, name in combinations(CALLBACKS, 2) if one == first]
    for second in rest:
        one, two = both_orders(lambda: (Plain(dropout=0.1), data()), [first, second])
        if (message := refusal([first, second])) is not None:
            assert isinstance(one, str), (first, second)
            assert isinstance(two, str), (second, first)
            assert message in one, one
            assert message in two, two
            assert len(one.splitlines()) == 1
        else:
            assert not isinstance(one, str), (first, second, one)
            assert not isinstance(two, str), (second, first, two)
            assert_equal(one, two)


# They look at classes, or at what another callback does, and a language model of this file has neither.
WITHOUT_TEXT = {"OnlineDistillation", "Distillation", "SparsityHealth", "DistillationReport"}


def test_balanced_experts_beside_every_other():
    torch.manual_seed(0)
    batches = [torch.randint(0, 64, (2, 16)) for _ in range(4)]
    for name in set(CALLBACKS) - WITHOUT_TEXT:
        one, two = both_orders(
            lambda: (MoE("deepseek_v3", 0.01), DataLoader(batches, batch_size=None)), ["MoEBalancing", name]
        )
        assert not isinstance(one, str), (name, one)
        assert not isinstance(two, str), (name, two)
        assert_equal(one, two)


def test_a_shrunk_cache_beside_every_other():
    torch.manual_seed(0)
    batches = [torch.randint(0, 64, (2, 16)) for _ in range(4)]

    def build():
        return Wrapped(AutoModelForCausalLM.from_config(LLAMA)), DataLoader(batches, batch_size=None)

    for name in set(CALLBACKS) - WITHOUT_TEXT:
        one, two = both_orders(build, ["KVChannelShrink", name])
        assert not isinstance(one, str), (name, one)
        assert not isinstance(two, str), (name, two)
        assert_equal(one, two)
