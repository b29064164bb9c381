"""Learned layer mapping: weights, gradients and limits in float64, real fits, resume."""

import lightning.pytorch as pl
import pytest
import torch
from distillation_runs import FEATURES, Plain, data, network, same, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import Distillation, ExactResume
from lightning_lossplug.distillation import LearnedLayers, create, pairs_by_depth
from lightning_lossplug.distillation.layer_pairs import depth_places, depth_prior

pytestmark = pytest.mark.filterwarnings("ignore")
D = torch.float64


def features(*widths, n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, w, generator=g, dtype=D) for w in widths]


class Stack(nn.Module):
    """Residual blocks of one width, as a transformer has them."""

    def __init__(self, blocks, width=8, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(x)


def stacked(blocks=2):
    module = Plain("adamw")
    module.net = Stack(blocks, FEATURES, seed=1)
    return module


@settings(max_examples=40, deadline=None)
@given(student=st.integers(1, 9), teacher=st.integers(1, 9), spread=st.sampled_from([0.0, 1e-4, 0.1, 1.0, 1e4]))
def test_weights_begin_at_equal_depths(student, teacher, spread):
    places, prior = depth_places(student, teacher), depth_prior(student, teacher, spread)
    assert places == sorted(places)
    assert places[-1] == teacher - 1
    torch.testing.assert_close(prior.exp().sum(1), torch.ones(student, dtype=D))
    assert prior.argmax(1).tolist() == places
    if spread < 1e-3:
        assert torch.equal(prior.exp(), nn.functional.one_hot(torch.tensor(places), teacher).to(D))
    if spread == 1e4:
        torch.testing.assert_close(prior.exp(), torch.full((student, teacher), 1 / teacher, dtype=D))


def test_value_and_gradients_are_the_closed_form():
    s, t = features(3, 3), features(3, 3, 3, seed=1)
    loss = LearnedLayers("hidden_cosine", spread=0.3, pull=0.2)
    loss.build(s, t)
    loss.double()
    with torch.no_grad():
        loss.offsets.normal_()
    s[0].requires_grad_()
    d = torch.stack([torch.stack([create("hidden_cosine")(a, b) for b in t]) for a in s])
    log_p = depth_prior(2, 3, 0.3)
    a = (log_p + loss.offsets).softmax(1)
    want = (a * d).sum() + 0.2 * (a * (a.log() - log_p)).sum()
    torch.testing.assert_close(loss(s, t), want)
    got = torch.autograd.grad(loss(s, t), (loss.offsets, s[0]))
    torch.testing.assert_close(got, torch.autograd.grad(want, (loss.offsets, s[0]), retain_graph=True))
    pressure = d + 0.2 * (a.log() - log_p)
    torch.testing.assert_close(got[0], a * (pressure - (a * pressure).sum(1, keepdim=True)))


def test_the_pull_has_its_minimum_at_the_tilted_prior():
    s, t = features(4, 4), features(4, 4, 4, 4, seed=1)
    loss = LearnedLayers("hidden_cosine", spread=0.5, pull=0.3)
    loss.build(s, t)
    loss.double()
    d = torch.stack([torch.stack([create("hidden_cosine")(a, b) for b in t]) for a in s])
    with torch.no_grad():
        loss.offsets.copy_(-d / 0.3)
    assert torch.autograd.grad(loss(s, t), loss.offsets)[0].abs().max() < 1e-12
    least = loss(s, t)
    torch.testing.assert_close(least, -0.3 * (depth_prior(2, 4, 0.5) - d / 0.3).logsumexp(1).sum())
    for seed in range(5):
        with torch.no_grad():
            loss.offsets.add_(torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)))
        assert loss(s, t) > least


@pytest.mark.parametrize("inner", ["hidden_cosine", "fitnet"])
def test_without_spread_it_is_the_mapping_by_depth_bit_by_bit(inner):
    def run(layers, feature_loss):
        module, teacher = stacked(), Stack(5, FEATURES if inner == "hidden_cosine" else 11, seed=2)
        if inner == "fitnet":
            teacher = nn.Sequential(nn.Linear(FEATURES, 11), teacher)
        torch.manual_seed(0)
        callback = Distillation(teacher, feature_loss=feature_loss, feature_weight=3.0, layers=layers)
        trainer(callback, max_epochs=2).fit(module, data())
        return module.state_dict(), callback

    by_depth, _ = run(2, inner)
    learned, callback = run("learned", LearnedLayers(inner, spread=0.0))
    assert same(by_depth, learned)
    assert not callback.feature_loss.offsets.any()
    pairs = pairs_by_depth(stacked().net, callback.teacher, 2)
    assert callback.layer_table().splitlines() == [f"{s}  <- {t} 1.00" for s, t in pairs.items()]


