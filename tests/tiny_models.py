"""Small language models, and a module that trains any model of timm or transformers for three steps."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from callback_runs import make_trainer
from torch.utils.data import DataLoader
from transformers import GPT2Config, LlamaConfig

from lightning_lossplug.kv_cache import Factors, KVFactors, KVShrinkSettings
from lightning_lossplug.kv_cache.plan import LayerFactors

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
LLAMA = LlamaConfig(**TINY, tie_word_embeddings=True)
GPT2 = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)


class Wrapped(pl.LightningModule):
    def __init__(self, model, lr=1e-2):
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch, batch_idx):
        if batch.dtype == torch.long:
            return self.model(input_ids=batch, labels=batch).loss
        return F.cross_entropy(self.model(batch), torch.arange(len(batch)) % 4)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr)


def train(model, batch, *callbacks, lr=1e-2):
    torch.manual_seed(0)
    module = Wrapped(model, lr)
    make_trainer(max_steps=3, max_epochs=-1, callbacks=list(callbacks)).fit(
        module, DataLoader([batch] * 3, batch_size=None)
    )
    return module


def kv_factors():
    """Factors of one layer of 8 channels."""
    g = torch.Generator().manual_seed(0)
    one = Factors(torch.randn(8, 3, generator=g), torch.randn(3, 8, generator=g), torch.randn(8, generator=g))
    two = Factors(torch.randn(8, 2, generator=g), torch.randn(2, 8, generator=g))
    return KVFactors({0: LayerFactors(one, two, 0.25, 0.5)}, KVShrinkSettings(), {"model": "x", "layers": 1}, 64)
