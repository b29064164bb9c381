"""Calibration on tiny models, factors under budgets, files."""

import dataclasses
import json

import pytest
import torch
from families import FAMILIES, config_of, model_of, tokens
from torch import nn

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.kv_cache import (
    ChannelShrunkCache,
    KVShrinkSettings,
    load_kv_factors,
    record_moments,
    save_kv_factors,
    shrink_kv,
)
from lightning_lossplug.kv_cache import MomentRecorder, fit_factors, folded_output, shrunk_token_bytes
from lightning_lossplug.kv_cache.attention import Tap, attention_blocks, join_heads, output_metric

TEXT = [tokens(4, 40, seed) for seed in range(3)]


def no_hooks(model):
    return not any("_hook.<locals>" in str(h) for m in model.modules() for h in m._forward_pre_hooks.values())


def test_moments_are_those_of_the_projection():
    model = model_of("llama_bias")
    inputs = []
    layer = model.model.layers[1].self_attn.k_proj
    handle = layer.register_forward_hook(lambda module, args, out: inputs.append((args[0], out)))
    recorder = record_moments(model, TEXT, sinks=0)
    handle.remove()
    x = torch.cat([i.flatten(0, 1) for i, _ in inputs]).double()
    k = torch.cat([o.flatten(0, 1) for _, o in inputs]).double()
    assert recorder.tokens == len(k) == 480
    # before rotation, bias included
    torch.testing.assert_close(recorder.layers[1].keys.gram, k.T @ k, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(recorder.layers[1].keys.mean(), k.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(recorder.layers[1].input_scale(), x.abs().mean(0), rtol=1e-5, atol=1e-6)
    assert no_hooks(model)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("sinks", [0, 3])
def test_padding_and_sinks_do_not_count(implementation, left, sinks):
    model = model_of("llama", implementation)
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, slice(0, 12) if left else slice(18, 30)] = 0
    with_padding = record_moments(model, [{"input_ids": ids, "attention_mask": mask}], sinks)
    alone = ids[:1, 12:] if left else ids[:1, :18]
    without = record_moments(model, [alone, ids[1:]], sinks)
    assert with_padding.tokens == without.tokens == 48 - 2 * sinks
    for index, layer in with_padding.layers.items():
        torch.testing.assert_close(layer.values.gram, without.layers[index].values.gram, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(layer.keys.gram, without.layers[index].keys.gram, rtol=1e-3, atol=1e-3)


def test_a_training_step_is_recorded_and_not_changed():
    model = model_of("qwen3")
    ids = TEXT[0]

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    before = gradients()
    with MomentRecorder(model) as recorder:
        during = gradients()
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))
    assert recorder.tokens == ids.numel()
    again = MomentRecorder(model)
    again.load_state_dict(recorder.state_dict())
    assert torch.equal(again.layers[0].keys.gram, recorder.layers[0].keys.gram)
    model.zero_grad()


def test_the_inits_are_ordered_by_error():
    model = model_of("llama")
    recorder = record_moments(model, TEXT)
    errors = {}
    for init, steps in (("svd", 0), ("asvd", 0), ("asvd", 300), ("whitened", 0)):
        settings = KVShrinkSettings(k_ratio=0.7, v_ratio=0.7, init=init, steps=steps, lr=1e-2)
        made = fit_factors(model, recorder, settings)
        errors[init, steps] = sum(layer.k_error + layer.v_error for layer in made.layers.values())
    best = errors["whitened", 0]
    assert best <= min(errors.values())
    assert errors["asvd", 300] < errors["asvd", 0]
    assert errors["asvd", 300] <= 1.05 * best


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_an_init_that_needs_a_weight_says_so(family):
    with pytest.raises(LossplugError, match=r"no weight to decompose. Use init='whitened'"):
        shrink_kv(model_of(family), TEXT, KVShrinkSettings(init="svd", k_ratio=0.5, v_ratio=0.5))