def test_it_finds_the_layers_that_the_student_was_made_of():
    teacher = Stack(6, FEATURES, seed=2)
    module = stacked(2)
    with torch.no_grad():
        for mine, place in ((0, 0), (1, 1)):  # the first two: by depth it would be 3 and 6
            module.net.blocks[mine].load_state_dict(teacher.blocks[place].state_dict())
    callback = Distillation(teacher, None, feature_loss="hidden_cosine", layers="learned", ce_weight=0.0, lr_scale=10.0)
    callback.feature_loss.spread = 1.0
    trainer(callback, max_epochs=6).fit(module, data())
    weights = callback.feature_loss.log_weights().exp()
    assert weights.argmax(1).tolist() == [0, 1]
    assert weights.max(1).values.min() > 0.5
    assert set(callback.logs) >= {"layers/blocks.0", "layers/blocks.1", "layers_entropy", "features"}
    assert float(callback.logs["layers/blocks.0"]) < float(callback.logs["layers/blocks.1"])
    assert callback.layer_table().startswith("blocks.0  <- blocks.0 0.")


def test_weights_learn_and_resume_bit_by_bit(tmp_path):
    def run(save, ckpt_path=None):
        module, callback = (
            Plain("adamw", dropout=0.2),
            Distillation(network(12, seed=5), feature_loss="fitnet", layers={"2": ["0", "2"], "0": ["0", "1", "2"]}),
        )

        class Saver(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if save and trainer.current_epoch == 0:
                    trainer.save_checkpoint(tmp_path / "middle.ckpt")

        torch.manual_seed(4)
        trainer(callback, ExactResume(), Saver(), max_epochs=2).fit(module, data(), ckpt_path=ckpt_path)
        return module, callback

    straight, resumed = run(True), run(False, tmp_path / "middle.ckpt")
    assert same(straight[0].state_dict(), resumed[0].state_dict())
    assert same(straight[1].trained.state_dict(), resumed[1].trained.state_dict())
    offsets = straight[1].feature_loss.offsets
    assert offsets[1].abs().min() > 0
    weights = straight[1].feature_loss.log_weights().exp()
    assert straight[1].pairing.teacher == ["0", "2", "1"]
    assert weights[0, 2] == 0  # not among its layers
    assert weights[1].min() > 0
    saved = torch.load(tmp_path / "middle.ckpt")
    assert set(saved["state_dict"]) == set(Plain().state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create("learned_layers", loss="kd"), "no loss of any two layers' features"),
        (lambda: create("learned_layers", loss="ofd"), "no loss of any two layers' features"),
        (lambda: create("learned_layers", loss="reviewkd"), "takes more than two features"),
        (lambda: create("learned_layers", spread=-0.1), "spread is -0.1"),
        (lambda: create("learned_layers", pull=-1.0), "pull is -1.0"),
        (lambda: create("learned_layers").log_weights(), "the weights don't exist yet"),
        (lambda: Distillation(network(), feature_loss="fitnet", layers="learn"), "layers is 'learn'. Give"),
        (lambda: Distillation(network(), layers="learned"), "go together"),
        (lambda: Distillation(network(), feature_loss="fitnet", layers={"0": []}), "'0' has no layer of the teacher"),
        (lambda: Distillation(network(), feature_loss="learned_layers", layers={"0": "0"}), "nothing to choose from"),
        (lambda: Distillation(network(), feature_loss="fitnet", layers={"0": ["0", "9"]}), "no sub-module '9'"),
        (lambda: Distillation(network(), feature_loss="fitnet", layers="learned"), "no single stack of blocks"),
        (lambda: Distillation(network(), feature_loss="at", layers={"0": ["0"]}), "expected maps"),
    ],
)
def test_mistakes_are_one_line(make, message):
    with pytest.raises(LossplugError, match=message) as error:
        trainer(make()).fit(Plain(), data())
    assert "\n" not in str(error.value)


def test_other_numbers_of_layers_are_an_error():
    loss = create("learned_layers").double()
    loss(features(3, 3), features(3, 3, 3))
    with pytest.raises(LossplugError, match=r"2 layers of the student and 2 of the teacher, the weights are \(2, 3\)"):
        loss(features(3, 3), features(3, 3))
