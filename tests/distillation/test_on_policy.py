"""Completions the student samples itself, corrections, adaptive choice, and exact means over windows of tokens."""

import lightning.pytorch as pl
import pytest
import torch
from distillation_runs import Plain, data, network, same, trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from test_online_distillation import LLAMA, llama
from torch.utils.data import DataLoader

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import Distillation, ExactResume, OnlineDistillation
from lightning_lossplug.distillation import OnPolicy, cache_teacher, correction_position, create
from lightning_lossplug.distillation.on_policy import IGNORED, Sampler, complete, corrected, pack, prompts
from lightning_lossplug.integrations import CausalLM

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"max_new_tokens": 5}


def instructions(n=8):
    """Prompts of 2 or 3 tokens, then answers of 2 to 5, padded on the right."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 32, (n, 7), generator=g)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for i in range(n):
        labels[i, : 2 + i % 2] = IGNORED
        mask[i, 5 + i % 3 :] = 0
    labels[mask == 0] = IGNORED
    rows = [{"input_ids": a, "attention_mask": m, "labels": b} for a, m, b in zip(ids, mask, labels, strict=True)]
    return DataLoader(rows, 4, generator=torch.Generator().manual_seed(0))


class Seen(CausalLM):
    """Keeps the batches of its steps."""

    def training_step(self, batch, batch_idx):
        self.batches = [*getattr(self, "batches", []), batch]
        return super().training_step(batch, batch_idx)


def module(**fields):
    torch.manual_seed(0)
    return Seen(from_config={**LLAMA, "attention_dropout": 0.3, **fields})


class Losses(pl.Callback):
    def __init__(self):
        self.values = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.values.append(loss.detach().clone())


def test_steps_on_the_students_own_text():
    student, recorder = module(), Losses()
    teacher = llama(2)
    callback = Distillation(teacher, "gkd", on_policy=OnPolicy(1.0, **SMALL))
    trainer(callback, recorder).fit(student, instructions())
    for made, given, value in zip(student.batches, instructions(), recorder.values, strict=True):
        begun = prompts(given, OnPolicy())
        for row, mask, labels, prompt in zip(
            made["input_ids"], made["attention_mask"], made["labels"], begun, strict=True
        ):
            tokens = row[mask.bool()].tolist()
            assert tokens[: len(prompt)] == prompt
            assert (labels[: len(prompt)] == IGNORED).all()
            assert labels[len(prompt) : len(tokens)].tolist() == tokens[len(prompt) :]
            assert (labels[len(tokens) :] == IGNORED).all()
            new = tokens[len(prompt) :]
            assert 1 <= len(new) <= 5
            assert 2 not in new[:-1]  # Llama's end token ends a completion
        assert value > 0
    torch.testing.assert_close(recorder.values[-1], callback.logs["kd"])  # the module's own loss doesn't count
    assert student.model.training
    first = student.batches[0]
    with torch.no_grad():
        fresh = module().model.train()
        torch.manual_seed(1)
        z_s = fresh(first["input_ids"], attention_mask=first["attention_mask"]).logits[:, :-1]
        z_t = teacher.eval()(first["input_ids"], attention_mask=first["attention_mask"]).logits[:, :-1]
    loss = create("gkd")(z_s, z_t, first["labels"][:, 1:])
    assert loss.isfinite()


def test_never_is_the_same_bits_and_sometimes_follows_the_seed():
    states = []
    for option in (None, 0.0):
        student = module()
        torch.manual_seed(3)
        trainer(Distillation(llama(2), "gkd", on_policy=option)).fit(student, instructions())
        states.append(student.state_dict())
    assert same(*states)
    chosen = [Sampler(OnPolicy(0.5, seed=seed)).choose(0.0) for seed in range(200)]
    assert 60 < chosen.count("student") < 140
    assert set(chosen) == {"student", "data"}


def test_the_teachers_text_counts_for_the_module_too():
    student, recorder = module(), Losses()
    callback = Distillation(llama(2), "gkd", on_policy=OnPolicy(0.0, seq_kd=True, **SMALL))
    trainer(callback, recorder).fit(student, instructions())
    assert recorder.values[-1] > callback.logs["kd"]
    assert not torch.equal(student.batches[0]["input_ids"], next(iter(instructions()))["input_ids"])


@pytest.mark.parametrize("adaptive", [False, True])
def test_resumes_bit_by_bit(tmp_path, adaptive):
    how = OnPolicy(0.6, adaptive=adaptive, monitor="train_loss", tolerance=0.0, buffer=6, **SMALL)

    def run(save, ckpt_path=None):
        class Saver(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if save and trainer.current_epoch == 1:
                    trainer.save_checkpoint(tmp_path / "middle.ckpt")

        student, callback = module(), Distillation(llama(2), "distillm", on_policy=how)
        if adaptive and ckpt_path is None:
            callback.sampler.threshold = 0.7

            class Start(pl.Callback):
                def on_train_start(self, trainer, pl_module):
                    callback.sampler.threshold = 0.7

            start = [Start()]
        else:
            start = []
        torch.manual_seed(4)
        trainer(callback, ExactResume(), Saver(), *start, max_epochs=4).fit(
            student, instructions(), ckpt_path=ckpt_path
        )
        return student.state_dict(), callback.sampler.state_dict()

    straight, resumed = run(True), run(False, tmp_path / "middle.ckpt")
    assert same(straight[0], resumed[0])
    assert straight[1] == resumed[1]
    assert bool(straight[1]["kept"]) is adaptive


def test_adaptive_choice():
    sampler = Sampler(OnPolicy(adaptive=True, tolerance=0.1, buffer=2))
    for value, threshold in ((3.0, 0.0), (2.0, 0.0), (2.05, 0.0), (2.2, 0.1), (1.0, 0.1), (1.1, 0.2)):
        sampler.validated(value)
        assert sampler.threshold == pytest.approx(threshold)
    sampler.threshold = 1.0
    assert {sampler.choose(0.99) for _ in range(50)} == {"student"}  # the buffer is empty
    sampler.keep(pack([([5, 6, 7], 1), ([8, 9], 1), ([4, 4], 1)], torch.device("cpu")))
    assert sampler.kept == [([8, 9], 1), ([4, 4], 1)]
    drawn = [sampler.choose(0.9) for _ in range(300)]
    assert drawn.count("replay") > 200
    assert {"student", "replay"} == set(drawn)
    again = sampler.replay(3, torch.device("cpu"))
    assert {tuple(row.tolist()) for row in again["input_ids"]} <= {(8, 9), (4, 4)}


def test_corrections_start_where_the_models_differ_most():
    z_s, z_t = torch.zeros(3, 4, 5), torch.zeros(3, 4, 5)
    z_s[..., 0] = 1.0
    z_t[..., 0] = 1.0
    z_t[0, 1, 0], z_t[0, 1, 2] = 0.0, 2.0
    z_t[0, 2, 0], z_t[0, 2, 3] = 0.0, 9.0
    z_t[1, 3, 0] = 50.0  # far away, with the same top token
    z_t[2, 0, 4] = 30.0  # not in the mask
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[2, 0] = False
    assert correction_position(z_s, z_t, mask).tolist() == [2, -1, -1]
    student, teacher = module().model, llama(2).eval()
    how = OnPolicy(**SMALL)
    torch.manual_seed(0)
    rows = [(tokens, 2) for tokens in complete(student, [[5, 6], [7, 8]], how, torch.device("cpu"))]
    mended = corrected(student, teacher, rows, how, torch.device("cpu"))
    for (before, prompt), (after, same_prompt) in zip(rows, mended, strict=True):
        assert prompt == same_prompt
        assert before[:prompt] == after[:prompt]
        assert len(after) <= prompt + 5
        at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
        if at is not None:
            with torch.no_grad():
                top = teacher(torch.tensor([after[:at]])).logits[0, -1].argmax()
            assert after[at] == top or before != after
    assert student.training
    trained = Distillation(teacher, "gkd", on_policy=OnPolicy(1.0, corrections=1, **SMALL))
    trainer(trained).fit(module(), instructions())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distillation(llama(2), "gkd", on_policy=1.5), "fraction is 1.5"),
        (lambda: Distillation(llama(2), "gkd", on_policy=OnPolicy(temperature=0.0)), "temperature is 0.0"),
        (lambda: Distillation(llama(2), "gkd", on_policy=OnPolicy(1.0, adaptive=True, buffer=0)), "buffer is 0"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(LossplugError, match=message):
        make()


def test_mistakes_are_one_line(tmp_path):
    whole = [{**row, "labels": row["input_ids"]} for row in instructions().dataset]
    cases = [
        (Distillation(llama(2), "gkd", on_policy=1.0), module(), DataLoader(whole, 4), "has no prompt"),
        (Distillation(network(5), "kd", on_policy=1.0), Plain(), data(), "has no 'input_ids'"),
        (
            Distillation(llama(2), "gkd", on_policy=OnPolicy(adaptive=True, monitor="nope", **SMALL)),
            module(),
            instructions(),
            "watches 'nope', which was not logged",
        ),
    ]
    for callback, student, loader, message in cases:
        with pytest.raises(LossplugError, match=message) as error:
            trainer(callback).fit(student, loader, loader)
        assert "\n" not in str(error.value)
    cache_teacher(network(seed=5), data(), tmp_path)
    with pytest.raises(LossplugError, match="on_policy needs a teacher that runs"):
        Distillation(f"cache:{tmp_path}", on_policy=0.5)
    trainer(Distillation(llama(2), "gkd", on_policy=OnPolicy(1.0, prompt_tokens=3, **SMALL))).fit(
        module(), DataLoader(whole, 4)
    )


class Sgd(CausalLM):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def sure():
    """A teacher that says something."""
    made = llama(2)
    with torch.no_grad():
        made.lm_head.weight.mul_(100)
    return made


@pytest.mark.parametrize("loss", ["gkd", "topk_logits", "fused"])
def test_a_window_is_one_large_batch(loss, tmp_path):
    """Ragged batches: the mean over all tokens of the window, not the mean of the batches' means."""

    def run(batch_size, window, normalize):
        torch.manual_seed(0)
        student = Sgd(from_config=LLAMA)
        loader = DataLoader(instructions().dataset, batch_size)
        source, name = sure(), "gkd" if loss == "fused" else loss
        if loss == "topk_logits":
            cache_teacher(sure(), instructions(), tmp_path, k=4)
            source = f"cache:{tmp_path}"
        callback = Distillation(source, name, ce_weight=0.0, normalize=normalize, fused=loss == "fused")
        trainer(callback, accumulate_grad_batches=window, max_epochs=2).fit(student, loader)
        return student.state_dict()

    whole, exact, plain = run(8, 1, "batch"), run(2, 4, "window"), run(2, 4, "batch")
    for key, value in whole.items():
        torch.testing.assert_close(exact[key], value, rtol=1e-4, atol=1e-6)
    assert max((plain[k] - v).abs().max() for k, v in whole.items()) > 1e-5
    with pytest.raises(LossplugError, match="goes with a loss of logits alone"):
        Distillation(llama(2), "gkd", normalize="window", align="all")


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_window_is_one_large_batch_for_teachers_that_learn(precision):
    def run(batch_size, window, normalize):
        torch.manual_seed(0)
        student, batches = Sgd(from_config=LLAMA), DataLoader(instructions().dataset, batch_size)
        off = {"ce_weight": 0.0, "teacher_ce_weight": 0.0}
        callback = OnlineDistillation(sure(), "bdkd", lr_scale=0.5, normalize=normalize, **off)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]} if precision == "16-mixed" else {}
        trainer(callback, accumulate_grad_batches=window, max_epochs=2, **options).fit(student, batches)
        return student.state_dict(), callback.teachers[0].state_dict()

    whole, exact, plain = run(8, 1, "batch"), run(2, 4, "window"), run(2, 4, "batch")
    close = {"rtol": 1e-4, "atol": 1e-6} if precision == "32-true" else {"rtol": 2e-2, "atol": 2e-3}
    for want, found, naive in zip(whole, exact, plain, strict=True):
        for key, value in want.items():
            torch.testing.assert_close(found[key], value, **close)
        error, other = (max((got[k] - v).abs().max() for k, v in want.items()) for got in (found, naive))
        assert other > 3 * error
    with pytest.raises(LossplugError, match="normalize is 'all'"):
        OnlineDistillation(llama(2), "bdkd", normalize="all")


def test_an_unfinished_window_of_teachers_that_learn_is_in_the_checkpoint(tmp_path):
    class Saver(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    torch.manual_seed(0)
    batches = list(DataLoader(instructions().dataset, 2))
    callback, student = OnlineDistillation(llama(2), "bdkd", normalize="window"), Sgd(from_config=LLAMA)
    trainer(callback, Saver(), accumulate_grad_batches=2).fit(student, DataLoader(batches, batch_size=None))
    state = torch.load(tmp_path / "middle.ckpt", weights_only=False)["callbacks"][callback.state_key]
    (held,) = state["split"]["ranks"]
    own, taught = (len(list(n.parameters())) for n in (student, callback.teachers))
    assert len(held["weighted"]) == own + taught
    assert all(g is not None for g in held["weighted"][-taught:])
    assert held["tokens"] == sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches[2:3])
