"""DEFT's density: limits, gradient against autograd, masks, and where activations are found."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.sparsity import DensityPenalty, density, find_activations


def reference(h, eps, mask=None):
    ratio = (h**2 / (h**2 + eps)).mean(-1).reshape(len(h), -1)
    if mask is None:
        return ratio.mean(1)
    mask = mask.reshape(len(h), -1).to(h.dtype)
    return (ratio * mask).sum(1) / mask.sum(1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-4, 1e-2, 1.0, 30.0]), masked=st.booleans())
def test_value_and_gradient_are_those_of_the_formula(seed, scale, masked):
    torch.manual_seed(seed)
    h = (torch.randn(3, 4, 5, dtype=torch.float64) * scale).requires_grad_()
    mask = None
    if masked:
        mask = torch.rand(3, 4) < 0.7
        mask[:, 0] = True
    got, want = density(h, 1e-4, mask), reference(h, 1e-4, mask)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    weights = torch.randn(3, dtype=torch.float64)
    (a,) = torch.autograd.grad(got @ weights, h)
    (b,) = torch.autograd.grad(want @ weights, h)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_limits():
    assert density(torch.zeros(2, 3, 4)).tolist() == [0.0, 0.0]
    torch.testing.assert_close(density(torch.full((2, 3, 4), 5.0)), torch.ones(2))
    h = torch.full((1, 1, 1), 1e-4, dtype=torch.float16, requires_grad=True)  # its square is 0 in float16
    value = density(h, 1e-7)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(1e-8 / (1e-8 + 1e-7), rel=1e-2)
    value.sum().backward()
    assert h.grad.dtype == torch.float16
    assert h.grad.isfinite().all()
    assert density(torch.ones(2, 3, 4), 1e-7, torch.tensor([[1, 0, 1], [0, 0, 0]]))[1] == 0


def test_bad_input():
    with pytest.raises(LossplugError, match="eps is 0"):
        density(torch.ones(2, 3), 0)
    with pytest.raises(LossplugError, match="mask of shape"):
        density(torch.ones(2, 3, 4), 1e-7, torch.ones(3, 2))
    for options in ({"alpha": -1}, {"eps": 0.0}, {"alpha": float("nan")}):
        with pytest.raises(LossplugError):
            DensityPenalty(**options)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Net(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.final = nn.ModuleList(Block() for _ in range(2)), nn.ReLU()
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.final(x)


def test_activations_beside_a_linear_layer_are_found():
    net = nn.ModuleDict({"net": Net(), "conv": nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU())})
    assert list(find_activations(net)) == ["net.blocks.0.act", "net.blocks.1.act"]
    assert list(find_activations(net, ["*.1.act"])) == ["net.blocks.1.act"]
    assert list(find_activations(net, exclude=["*.0.act"])) == ["net.blocks.1.act"]
    assert list(find_activations(net, ["net.blocks.0.fc1"])) == ["net.blocks.0.fc1"]  # any module, if it is named
    with pytest.raises(LossplugError, match="Did you mean"):
        find_activations(net, ["*.blocks.1.akt"])
    with pytest.raises(LossplugError, match="no activation modules"):
        find_activations(nn.Linear(2, 2))


@pytest.mark.parametrize("build", ["llama", "gpt2", "bert", "t5"])
def test_activations_of_transformers(build):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    small = {"vocab_size": 16, "num_attention_heads": 2}
    wide = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    config, ending = {
        "llama": (transformers.LlamaConfig(**small, **wide), "mlp.act_fn"),
        "gpt2": (transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2), "mlp.act"),
        "bert": (transformers.BertConfig(**small, **wide), "intermediate.intermediate_act_fn"),
        "t5": (transformers.T5Config(vocab_size=16, d_model=8, d_ff=16, d_kv=4, num_layers=1, num_heads=2), "act"),
    }[build]
    found = find_activations(transformers.AutoModel.from_config(config))
    assert len(found) == 2
    assert all(path.endswith(ending) for path in found)


@pytest.mark.parametrize("reentrant", [None, False])
def test_the_term_is_the_mean_over_layers_and_survives_checkpointing(reentrant):
    net, penalty, x = Net(reentrant), DensityPenalty(eps=1e-2), torch.randn(3, 4, 6)
    assert penalty.attach(net) == ["blocks.0.act", "blocks.1.act"]
    with penalty.armed():
        net(x).sum()
    term = penalty.term()
    hidden, want = x, []
    for block in net.blocks:
        h = F.relu(block.fc1(hidden))
        want.append(reference(h, 1e-2).mean())
        hidden = block.fc2(h)
    torch.testing.assert_close(term, sum(want) / 2)
    term.backward()
    grads = [p.grad.clone() for p in net.blocks.parameters() if p.grad is not None]
    expected = torch.autograd.grad(sum(want) / 2, list(net.blocks.parameters()), allow_unused=True)
    for got, exact in zip(grads, [g for g in expected if g is not None], strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-6)
    net.eval()
    with penalty.armed():
        net(x)
    with pytest.raises(LossplugError, match="none of the activations ran in training mode"):
        penalty.term()
    penalty.detach()
    assert not net.blocks[0].act._forward_hooks


def test_reentrant_checkpointing_is_refused_with_a_remedy():
    net, penalty = Net(reentrant=True), DensityPenalty()
    penalty.attach(net)
    with penalty.armed():
        net(torch.randn(3, 4, 6, requires_grad=True))
    with pytest.raises(LossplugError, match="use_reentrant=False"):
        penalty.term()


def test_padding_does_not_count():
    net, penalty, x = Net(), DensityPenalty(eps=1e-2), torch.randn(2, 4, 6)
    penalty.attach(net)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    found = []
    for value in (0.0, 50.0):
        x[mask == 0] = value
        with penalty.armed({"attention_mask": mask}):
            net(x)
        found.append(penalty.term())
    assert found[0] == found[1]
    with penalty.armed({"attention_mask": mask}), pytest.raises(LossplugError, match="padding can't be left out"):
        net(torch.randn(2, 3, 6))
    with penalty.armed({"attention_mask": mask}):
        net(x.reshape(8, 6))  # tokens of all samples in one axis
    torch.testing.assert_close(penalty.term(), found[1])


def test_encoder_and_decoder_are_added():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.T5Config(
        vocab_size=16, d_model=8, d_ff=16, d_kv=4, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model, penalty = transformers.T5ForConditionalGeneration(config).train(), DensityPenalty(eps=1e-3)
    penalty.attach(model)
    ids, labels = torch.randint(1, 16, (2, 5)), torch.randint(1, 16, (2, 3))
    labels[0, 2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones(2, 5, dtype=torch.long), "labels": labels}
    with penalty.armed(batch):
        model(**batch)
    assert set(penalty._found) == {"encoder", "decoder"}
    torch.testing.assert_close(penalty.term(), sum(values[0] for values in penalty._found.values()))
