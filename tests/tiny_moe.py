"""A mixture of experts of two layers."""

import lightning.pytorch as pl
import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
