"""Routers of real mixtures of experts, balanced by their bias."""

import lightning.pytorch as pl
import pytest
import torch
from callback_runs import Plain, data, make_trainer
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import MoEBalancing
from lightning_lossplug.losses.moe_bias_balancing import bias_step

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 2,
}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}


class MoE(pl.LightningModule):
    """A mixture of experts whose first router leans to one expert."""

    def __init__(self, kind, lr=0.0):
        super().__init__()
        torch.manual_seed(0)
        extra = LATENT if kind == "deepseek_v3" else {"head_dim": 8}
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **extra))
        self.lr = lr

    def routers(self):
        return [m for m in self.modules() if hasattr(m, "e_score_correction_bias")]

    def training_step(self, ids, batch_idx):
        return self.model(input_ids=ids, labels=ids).loss

    def validation_step(self, ids, batch_idx):
        self.model(input_ids=ids)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


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
