"""DistillationReport in real fits: numbers by hand, no second pass of a teacher, caches, resume."""

import copy

import pytest
import torch
from distillation_runs import CLASSES, Plain, data, network, same, trainer
from lightning.pytorch.loggers import CSVLogger
from test_online_distillation import LLAMA, llama, texts
from torch.utils.data import DataLoader, TensorDataset

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import (
    SAM,
    Distillation,
    DistillationReport,
    OnlineDistillation,
    SelfDistillation,
    read_report,
)
from lightning_lossplug.distillation import cache_teacher
from lightning_lossplug.distillation.report_text import NUMBERS
from lightning_lossplug.integrations import CausalLM
from lightning_lossplug.metrics import CapacityGap

pytestmark = pytest.mark.filterwarnings("ignore")


def held_out(n=48):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 8, generator=g)
    return DataLoader(TensorDataset(x, torch.randint(CLASSES, (n,), generator=g)), 20)


def teacher():
    return network(12, seed=5)


class Counted(torch.nn.Module):
    """A teacher that counts how often it is called, by mode of gradients."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = teacher(), 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


def by_hand(student, frozen, batches):
    metric = CapacityGap(classes=CLASSES)
    for x, y in batches:
        metric.update(student.eval()(x), frozen.eval()(x), y)
    return metric


def test_the_numbers_the_text_and_the_picture(tmp_path):
    module, frozen = Plain(), teacher()
    logger = CSVLogger(tmp_path, name="", version="")
    fitted = trainer(Distillation(frozen), DistillationReport(), max_epochs=3, logger=logger)
    fitted.fit(module, data(), held_out())
    rows = read_report(tmp_path)
    assert [(r["epoch"], r["step"], r["on"]) for r in rows] == [(0, 8, "val"), (1, 16, "val"), (2, 24, "val")]
    metric = by_hand(module.net, frozen, held_out())
    for name, value in metric.compute().items():
        assert rows[-1][name] == pytest.approx(value.item(), abs=1e-6), name
        assert float(fitted.callback_metrics[f"DistillationReport/{name}"]) == pytest.approx(value.item(), abs=1e-6)
    text = (tmp_path / "distillation_report.md").read_text()
    assert "## Distillation KD, teacher Sequential" in text
    assert f"| accuracy | {100 * rows[-1]['student_accuracy']:.2f} % |" in text
    assert "### By the teacher's confidence" in text
    table = metric.per_class()
    behind = (table["teacher"] - table["student"]) * table["count"]
    worst = int(behind.argmax())
    assert text.split("### Classes")[1].splitlines()[4].startswith(f"| {worst} | {int(table['count'][worst])} |")
    assert (tmp_path / "distillation_report.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "distillation_report.csv.part").exists()


@pytest.mark.parametrize("on", ["val", "train"])
def test_the_run_is_the_same_and_the_teacher_runs_no_more_than_once(on, tmp_path):
    def run(*more, agreement=False):
        torch.manual_seed(0)
        module, counted = Plain(dropout=0.2), Counted()
        trainer(Distillation(counted, agreement=agreement), *more, max_epochs=2).fit(module, data(), held_out())
        return module.state_dict(), counted.calls

    alone, calls = run()
    watched, more = run(DistillationReport(str(tmp_path), on=on, plot=False), agreement=on == "val")
    assert same(alone, watched)
    assert calls == 16
    assert more == calls + (2 * 3 if on == "val" else 0)  # with agreement=True too: one pass a batch


def test_training_batches_are_counted_as_they_were_seen(tmp_path):
    module, frozen = Plain("adamw"), teacher()
    first = copy.deepcopy(module.net)
    x, y = next(iter(data(n=8)))
    trainer(Distillation(frozen), DistillationReport(str(tmp_path), on="train", plot=False)).fit(module, data(n=8))
    (row,) = read_report(tmp_path)
    metric = CapacityGap(classes=CLASSES)
    metric.update(first.train()(x), frozen.eval()(x), y)
    assert row["on"] == "train"
    assert row["kl"] == pytest.approx(metric.compute()["kl"].item(), rel=1e-5)
    assert row["student_accuracy"] == metric.compute()["student_accuracy"].item()


def test_a_second_pass_is_not_counted(tmp_path):
    reports = {}
    for name, more in {"alone": [], "sam": [SAM()]}.items():
        report = DistillationReport(str(tmp_path / name), on="train", plot=False)
        trainer(Distillation(teacher()), report, *more).fit(Plain(), data())
        reports[name] = sum(next(iter(report.details.values())).confidence["count"])
    assert reports == {"alone": 64, "sam": 64}


def test_online_teachers_and_averages_have_their_own_rows(tmp_path):
    module = Plain()
    online = OnlineDistillation([network(12, seed=3), network(10, seed=4)], "dml")
    report = DistillationReport(str(tmp_path))
    fitted = trainer(online, SelfDistillation(0.5), report, max_epochs=2)
    fitted.fit(module, data(), held_out())
    rows = read_report(tmp_path)
    assert [(r["callback"], r["teacher"]) for r in rows] == [(0, 0), (0, 1), (1, 0)] * 2
    for row, peer in zip(rows[-3:], [*online.teachers, None], strict=True):
        if peer is not None:
            want = by_hand(module.net, peer, held_out()).compute()
            assert row["teacher_accuracy"] == pytest.approx(want["teacher_accuracy"].item(), abs=1e-6)
            assert row["agreement"] == pytest.approx(want["agreement"].item(), abs=1e-6)
    assert rows[-1]["agreement"] > rows[-2]["agreement"]  # an average of the student says much the same
    names = {"distillation_report_0_0.png", "distillation_report_0_1.png", "distillation_report_1_0.png"}
    assert {p.name for p in tmp_path.glob("*.png")} == names
    assert "DistillationReport/0.1/gap" in fitted.callback_metrics
    assert not any(online.observers.values())


def test_a_cache_of_logits(tmp_path):
    frozen = teacher().eval()
    cache_teacher(frozen, data(), tmp_path / "logits", dtype="float32")
    runs = {}
    for name, given in {"cache": f"cache:{tmp_path / 'logits'}", "network": frozen}.items():
        report = DistillationReport(str(tmp_path / name), on="train", plot=False)
        trainer(Distillation(given), report, max_epochs=2).fit(Plain(), data())
        runs[name] = [{n: row[n] for n in NUMBERS} for row in read_report(tmp_path / name)]
    assert len(runs["cache"]) == 2
    for cached, live in zip(runs["cache"], runs["network"], strict=True):
        assert cached == pytest.approx(live, rel=1e-4, abs=1e-5)
    report = DistillationReport(str(tmp_path), plot=False)
    with pytest.raises(
        LossplugError, match=r"in validation: .* has no logits of .* Say DistillationReport\(on='train'\)"
    ):
        trainer(Distillation(f"cache:{tmp_path / 'logits'}"), report).fit(Plain(), data(), held_out())
    cache_teacher(frozen, [*data(), *held_out()], tmp_path / "both", dtype="float32")
    module = Plain()
    trainer(Distillation(f"cache:{tmp_path / 'both'}"), report).fit(module, data(), held_out())
    want = by_hand(module.net, frozen, held_out()).compute()
    assert read_report(tmp_path)[-1]["gap"] == pytest.approx(want["gap"].item(), abs=1e-6)


def test_a_resumed_run_continues_the_table(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"

    def run(folder, epochs, ckpt_path=None):
        report = DistillationReport(str(folder), plot=False)
        fitted = trainer(Distillation(teacher()), report, max_epochs=epochs)
        fitted.fit(Plain("adamw"), data(), held_out(), ckpt_path=ckpt_path)
        return fitted

    run(straight, 4)
    run(resumed, 2).save_checkpoint(tmp_path / "a.ckpt")
    run(resumed, 3)  # anew: its table begins anew
    assert len(read_report(resumed)) == 3
    run(resumed, 4, tmp_path / "a.ckpt")  # what came after the checkpoint is dropped
    assert read_report(resumed) == read_report(straight)


def test_language_models(tmp_path):
    torch.manual_seed(0)
    module, frozen = CausalLM(from_config=LLAMA), llama(2)
    callbacks = [Distillation(frozen, "gkd", fused=True), DistillationReport(str(tmp_path))]
    trainer(*callbacks, max_steps=2, max_epochs=-1).fit(module, texts(), texts())
    row = read_report(tmp_path)[-1]
    assert row["kl"] > 0
    assert 0 <= row["agreement"] <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [DistillationReport(folder)], "there is no distillation in this run"),
        (lambda folder: [DistillationReport(folder, on="test")], "on is 'test'"),
        (lambda folder: [DistillationReport(folder, bins=0)], "bins is 0"),
        (
            lambda folder: [
                Distillation(teacher(), None, feature_loss="fitnet", layers={"0": "0"}),
                DistillationReport(folder, on="train"),
            ],
            "compares features alone",
        ),
    ],
)
def test_mistakes_are_one_line(make, message, tmp_path):
    with pytest.raises(LossplugError, match=message) as error:
        trainer(*make(str(tmp_path))).fit(Plain(), data())
    assert "\n" not in str(error.value)


def test_more_mistakes(tmp_path):
    top = tmp_path / "top"
    cache_teacher(teacher(), data(), top, k=2)
    callbacks = [Distillation(f"cache:{top}", "topk_logits"), DistillationReport(str(tmp_path), on="train")]
    with pytest.raises(LossplugError, match="its cache holds the largest log-probabilities alone"):
        trainer(*callbacks).fit(Plain(), data())
    callbacks = [Distillation(network(classes=7), "uld"), DistillationReport(str(tmp_path), on="train")]
    with pytest.raises(LossplugError, match="the student has 4 classes or tokens, the teacher 7"):
        trainer(*callbacks).fit(Plain(), data())
    with pytest.warns(UserWarning, match="nothing to report: no validation ran"):
        trainer(Distillation(teacher()), DistillationReport(str(tmp_path))).fit(Plain(), data())
    (tmp_path / "distillation_report.csv").write_text("a,b\n1,2\n")
    with pytest.raises(LossplugError, match="the table has other columns"):
        read_report(tmp_path)
