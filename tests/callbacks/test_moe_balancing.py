"""Routers of real mixtures of experts, balanced by their bias."""

import lightning.pytorch as pl
import pytest
import torch
from callback_runs import Plain, data, make_trainer
from tiny_moe import MoE

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import MoEBalancing
from lightning_lossplug.losses.moe_bias_balancing import bias_step


def loader(batches=40):
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (4, 16))
    return torch.utils.data.DataLoader([ids] * batches, batch_size=None)


class Loads(pl.Callback):
    """Imbalance of every step."""

    def __init__(self, balancing):
        self.balancing, self.values = balancing, []

    def on_train_batch_end(self, *_):
        self.values.append(self.balancing.max_violation)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_the_load_becomes_even(kind):
    module, balancing = MoE(kind), MoEBalancing(update_rate=2e-3)
    for router in module.routers():
        router.e_score_correction_bias[0] = 0.1  # every token goes to the first expert
    loads = Loads(balancing)
    make_trainer(max_steps=60, callbacks=[balancing, loads]).fit(module, loader(60), loader(1))
    assert loads.values[0] > 2
    assert max(loads.values[-10:]) < 0.5 * loads.values[0]
    assert not any(r._forward_hooks for r in module.routers())


def test_a_step_is_the_rule_over_all_micro_batches():
    module, balancing = MoE("deepseek_v3"), MoEBalancing(update_rate=0.01, center=True)
    router, seen = module.routers()[0], []
    handle = router.register_forward_hook(lambda m, i, o: seen.append(o[-1]))
    make_trainer(max_steps=1, accumulate_grad_batches=2, callbacks=[balancing]).fit(module, loader(2))
    handle.remove()
    assert len(seen) == 2
    counts = torch.bincount(torch.cat(seen).flatten(), minlength=8)
    wanted = bias_step(torch.zeros(8), counts, 0.01, center=True)
    torch.testing.assert_close(router.e_score_correction_bias, wanted)
    assert router.e_score_correction_bias.grad is None


def test_mistakes():
    with pytest.raises(LossplugError, match="no module has a buffer"):
        make_trainer(max_steps=1, callbacks=[MoEBalancing()]).fit(Plain(), data())
    with pytest.raises(LossplugError, match="float32"):
        make_trainer(max_steps=1, callbacks=[MoEBalancing()]).fit(MoE("glm4_moe").bfloat16(), loader())
    with pytest.raises(LossplugError, match="update_rate"):
        MoEBalancing(update_rate=-1)
