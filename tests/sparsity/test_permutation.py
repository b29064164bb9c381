"""Channel permutations: kept magnitude never falls, and the network computes the same in float64."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, LlamaConfig, MixtralConfig

from lightning_lossplug import LossplugError
from lightning_lossplug.sparsity import permutation_search, permute_for_sparsity, prune_nm
from lightning_lossplug.sparsity.permutation import kept_magnitude
from lightning_lossplug.surgery.permute import find_links

TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT = {"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": 16, "patch_size": 8, "num_classes": 4}


def stack():
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16, bias=False), nn.Linear(16, 2))


def convolutions():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 4, 1))


MODELS = {
    "stack": (stack, lambda: torch.randn(4, 8), ["3", "4"]),
    "convolutions": (convolutions, lambda: torch.randn(2, 3, 8, 8), ["6"]),
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", **VIT),
        lambda: torch.randn(2, 3, 16, 16),
        ["blocks.0.mlp.fc2"],
    ),
    "convnext": (
        lambda: timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=4),
        lambda: torch.randn(2, 3, 32, 32),
        [f"stages.{i}.blocks.0.mlp.fc2" for i in range(4)],
    ),
    "resnet": (
        lambda: timm.create_model("resnet18", channels=(8, 8, 16, 16), stem_width=8, num_classes=4),
        lambda: torch.randn(2, 3, 32, 32),
        [f"layer{i}.{j}.conv2" for i in range(1, 5) for j in range(2)],
    ),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(16, 2, 16, batch_first=True),
        lambda: torch.randn(2, 3, 16),
        ["linear2"],
    ),
    "llama": (
        lambda: AutoModelForCausalLM.from_config(LlamaConfig(**TINY)),
        lambda: {"input_ids": torch.randint(0, 64, (2, 5))},
        ["model.layers.0.mlp.down_proj"],
    ),
    "gpt2": (
        lambda: AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)),
        lambda: {"input_ids": torch.randint(0, 64, (2, 5))},
        ["transformer.h.0.mlp.c_proj"],
    ),
    "bert": (
        lambda: BertModel(BertConfig(**TINY)),
        lambda: {"input_ids": torch.randint(0, 64, (2, 5))},
        ["encoder.layer.0.output.dense"],
    ),
    "mixtral": (
        lambda: AutoModelForCausalLM.from_config(MixtralConfig(**TINY, num_key_value_heads=1, num_local_experts=3)),
        lambda: {"input_ids": torch.randint(0, 64, (2, 5))},
        ["model.layers.0.mlp.experts.down_proj"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_kept_mass_never_falls_and_the_output_stays(name):
    torch.manual_seed(0)
    build, batch, expected = MODELS[name]
    model, batch = build().double().train(), batch()
    if name == "mixtral":
        model.set_experts_implementation("eager")  # the grouped products know no float64
    batch = batch if isinstance(batch, dict) else batch.double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
        for value in module.parameters(recurse=False):
            if value.ndim == 1:
                value.data.normal_()
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    found = permute_for_sparsity(model, 2, 4, batch=batch, rounds=60)
    assert list(found) == expected
    assert all(after >= before for before, after in found.values())
    assert any(after > before for before, after in found.values())
    assert any(not torch.equal(value, dense[key]) for key, value in model.state_dict().items())
    assert model.training


@settings(max_examples=15, deadline=None)
@given(pattern=st.sampled_from([(2, 4), (1, 4), (3, 4), (2, 8)]), seed=st.integers(0, 999))
def test_the_search_gains_and_returns_an_order(pattern, seed):
    n, m = pattern
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    order = permutation_search(weight, n, m, seed=seed)
    assert torch.equal(order.sort().values, torch.arange(24))
    before, after = kept_magnitude(weight, n, m).sum(), kept_magnitude(weight[:, order], n, m).sum()
    assert float(after) >= float(before)
    assert torch.equal(permutation_search(weight.t(), n, m, 0, seed=seed), order)
    assert torch.equal(permutation_search(weight, n, m, seed=seed), order)
    assert torch.equal(permutation_search(weight, m, m), torch.arange(24))


def test_large_columns_that_share_a_group_are_spread():
    weight = torch.tensor([[9.0, 8, 7, 6, 0.1, 0.1, 0.1, 0.1]]).repeat(3, 1)
    order = permutation_search(weight, 2, 4)
    assert float(kept_magnitude(weight[:, order], 2, 4).sum()) == pytest.approx(90.0)


def test_a_network_that_is_not_wired_as_its_names_say_is_put_back():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.fc2(self.fc1(x) + x)

    torch.manual_seed(0)
    model = Skips()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(LossplugError, match="the output changed; one of fc2 is not wired"):
        permute_for_sparsity(model, batch=torch.randn(2, 16))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert permute_for_sparsity(model, batch=torch.randn(2, 16), layers=[]) == {}


def test_pruning_after_a_permutation_keeps_more():
    torch.manual_seed(0)
    model, x = stack(), torch.randn(4, 8)
    plain, permuted = (prune_nm(model, 1, 4, allow_permutation=p, batches=[x]) for p in (False, True))
    for i in (0, 3):
        assert torch.equal((permuted[i].weight != 0).reshape(-1, 4).sum(1), torch.ones(model[i].weight.numel() // 4))
    assert permuted[3].weight.abs().sum() > plain[3].weight.abs().sum()
    with pytest.raises(LossplugError, match="a permutation needs data"):
        prune_nm(model, allow_permutation=True)


def test_links_are_refused_where_something_else_holds_the_channels():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.mix, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    assert find_links(Mixed()) == []
    assert find_links(nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 8))) == []
    assert [link.name for link in find_links(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))] == ["2"]
