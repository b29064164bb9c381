"""Decodes by the Triton kernel on a CPU, by Triton's interpreter, against PyTorch; prints how many logits it compared.

In a process of its own, with TRITON_INTERPRET=1 set before Triton is imported: see test_kv_triton.py.
"""

import warnings

import torch
from families import model_of, tokens

from lightning_lossplug.integrations.kv_cache import ChannelShrunkCache, KVShrinkSettings, shrink_kv
from lightning_lossplug.kv_cache import kernels, pages, triton_attention

SMALL = {"k_ratio": 0.4, "v_ratio": 0.3, "window": 4, "sinks": 2}
# family, settings, dtype (the interpreter has no products of bfloat16), tokens of a page, length of the prompt
CASES = [
    ("llama", {**SMALL, "means": True}, torch.float32, 8, 20),
    ("llama", {**SMALL, "k_bits": 4, "v_bits": 2}, torch.float32, 1024, 90),  # several tiles of a page
    ("llama", {**SMALL, "k_bits": 8, "v_bits": 4, "means": True, "sinks": 0}, torch.float16, 16, 40),
    # key codes in two pieces, and sinks that are recent, too
    ("qwen3", {"k_ratio": 0.1, "v_ratio": 0.3, "window": 19, "sinks": 4}, torch.float32, 8, 20),
    ("phi", SMALL, torch.float32, 16, 24),  # channels that don't rotate
    ("cohere", {**SMALL, "means": True}, torch.float32, 16, 24),  # pairs side by side
]


@torch.no_grad()
def main() -> int:
    warnings.filterwarnings("error", message="attention over codes")  # the way out of a kernel that fails
    kernels.CHUNK = 16
    compared = 0
    for family, settings, dtype, page, length in CASES:
        pages.PAGE = page
        kernels.PROGRAMS = 8
        model = model_of(family)
        factors = shrink_kv(model, [tokens(4, 40)], KVShrinkSettings(**settings))
        if dtype is not torch.float32:
            model = type(model)(model.config).to(dtype).eval()
            model.load_state_dict(model_of(family).state_dict())
        ids, mask = tokens(2, length + 4), torch.ones(2, length + 4, dtype=torch.long)
        mask[0, :5] = 0
        triton_attention.attend.known.clear()
        found = []
        for attention in ("latent", "triton"):
            cache, logits = ChannelShrunkCache(model, factors, attention=attention), []
            for start, stop in ((0, length), (length, length + 1), (length + 1, length + 4)):
                part = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
                logits.append(model(**part, past_key_values=cache).logits[:, -1].float())
            found.append(torch.stack(logits[1:]))
        size = float(found[0].abs().amax())
        gap = float((found[0] - found[1]).abs().amax())
        assert gap < (1e-4 if dtype is torch.float32 else 0.1) * size, (family, settings, gap, size)
        known = triton_attention.attend.known
        assert known, (family, settings)
        assert all(known.values()), (family, settings)
        compared += found[0].numel()
    return compared


if __name__ == "__main__":
    print(main(), "logits")
