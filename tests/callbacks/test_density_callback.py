"""ActivationDensity in real fits: the term beside any loss, and a run that doesn't feel it at alpha = 0."""

import pytest
import torch
import torch.nn.functional as F
from callback_runs import Manual, Plain, data, make_trainer
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import ActivationDensity, NMSparsity, SwapLoss
from lightning_lossplug.surgery import wrapped_methods


def fit(*callbacks, module=None, **options):
    torch.manual_seed(0)
    module = module or Plain()
    trainer = make_trainer(callbacks=list(callbacks), log_every_n_steps=1, **options)
    trainer.fit(module, data())
    return module, trainer


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_alpha_zero_is_the_plain_run():
    assert same(fit(ActivationDensity(0.0))[0], fit()[0])


def test_it_makes_activations_sparse_and_leaves_no_trace():
    module, trainer = fit(ActivationDensity(alpha=2.0, eps=1e-2), max_epochs=6)
    plain, _ = fit(max_epochs=6)
    x = torch.cat([batch for batch, _ in data()])
    with torch.no_grad():
        zeros = [float((m.net[:2](x) == 0).float().mean()) for m in (module, plain)]
    assert zeros[0] > zeros[1] + 0.1
    assert 0 < trainer.callback_metrics["ActivationDensity/density"] < 1
    assert trainer.callback_metrics["ActivationDensity/zeros"] > 0.3
    assert wrapped_methods(module) == ()
    assert not module.net[1]._forward_hooks


def test_the_term_is_added_to_the_swapped_loss():
    class Keep(Plain):
        def __init__(self):
            super().__init__()
            self.seen = []

        def on_before_backward(self, loss):
            self.seen.append(float(loss.detach()))

    torch.manual_seed(0)
    module = Keep()
    x, y = next(iter(data()))
    with torch.no_grad():
        h = module.net[:2](x)
        own = F.cross_entropy(module.net(x), y, label_smoothing=0.2)
        want = own + 0.5 * (h**2 / (h**2 + 1e-2)).mean()
    fit(
        SwapLoss("cross_entropy", {"label_smoothing": 0.2}),
        ActivationDensity(0.5, 1e-2),
        module=module,
        max_steps=1,
    )
    assert module.seen[0] == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}]
)
def test_trainer_features_beside_masks(options):
    module, _ = fit(NMSparsity(2, 4), ActivationDensity(eps=1e-3), **options)
    assert (module.net[0].weight.reshape(-1, 4).count_nonzero(1) <= 2).all()


def test_a_dict_of_the_step_and_a_skipped_batch():
    class Dicts(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else {"loss": loss, "note": 1}

    module, _ = fit(ActivationDensity(1.0, 1e-2), module=Dicts())
    assert not same(module, fit()[0])


def test_layers_built_in_configure_model():
    class Late(Plain):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))

    _, trainer = fit(ActivationDensity(1.0, 1e-2), module=Late())
    assert "ActivationDensity/density" in trainer.callback_metrics


def test_mistakes():
    with pytest.raises(LossplugError, match="needs automatic optimization"):
        fit(ActivationDensity(), module=Manual())
    with pytest.raises(LossplugError, match="no activation matches"):
        fit(ActivationDensity(include=["*.gelu"]))

    class Unused(Plain):
        def __init__(self):
            super().__init__()
            self.other = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    module = Unused()
    with pytest.raises(LossplugError, match="none of the activations ran"):
        fit(ActivationDensity(include=["other.1"]), module=module)
    assert wrapped_methods(module) == ()
    assert not module.other[1]._forward_hooks