@pytest.mark.parametrize("allocation", ["uniform", "spectrum"])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("limit", [{"budget": 0.4}, {"bytes_per_token": 160.0}])
def test_budgets_are_kept_and_used(allocation, bits, limit):
    model = model_of("llama")
    settings = KVShrinkSettings(allocation=allocation, k_bits=bits, v_bits=bits, **limit)
    made = shrink_kv(model, TEXT, settings)
    dense = 3 * 2 * 16 * 4
    allowed = limit.get("bytes_per_token", 0.4 * dense)
    used = shrunk_token_bytes(made.branches(), 4)
    assert used <= allowed
    full = all(b.rank == b.width for b in made.branches())
    assert full or used >= allowed - 6 * 4  # at most one channel per projection is left over
    assert made.summary(4)["share"] == pytest.approx(used / dense)


def test_spectrum_beats_uniform_in_what_it_minimises():
    model = model_of("qwen2")
    recorder = record_moments(model, TEXT)
    more = {"k_ratio": 0.6, "v_ratio": 0.6}
    settings = {allocation: KVShrinkSettings(allocation=allocation, **more) for allocation in ("uniform", "spectrum")}

    def error(allocation):
        made = fit_factors(model, recorder, settings[allocation])
        return sum(layer.k_error + layer.v_error for layer in made.layers.values())

    assert error("spectrum") <= error("uniform")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi"])
