"""``lossplug cache-teacher``: logits of a checkpoint's network for the training split, and training from them."""

import json

from commands import FIT

from lightning_lossplug.distillation import CachedTeacher


def test_store_go_on_and_train(cli, checkpoint):
    command = ["cache-teacher", f"checkpoint:{checkpoint}", "--data=DigitsData", "--data.train_limit=128"]
    done = cli(*command, "-o", "logits", "--json")
    assert done.code == 0, done
    found = json.loads(done.out)
    assert (found["samples"], found["classes"], found["complete"]) == (128, 10, True)
    again = cli(*command, "-o", "logits")
    assert again.code == 0
    assert "10 logits" in again.out
    assert 'Distillation("cache:logits")' in again.out
    assert CachedTeacher("logits").manifest == found
    callback = ["--trainer.callbacks+=Distillation", "--trainer.callbacks.teacher=cache:logits"]
    trained = cli(*FIT, *callback)
    assert trained.code == 0, trained
    other = ["--data.train_limit=200"]
    missing = cli(*[a for a in FIT if "train_limit" not in a], *other, *callback)
    assert missing.code == 2
    assert "has no logits of" in missing.err
    assert len(missing.err.strip().splitlines()) == 1


def test_top_k(cli, checkpoint):
    done = cli(
        "cache-teacher",
        f"checkpoint:{checkpoint}",
        "--data=DigitsData",
        "--data.train_limit=64",
        "--top-k=3",
        "-o",
        "k",
    )
    assert done.code == 0, done
    assert "3 of 10 log-probabilities" in done.out
    assert '"topk_logits"' in done.out


def test_mistakes(mistake, checkpoint):
    teacher = f"checkpoint:{checkpoint}"
    data = "--data=DigitsData"
    assert "Add --data" in mistake("cache-teacher", teacher, "-o", "x")
    assert "has no kind" in mistake("cache-teacher", "resnet", data, "-o", "x")
    assert "has no '='" in mistake("cache-teacher", teacher, data, "-o", "x", "--option", "a")
    assert "no whole number" in mistake("cache-teacher", teacher, data, "-o", "x", "--top-k", "0")
    assert "--output" in mistake("cache-teacher", teacher, data)
