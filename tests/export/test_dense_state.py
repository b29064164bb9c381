"""Dense state dicts: every key, no shared memory, finite."""

import pytest
import safetensors.torch
import torch
from torch import nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.export import dense_state, write_safetensors
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import NMSettings, NMTechnique
from lightning_lossplug.surgery import fold


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("view", torch.arange(12.0).reshape(3, 4)[:, :2].T)


def test_tied_and_strided_tensors_survive_the_round_trip(tmp_path):
    model = Tied()
    state = dense_state(model)
    assert list(state) == list(model.state_dict())
    path = tmp_path / "model.safetensors"
    write_safetensors(state, path, {"note": "text"})
    again = Tied()
    again.load_state_dict(safetensors.torch.load_file(path), strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.head.weight is again.embedding.weight


def test_the_state_is_a_snapshot_of_the_tied_weight_only_where_it_must(tmp_path):
    model = Tied()
    state = dense_state(model)
    pointers = [value.untyped_storage().data_ptr() for value in state.values()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value):
    model = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1, 2] = value
    with pytest.raises(LossplugError, match=r"0\.weight: 1 of 8 values are not finite"):
        dense_state(model)


def test_a_plugged_model_is_refused_and_its_fold_is_not():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    technique = NMTechnique(NMSettings(n=2, m=4, recipe="nm_ste", include=["0"]))
    technique.attach(model)
    technique.advance(Progress(0, 1))
    with pytest.raises(LossplugError, match="0: the layer is still plugged"):
        dense_state(model)
    state = dense_state(fold(model))
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert int(state["0.weight"].count_nonzero()) == 16
