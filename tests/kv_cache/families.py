"""Tiny random models of the families whose cache can be shrunk."""

from __future__ import annotations

import copy
import functools

import torch
import transformers

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.25,  # attention that looks somewhere, unlike that of the usual small start
}
GQA = {"num_key_value_heads": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
NTK = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
FAMILIES = {
    "llama": ("llama", GQA),
    "llama_bias": ("llama", {**GQA, "attention_bias": True}),
    "llama_yarn": ("llama", {**GQA, "rope_parameters": YARN}),
    "qwen2": ("qwen2", GQA),
    "qwen3": ("qwen3", {**GQA, "head_dim": 12}),
    "mistral": ("mistral", {**GQA, "sliding_window": None}),
    "gemma": ("gemma", {**GQA, "head_dim": 8}),
    "gemma2": ("gemma2", {**GQA, "head_dim": 8, **MIXED}),
    "gemma3": ("gemma3_text", {**GQA, "head_dim": 8, **MIXED}),
    "phi3": ("phi3", GQA),
    "phi": (
        "phi",
        {**GQA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "stablelm": ("stablelm", GQA),
    "starcoder2": ("starcoder2", {**GQA, "use_bias": True}),
    "olmo2": ("olmo2", GQA),
    "granite": ("granite", GQA),
    "cohere": ("cohere", GQA),
    "glm": ("glm", {**GQA, "head_dim": 8}),
    "smollm3": ("smollm3", {**GQA, "no_rope_layers": [1, 1, 0]}),
}


@functools.cache
def config_of(family: str):
    kind, more = FAMILIES[family]
    return transformers.AutoConfig.for_model(kind, **{**COMMON, **more})


@functools.cache
def model_of(family: str, implementation: str = "sdpa"):
    """One model per family; tests must leave it as it is."""
    torch.manual_seed(0)
    if family in ("gemma2",) and implementation == "sdpa":
        implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config_of(family)), attn_implementation=implementation
    )
    for parameter in model.parameters():  # biases and norms that do something
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, COMMON["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