@pytest.mark.parametrize("group", [0, 1])
def test_value_decoders_fold_into_the_output_projection(family, group):
    model = model_of(family)
    factors = shrink_kv(model, TEXT, KVShrinkSettings(k_ratio=0.5, v_ratio=0.5, v_metric="plain", head_group=group))
    block, values = attention_blocks(model)[1], factors.layers[1].values.to(dtype=torch.float64)
    folded = folded_output(block, values)
    heads = config_of(family).num_key_value_heads if family != "gpt_neox" else 4
    groups = folded.shape[0] // (heads * values.rank)
    codes = torch.randn(5, values.rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(heads, groups, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rebuilt = torch.einsum("hgt,thd->hgd", weights, values.rebuild(codes).unflatten(1, (heads, -1))).flatten()
    layer = getattr(block.module, "o_proj", None) or block.module.dense
    expected = rebuilt @ layer.weight.detach().double().T
    torch.testing.assert_close((weights @ codes).flatten() @ folded, expected)
    with pytest.raises(LossplugError, match="coded about a mean"):
        folded_output(block, dataclasses.replace(values, mean=torch.zeros(values.width)))


def test_memory_does_not_grow_with_the_text():
    model = model_of("llama")

    def held(count):
        recorder = record_moments(model, (tokens(2, 40, seed) for seed in range(count)))
        state = [layer.state_dict() for layer in recorder.layers.values()]
        assert recorder.tokens == count * 2 * 36
        return sum(t.untyped_storage().nbytes() for t in tensors_in(state))

    assert held(2) == held(9)
    endless = (tokens(2, 40, seed) for seed in range(3))  # a generator is gone through once
    assert shrink_kv(model, endless, KVShrinkSettings()).tokens == 3 * 2 * 36


def tensors_in(thing):
    if isinstance(thing, torch.Tensor):
        return [thing]
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else []
    return [t for part in parts for t in tensors_in(part)]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi"])
def test_the_output_metric_counts_errors_after_the_projection(family):
    model = model_of(family)
    block = attention_blocks(model)[1]
    layer = getattr(block.module, "o_proj", None) or block.module.dense
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    # a single token attends to itself, so that every query head puts out the value of its group
    moments = record_moments(model, [tokens(1, 1)], sinks=0).layers[1].values
    handle.remove()
    size = getattr(block.module, "head_dim", None) or block.module.head_size
    heads = seen[0].detach().double().view(-1, 1, size)
    weights = layer.weight.detach().double().T.view(len(heads), size, -1)
    expected = float((heads @ weights).square().sum())  # of each head's part of the output
    metric = output_metric(block, moments.width)
    blocks = torch.block_diag(*[torch.ones(size, size)] * (moments.width // size))
    assert float((metric * blocks * moments.gram).sum()) == pytest.approx(expected, rel=1e-4)
    assert bool((metric[blocks == 0] == 0).all())


def test_saved_beside_a_model_and_loaded(tmp_path):
    import transformers

    model = model_of("llama")
    made = shrink_kv(model, TEXT, KVShrinkSettings(k_ratio=0.5, v_ratio=0.25, k_bits=8, window=3, means=True))
    model.save_pretrained(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    save_kv_factors(made, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "kv_factors.json", "kv_factors.safetensors"])
    loaded = load_kv_factors(tmp_path)
    assert loaded.settings == made.settings
    assert loaded.summary(4) == made.summary(4)
    for index, layer in made.layers.items():
        assert torch.equal(loaded.layers[index].keys.decode, layer.keys.decode)
        assert torch.equal(loaded.layers[index].values.mean, layer.values.mean)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens(1, 12)
    one, two = (
        m.generate(input_ids=ids, max_new_tokens=20, do_sample=False, past_key_values=ChannelShrunkCache(m, f))
        for m, f in ((model, made), (again, loaded))
    )
    assert torch.equal(one, two)


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(LossplugError, match=r"there is no kv_factors.json"):
        load_kv_factors(tmp_path)
    made = shrink_kv(model_of("llama"), TEXT)
    save_kv_factors(made, tmp_path)
    (tmp_path / "kv_factors.safetensors").write_bytes(b"nothing")
    with pytest.raises(LossplugError, match="can't be read"):
        load_kv_factors(tmp_path)
    save_kv_factors(made, tmp_path)
    plain = json.loads((tmp_path / "kv_factors.json").read_text())
    (tmp_path / "kv_factors.json").write_text(json.dumps({**plain, "format": 9}))
    with pytest.raises(LossplugError, match="format 9, known is 1"):
        load_kv_factors(tmp_path)


def test_too_little_text_says_how_much_is_needed():
    with pytest.raises(LossplugError, match=r"has 16 tokens, at least 32 are needed for 16 channels"):
        shrink_kv(model_of("llama"), [tokens(1, 20)])


def test_a_rank_of_nothing_and_a_budget_of_nothing():
    with pytest.raises(LossplugError, match="keys of layer 0: the rank rounds to 0"):
        shrink_kv(model_of("llama"), TEXT, KVShrinkSettings(k_ratio=0.99))
    with pytest.raises(LossplugError, match=r"too small: some rank rounds to 0. Give at least 24 bytes"):
        shrink_kv(model_of("llama"), TEXT, KVShrinkSettings(budget=0.01))


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "gets no rotary tables"),
        ("opt", {"hidden_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 32, "num_attention_heads": 4}, "no rotary"),
        ("mistral", {"hidden_size": 32, "num_hidden_layers": 2, "sliding_window": 8}, "only 2 of sliding_attention"),
    ],
)
def test_models_that_can_not_be_shrunk(kind, fields, words):
    import transformers

    fields = {"vocab_size": 97, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **fields}
    if kind != "mistral":
        fields.pop("intermediate_size")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **fields))
    with pytest.raises(LossplugError, match=words):
        attention_blocks(model)


def test_a_module_without_attention():
    with pytest.raises(LossplugError, match=r"Linear has no layer with full attention and a cache. Give a decoder"):
        attention_blocks(nn.Linear(2, 2))


def test_unsupported_attention_implementation():
    model = model_of("olmo2")
    made = shrink_kv(model, TEXT)
    config = model.model.layers[0].self_attn.config
    before = config._attn_implementation
    try:
        config._attn_implementation = "paged|sdpa"
        with pytest.raises(LossplugError, match=r"'paged\|sdpa' is not supported"):
            ChannelShrunkCache(model, made)
    finally:
        config._attn_implementation = before


def test_every_family_has_its_layers():
    for family in FAMILIES:
        layers = attention_blocks(model_of(family))
        assert sorted(layers) == ([1, 2] if family in ("gemma2", "gemma3") else [0, 1, 2])


def test_settings_are_plain_values():
    assert KVShrinkSettings(**dataclasses.asdict(KVShrinkSettings(budget=0.2))) == KVShrinkSettings(budget=0.2)


@pytest.mark.parametrize("family", ["llama_yarn", "phi"])
def test_gradients_predict_what_an_error_costs(family):
    model, ids = model_of(family), tokens(2, 12)
    recorder = record_moments(model, [ids], sinks=0, gradients=True)
    assert recorder.tokens == 24
    assert all(p.requires_grad for p in model.parameters())
    block = attention_blocks(model)[1]
    heads = recorder.layers[1].keys.width // 8
    seen = {}

    def hook(module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]

        def see(keys, values):
            plain = block.rotary.unrotate(keys, cos, sin).detach().requires_grad_()
            seen["keys"], seen["values"] = plain, values.detach().requires_grad_()
            return block.rotary.rotate(plain, cos, sin), seen["values"]

        return args, {**kwargs, block.cache: Tap(see, None)}

    handle = block.module.register_forward_pre_hook(hook, with_kwargs=True)
    (model(input_ids=ids, labels=ids, use_cache=False).loss * 22).backward()
    handle.remove()
    model.zero_grad()
    for name, moments in zip(("keys", "values"), recorder.layers[1].gradients, strict=True):
        g = join_heads(seen[name].grad).flatten(0, 1).double()
        assert g.shape[1] == 8 * heads
        torch.testing.assert_close(moments.gram, g.T @ g, rtol=1e-3, atol=1e-6)
        assert moments.count == 24
    again = MomentRecorder(model)
    again.load_state_dict(recorder.state_dict())
    assert torch.equal(again.layers[1].gradients[0].gram, recorder.layers[1].gradients[0].gram)


def test_sensitivity_spends_where_the_loss_is(monkeypatch):
    model = model_of("llama")
    recorder = record_moments(model, TEXT, gradients=True)
    for pair in recorder.layers[1].gradients, recorder.layers[2].gradients:
        for moments in pair:
            moments.gram *= 1e-9  # only layer 0 matters
    made = fit_factors(model, recorder, KVShrinkSettings(budget=0.5, allocation="sensitivity"))
    assert shrunk_token_bytes(made.branches(), 4) <= 192
    assert made.layers[0].keys.rank + made.layers[0].values.rank > 25
    settings = {m: KVShrinkSettings(k_ratio=0.5, v_ratio=0.5, k_metric=m, v_metric=m) for m in ("plain", "gradient")}
    found = {m: fit_factors(model, recorder, s).layers[0] for m, s in settings.items()}
    metric = recorder.layers[0].gradients[0].second(centred=False)
    second = recorder.layers[0].keys.second(centred=False)

    def cost(factors):
        rest = torch.eye(16, dtype=torch.float64) - factors.encode.double() @ factors.decode.double()
        return float((rest.T @ second @ rest * metric).sum())

    assert cost(found["gradient"].keys) < cost(found["plain"].keys)
    with pytest.raises(LossplugError, match="the calibration has no gradients"):
        fit_factors(model, record_moments(model, TEXT), KVShrinkSettings(allocation="sensitivity"))
    with pytest.raises(LossplugError, match="LlamaModel computes no loss"):
        record_moments(model.model, TEXT, gradients=True)


def test_head_groups_have_codes_of_their_own():
    model = model_of("gpt_neox")  # four heads of 8
    recorder = record_moments(model, TEXT)
    errors = []
    for group in (4, 2, 1, 0):
        settings = KVShrinkSettings(k_ratio=0.5, v_ratio=0.5, head_group=group)
        made = fit_factors(model, recorder, settings)
        errors.append(sum(layer.k_error + layer.v_error for layer in made.layers.values()))
        outside = torch.block_diag(*[torch.ones(8 * group, 4 * group)] * (4 // group)) == 0 if group else None
        assert made.layers[0].keys.rank == 16
        assert group == 0 or bool((made.layers[0].keys.encode[outside] == 0).all())
    assert errors[0] == pytest.approx(errors[3])
    assert errors[0] <= errors[1] <= errors[2]
    with pytest.raises(LossplugError, match="4 heads and rank 16, which can't be coded in groups of 3"):
        fit_factors(model, recorder, KVShrinkSettings(k_ratio=0.5, v_ratio=0.5, head_group=3))


def test_autocast_moves_moments_by_the_rounding_of_bfloat16():
    model = model_of("llama")
    exact, rounded = (record_moments(model, TEXT, autocast=autocast) for autocast in (False, True))
    for index in exact.layers:
        for name in ("keys", "values"):
            one, two = (getattr(r.layers[index], name).gram for r in (exact, rounded))
            assert one.dtype == two.dtype == torch.float64
            assert not torch.equal(one, two)
            assert (one - two).norm() < 0.02 * one.norm()
    assert not torch.is_autocast_enabled("cpu")
