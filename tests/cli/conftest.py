"""One tiny trained run and its export, shared by the tests of the commands."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import FIT, LOSS, SPARSE, SWAP, Done, command


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """``lossplug`` in an empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return command


@pytest.fixture
def mistake(cli: Callable[..., Done]) -> Callable[..., str]:
    """Runs a command that has to fail: exit code 2, one line, nothing written. Returns the line."""

    def run(*arguments: object) -> str:
        before = sorted(Path.cwd().rglob("*"))
        done = cli(*arguments)
        assert done.code == 2, done
        lines = done.err.strip().splitlines()
        assert len(lines) == 1, done.err
        assert lines[0].startswith("lossplug: error: ")
        assert sorted(Path.cwd().rglob("*")) == before
        return lines[0]

    return run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished 2:4 run with a swapped loss."""
    root = tmp_path_factory.mktemp("run")
    before = Path.cwd()
    os.chdir(root)
    try:
        done = command(*FIT, *SWAP, f"{LOSS}=poly_loss", *SPARSE)
    finally:
        os.chdir(before)
    assert done.code == 0, done
    return root / "lossplug_runs" / "version_0"


@pytest.fixture(scope="session")
def checkpoint(run: Path) -> Path:
    """Its last checkpoint."""
    return run / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export for timm."""
    folder = tmp_path_factory.mktemp("export") / "artifact"
    done = command("export", checkpoint, "--output", folder)
    assert done.code == 0, done
    return folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Llama with a tokenizer of bytes."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("language_model")
    torch.manual_seed(0)
    fields = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: 3 + i for i, letter in enumerate(alphabet)}}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of English."""
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text("the quick brown fox jumps over the lazy dog, and so on. " * 12)
    return file
