"""Scores, the signals they see, calibration, and pruning in one call."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import NMSettings, NMTechnique, gradient_scores, nm_mask, prune_nm, wanda_scores
from lightning_lossplug.sparsity.scores import find_score, score_signals
from lightning_lossplug.surgery import fold, plugged_layers


def both(weight, input_norm, grad_norm):
    return weight.abs() * (input_norm + 100 * grad_norm)


def needs_the_moon(weight, moon):
    return weight.abs() * moon


def attached(model, **options):
    technique = NMTechnique(NMSettings(2, 4, **options))
    technique.attach(model)
    return technique


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))


def skewed(count=32):
    torch.manual_seed(1)
    return torch.randn(count, 8) * torch.tensor([10.0, 0.1] * 4)


def test_wanda_and_gradient_are_their_formulas():
    weight, norm = torch.randn(6, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    assert torch.equal(wanda_scores(weight, norm), weight.abs() * norm[None])
    assert torch.equal(wanda_scores(weight.t(), norm, dim=0), weight.t().abs() * norm[:, None])
    conv = torch.randn(4, 8, 3, 3, dtype=torch.float64)
    assert torch.equal(wanda_scores(conv, norm), conv.abs() * norm[None, :, None, None])
    assert torch.equal(gradient_scores(weight, weight.square()), weight.abs() * weight.square())
    same = torch.full((8,), 3.0, dtype=torch.float64)
    assert torch.equal(nm_mask(weight, 2, 4, scores=wanda_scores(weight, same)), nm_mask(weight, 2, 4))


def test_the_signal_of_a_linear_layer_is_the_norm_of_its_inputs():
    model, x = net(), skewed()
    technique = attached(model, score="wanda", include=["0"])
    technique.calibrate(model, x.split(8))
    seen = technique.layers["0"].transform.signals(model[0].weight)["input_norm"]
    assert torch.allclose(seen[0], x.square().mean(0).sqrt(), rtol=1e-5)
    technique.advance(Progress(0, 1))
    dense = net()[0].weight
    expected = nm_mask(dense, 2, 4, scores=wanda_scores(dense, x.norm(dim=0)))
    assert torch.equal(model[0].weight_transforms["sparsity"].mask, expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_signal_of_a_convolution_is_per_input_channel(groups):
    conv = nn.Conv2d(8, 4, 3, groups=groups)
    x = torch.randn(5, 8, 6, 6) * torch.arange(1, 9).view(8, 1, 1)
    technique = attached(conv, score="wanda", include=[""])
    technique.calibrate(conv, [x])
    seen = technique.layers[""].transform.signals(conv.weight)["input_norm"]
    norm = x.movedim(1, 0).reshape(8, -1).square().mean(1).sqrt()
    for out in range(4):
        mine = norm if groups == 1 else norm[4 * (out // 2) : 4 * (out // 2) + 4]
        assert torch.allclose(seen.expand(conv.weight.shape)[out, :, 0, 0], mine, rtol=1e-5)


def test_gradient_signal_is_the_mean_square_over_steps():
    model, x = net(), skewed()
    technique = attached(model, score="gradient", include=["0"], score_ema=1.0, calibration_steps=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    squares = []
    technique.advance(Progress(0, 10))
    for step in range(4):
        assert (technique.layers["0"].transform.mode == "dense") == (step < 3)
        model.zero_grad()
        model(x + step).square().sum().mul(8.0).backward()
        squares.append(model[0]._parameters["weight"].grad.div(8.0).square())
        technique.before_step(optimizer, grad_scale=8.0)
        optimizer.step()
        technique.after_step(optimizer)
        technique.advance(Progress(step + 1, 10))
    seen = technique.layers["0"].transform.signals(model[0].weight)["grad_norm"]
    assert torch.allclose(seen, torch.stack(squares).mean(0).sqrt(), rtol=1e-4)


def test_the_running_mean_is_even_at_first_and_exponential_later():
    model = net()
    technique = attached(model, recipe="nm_ste", score="wanda", include=["0"], score_ema=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    expected = 0.0
    technique.advance(Progress(0, 10))
    for step, scale in enumerate((1.0, 2.0, 5.0, 3.0)):
        x = torch.full((4, 8), scale)
        model(x).sum().backward()
        technique.after_step(optimizer)
        technique.advance(Progress(step + 1, 10))
        share = max(1 / (step + 1), 0.5)
        expected += (scale**2 - expected) * share
        assert float(technique.layers["0"].transform.input_square[0]) == pytest.approx(expected, rel=1e-6)


def test_accumulated_micro_batches_count_as_one_step():
    states = []
    for pieces in (1, 4):
        model = net()
        technique = attached(model, recipe="nm_ste", score="wanda")
        technique.advance(Progress(0, 10))
        for x in skewed().chunk(pieces):
            model(x)
        technique.after_step(torch.optim.SGD(model.parameters(), 0.0))
        technique.advance(Progress(1, 10))
        states.append(model.state_dict())
    for key in states[0]:
        assert torch.allclose(states[0][key].float(), states[1][key].float(), rtol=1e-5), key


def test_a_batch_that_overflowed_is_left_out():
    model = net()
    technique = attached(model, recipe="nm_ste", score="wanda", include=["0"])
    technique.advance(Progress(0, 10))
    model(torch.full((2, 8), float("inf")))
    technique.after_step(torch.optim.SGD(model.parameters(), 0.0))
    assert technique.layers["0"].transform.steps_seen() == 0


def test_evaluation_is_not_watched_and_the_hook_leaves_with_the_transform():
    model = net()
    technique = attached(model, recipe="nm_ste", score="wanda")
    technique.advance(Progress(0, 10))
    with torch.no_grad():
        model(skewed())
    assert float(technique.layers["0"].transform._collected.sum()) == 0
    model(skewed())
    technique.after_step(torch.optim.SGD(model.parameters(), 0.0))
    technique.advance(Progress(1, 10))
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(skewed()), model(skewed()))
    assert float(copy.deepcopy(model)[0].weight_transforms["sparsity"].input_square.sum()) > 0
    for plain in (fold(model), fold(copied)):
        assert not any(layer._forward_pre_hooks for layer in plain)
    technique.detach(model)
    assert not any(layer._forward_pre_hooks for layer in model)


@pytest.mark.parametrize("score", ["wanda", "gradient", both])
def test_prune_in_one_call(score):
    model, x = net(), skewed()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pruned = prune_nm(model, 2, 4, score=score, batches=[x], forward=lambda model, batch: model(batch).square().mean())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not list(plugged_layers(pruned))
    for i in (0, 2):
        groups = (pruned[i].weight != 0).reshape(-1, 4).sum(1)
        assert torch.equal(groups, torch.full_like(groups, 2))
    if score == "wanda":
        # Inputs 0, 2, 4 and 6 are a hundred times as large as the others.
        assert (pruned[0].weight[:, ::2] != 0).float().mean() > 0.9


def test_wanda_loses_less_output_than_magnitude_on_skewed_inputs():
    model, x = net(), skewed()
    pruned = [prune_nm(model, score=score, batches=[x])[0].weight for score in ("magnitude", "wanda")]
    errors = [((x @ (weight - model[0].weight).t()) ** 2).mean() for weight in pruned]
    assert errors[1] < 0.5 * errors[0]


def test_names_paths_and_functions():
    assert find_score("wanda") is wanda_scores
    settings = NMSettings(score=both)
    assert settings.score.endswith("test_scores.both")
    assert find_score(settings.score) is both
    assert score_signals(both) == ("input_norm", "grad_norm")
    assert score_signals(find_score("magnitude")) == ()


def test_a_hidden_input_is_left_out_with_the_reason():
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    selection = attached_selection(encoder)
    notes = {choice.candidate.name: choice.note for choice in selection.choices}
    assert "computed inside the layer" in notes["self_attn.in_proj_weight"]
    assert "reads its weight without calling it" in notes["self_attn.out_proj"]
    assert [c.name for c in selection.taken] == ["linear1"]


def attached_selection(model):
    return NMTechnique(NMSettings(2, 4, score="wanda")).attach(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NMSettings(score="wand"), "unknown score 'wand'.*'wanda'"),
        (lambda: NMSettings(score="lightning_lossplug.nothing"), "there is no function"),
        (lambda: NMSettings(score=lambda weight: weight), "no importable name"),
        (lambda: NMSettings(score=needs_the_moon), "takes 'moon'"),
        (lambda: NMSettings(score="wanda", score_ema=1.5), "score_ema is 1.5"),
        (lambda: NMSettings(score="wanda", calibration_steps=0), "calibration_steps is 0"),
        (lambda: NMSettings(recipe="nm_sste", score="wanda"), "nm_sste orders weights by magnitude"),
        (lambda: prune_nm(net(), score="wanda"), "needs data"),
        (lambda: prune_nm(net(), score="wanda", batches=[]), "saw no data"),
        (lambda: prune_nm(net(), score="gradient", batches=[skewed()]), "no loss came back"),
        (lambda: attached(net()).calibrate(net(), [skewed()]), "needs no data"),
        (lambda: wanda_scores(torch.randn(4, 8), torch.rand(4)), "4 entries, axis 1 of the weight 8"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(LossplugError, match=message):
        call()
