"""The scripts of post-training quantisation run on small models; the evidence itself takes their own commands."""

import json

import post_training_smollm2
import post_training_vision
import pytest
import timm
import tokenizers
import torch
import transformers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    fields = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    return str(folder)


def test_every_run_on_a_small_language_model(model, tmp_path):
    output = tmp_path / "r.json"
    small = ["--block-size", "16", "--calibration", "4", "--test", "2", "--iters", "2"]
    post_training_smollm2.main(["--output", str(output), "--model", model, *small])
    found = json.loads(output.read_text())
    assert [r["run"] for r in found] == list(post_training_smollm2.RUNS)
    assert all(100 < r["perplexity"] < 1000 for r in found)


def test_crops_are_those_of_their_seed_and_every_layer_is_taken():
    pictures = post_training_vision.photographs()
    assert pictures
    a, b, c = (post_training_vision.crops(pictures[:1], 2, seed) for seed in (0, 0, 1))
    assert a.shape == (2, 3, 224, 224)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    names = post_training_vision.every_layer(timm.create_model("tf_efficientnet_lite0", pretrained=False))
    assert names[0] == "conv_stem"
    assert names[-1] == "classifier"
    assert len(names) == 50
