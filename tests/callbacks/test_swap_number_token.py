"""number_token beside the cross-entropy that a step computes, with the run's own tokenizer."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from callback_runs import make_trainer

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import SwapLoss
from lightning_lossplug.integrations import CausalLM, TextData
from lightning_lossplug.losses import create
from lightning_lossplug.losses.number_values import attach_values


class Digits:
    """The least of a tokenizer."""

    def get_vocab(self):
        return {**{str(d): d + 2 for d in range(10)}, "a": 0, "b": 1}


class Writer(pl.LightningModule):
    """Cross-entropy over sequences, classes second, as torch wants them."""

    def __init__(self, tokenizer=None, flat=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 12)
        self.flat = flat
        if tokenizer is not None:
            self.tokenizer = tokenizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = self.net(x)
        if self.flat:
            self.seen = F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-1)
        else:
            self.seen = F.cross_entropy(z.movedim(-1, 1), y, ignore_index=-1)
        return self.seen

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def batches():
    torch.manual_seed(1)
    x, y = torch.randn(3, 5, 4), torch.randint(0, 12, (3, 5))
    y[0, :2] = -1
    return [(x, y)]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("name", ["number_token", "dist2"])
def test_the_term_is_added_to_a_functional_call(flat, name):
    module, (batch,) = Writer(Digits(), flat), batches()
    with torch.no_grad():
        z = module.net(batch[0])
        term = attach_values(create(name, ignore_index=-1), Digits())(z, batch[1])
        wanted = F.cross_entropy(z.flatten(0, 1), batch[1].flatten(), ignore_index=-1) + 0.5 * term
    make_trainer(max_steps=1, callbacks=[SwapLoss(name, mode="add", weight=0.5)]).fit(
        module, torch.utils.data.DataLoader(batches(), batch_size=None)
    )
    torch.testing.assert_close(module.seen.detach(), wanted)


def test_a_language_model_takes_the_table_from_its_data():
    config = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    data = TextData("bytes", block_size=64, train_limit=8)
    swap = SwapLoss("number_token", mode="add")
    make_trainer(max_steps=2, callbacks=[swap]).fit(CausalLM(from_config=config), datamodule=data)
    assert len(swap.loss.values) == 300  # as wide as the logits, beyond the 256 bytes
    assert swap.loss.values[ord("7")] == 7
    assert swap.swap.last["new"] > 0


def test_without_a_tokenizer_it_says_what_to_do():
    loader = torch.utils.data.DataLoader(batches(), batch_size=None)
    with pytest.raises(LossplugError, match="has a tokenizer"):
        make_trainer(max_steps=1, callbacks=[SwapLoss("number_token", mode="add")]).fit(Writer(), loader)


def test_it_replaces_no_cross_entropy():
    with pytest.raises(LossplugError, match="mode='add'"):
        SwapLoss("number_token")
