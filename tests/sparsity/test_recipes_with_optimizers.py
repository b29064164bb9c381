"""STEP and AST: the optimizers against AdamW, closed forms and hand-written loops, in float64."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import (
    NMAST,
    ASTAdamW,
    NMSettings,
    NMTechnique,
    STEPAdamW,
    annealed_pull,
    nm_mask,
    variance_change,
)


def pair():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    return model, copy.deepcopy(model)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def masks_of(model):
    return {layer.weight: nm_mask(layer.weight, 2, 4) for layer in (model[0], model[2])}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def test_step_is_adamw_bit_for_bit_before_the_switch_and_freezes_the_variance_after():
    model, twin = pair()
    ours = STEPAdamW(model.parameters(), **OPTIONS, t_max=5)
    theirs = torch.optim.AdamW(twin.parameters(), **OPTIONS, foreach=False)
    ours.take_masks(masks_of(model))
    for step in range(5):
        assert not ours.switched
        gradients(model, step)
        gradients(twin, step)
        ours.step()
        theirs.step()
        assert same(model, twin)
    assert ours.switched
    weight, bias = model[0].weight, model[0].bias
    v, m = ours.state[weight]["exp_avg_sq"].clone(), ours.state[weight]["exp_avg"].clone()
    for step in range(5, 9):
        gradients(model, step)
        gradients(twin, step)
        before = weight.detach().clone()
        ours.step()
        theirs.step()
        m = 0.9 * m + 0.1 * weight.grad
        moved = before * (1 - 1e-3) - 1e-2 / (1 - 0.9 ** (step + 1)) * m / (v.sqrt() + 1e-8)
        assert torch.allclose(weight, moved, rtol=1e-12)
        assert torch.equal(ours.state[weight]["exp_avg_sq"], v)
        assert torch.equal(bias, twin[0].bias)  # unmasked parameters go on as AdamW


def test_the_window_decides_the_switch_after_t_min():
    model, _ = pair()
    optimizer = STEPAdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.5), eps=1e-3, t_min=4, t_max=100)
    optimizer.take_masks(masks_of(model))
    steps = 0
    while not optimizer.switched:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        steps += 1
    # Z_t = 0.5 * 0.5^(t - 1); the mean of the last two is below 1e-3 from t = 11 on.
    assert steps == 11


@pytest.mark.parametrize("option", [1, 2])
def test_z_with_constant_gradients_decays_like_beta2(option):
    grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    v, found = torch.zeros(3, dtype=torch.float64), []
    for _ in range(6):
        found.append(float(variance_change([grad], [v], 0.9, option)))
        after = 0.9 * v + 0.1 * grad**2
        moved = (after - v).abs()
        assert found[-1] == pytest.approx(float(moved.mean() if option == 1 else moved.log().mean().exp()), rel=1e-12)
        v = after
    assert [b / a for a, b in itertools.pairwise(found)] == pytest.approx([0.9] * 5, rel=1e-12)


@pytest.mark.parametrize("stop", [3, 8])
def test_step_resumes_with_the_same_bits(stop):
    def run(split):
        model, _ = pair()
        optimizer = STEPAdamW(model.parameters(), **OPTIONS, t_max=5)
        for step in range(12):
            if step == split:
                state, saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
                model = saved
                optimizer = STEPAdamW(model.parameters(), **OPTIONS, t_max=5)
                optimizer.load_state_dict(state)
            optimizer.take_masks(masks_of(model))
            gradients(model, step)
            optimizer.step()
        return model

    assert same(run(None), run(stop))


def test_ast_with_nothing_to_pull_and_the_gradients_variance_is_adamw():
    model, twin = pair()
    ours = ASTAdamW(model.parameters(), **OPTIONS, variance="gradient")
    theirs = torch.optim.AdamW(twin.parameters(), **OPTIONS, foreach=False)
    for step in range(5):
        ours.take_masks(masks_of(model), pull=0.0)
        gradients(model, step)
        gradients(twin, step)
        ours.step()
        theirs.step()
        assert same(model, twin)


@pytest.mark.parametrize("variance", ["update", "gradient"])
def test_ast_is_its_equations_and_the_momentum_never_sees_the_pull(variance):
    model, _ = pair()
    optimizer = ASTAdamW(model.parameters(), **OPTIONS, variance=variance)
    weight = model[0].weight
    w, m, v = weight.detach().clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 6):
        masks, pull = masks_of(model), 0.03 * step
        optimizer.take_masks(masks, pull)
        gradients(model, step)
        w = w * (1 - 1e-3)
        m = 0.9 * m + 0.1 * weight.grad
        u = m + pull * ~masks[weight] * w
        v = 0.95 * v + 0.05 * (u if variance == "update" else weight.grad) ** 2
        w = w - 1e-2 / (1 - 0.9**step) * u / (v.sqrt() / math.sqrt(1 - 0.95**step) + 1e-8)
        optimizer.step()
        assert torch.allclose(weight, w, rtol=1e-12)
        assert torch.allclose(optimizer.state[weight]["exp_avg"], m, rtol=1e-12)
        w = weight.detach().clone()


def test_the_pull_is_annealed():
    assert [annealed_pull(t, 6e-5, 100) for t in (0, 50, 100, 500)] == pytest.approx([0, 3e-5, 6e-5, 6e-5])
    recipe = NMAST()
    assert (recipe.lambda_w, recipe.increase_step, recipe.mask_update_every) == (6e-5, 10_000, 10)
    assert recipe.pull(5000) == pytest.approx(3e-5)


def loop(recipe, optimizer, steps=12, **options):
    model, _ = pair()
    technique = NMTechnique(NMSettings(2, 4, recipe, include=["0", "2"], **options))
    technique.attach(model)
    optimizer = optimizer(model.parameters())
    x = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    technique.advance(Progress(0, steps))
    modes = []
    for step in range(steps):
        modes.append(technique.layers["0"].transform.mode)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        technique.before_step(optimizer)
        optimizer.step()
        technique.after_step(optimizer)
        technique.advance(Progress(step + 1, steps))
    return technique, model, modes


def test_the_technique_follows_the_optimizers_switch():
    technique, model, modes = loop("nm_step", lambda p: STEPAdamW(p, lr=1e-2, t_max=7))
    assert modes == ["dense"] * 7 + ["hard"] * 5
    assert torch.equal((model[0].weight != 0).reshape(-1, 4).sum(1), torch.full((16,), 2))
    assert not technique.finish()
    technique, _, _ = loop("nm_step", lambda p: STEPAdamW(p, lr=1e-2, t_max=50))
    assert "ended before the final pattern" in technique.finish()[0]


def test_the_technique_tells_ast_masks_and_pull():
    _, model, modes = loop("nm_ast", lambda p: ASTAdamW(p, lr=1e-2), lambda_w=0.5, increase_step=4)
    assert set(modes) == {"hard"}
    assert torch.equal((model[2].weight != 0).reshape(-1, 4).sum(1), torch.full((8,), 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: STEPAdamW(p), "neither total_steps nor t_max"),
        (lambda p: STEPAdamW(p, t_max=0), "at least one step"),
        (lambda p: STEPAdamW(p, t_max=5, option=3), "option is 3"),
        (lambda p: STEPAdamW(p, lr=-1.0, t_max=5), "lr is -1.0"),
        (lambda p: STEPAdamW(p, t_max=5).step(), "no weight is masked"),
        (lambda p: ASTAdamW(p, variance="v"), "variance is 'v'"),
        (lambda p: ASTAdamW(p, betas=(0.9, 1.0)), "betas is"),
    ],
)
def test_bad_optimizers(call, message):
    model, _ = pair()
    gradients(model, 0)
    with pytest.raises(LossplugError, match=message):
        call(model.parameters())


def test_the_recipe_needs_its_optimizer():
    with pytest.raises(LossplugError, match=r"nm_step needs the optimizer STEPAdamW, the weights are in AdamW"):
        loop("nm_step", torch.optim.AdamW)
    with pytest.raises(LossplugError, match=r"lambda_w is -1"):
        NMSettings(recipe="nm_ast", lambda_w=-1.0)
    assert STEPAdamW(pair()[0].parameters(), total_steps=100).t_max == 50
