"""OFD, CRD, feature affinity, groups of attention maps, spectra: identities and gradients in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from distillation_runs import data, trainer
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import Distillation
from lightning_lossplug.distillation import create, negative_margin
from lightning_lossplug.distillation.crd import nce
from lightning_lossplug.distillation.faqd import pixels
from lightning_lossplug.distillation.spectral_kd import spectral_distance, spectrum_weights

D = torch.float64


def maps(*channels, n=2, side=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, c, side, side, generator=g, dtype=D) for c in channels]


def test_negative_margin_is_the_mean_of_the_negative_part():
    mean, std = torch.tensor([0.3, -0.5, 0.0, 9.0], dtype=D), torch.tensor([1.0, 2.0, 0.7, 1.0], dtype=D)
    found = negative_margin(mean, std)
    x = mean[:, None] + std[:, None] * torch.special.ndtri(torch.linspace(0, 1, 2_000_003, dtype=D)[1:-1])
    for i in range(3):
        assert found[i].item() == pytest.approx(x[i][x[i] < 0].mean().item(), rel=1e-4)
    assert found[3] == -3.0  # almost nothing is negative
    assert negative_margin(torch.zeros(1, dtype=D), torch.ones(1, dtype=D)).item() == pytest.approx(
        -math.sqrt(2 / math.pi)
    )


def test_ofd_penalises_only_what_the_relu_lets_through():
    s, t = maps(3, 3)
    s.requires_grad_()
    margin = torch.tensor([-0.5, -1.0, -0.1], dtype=D)
    loss = create("ofd", scale=1.0, margins=[margin])
    target = torch.maximum(t, margin[None, :, None, None])
    want = sum(
        ((a - b) ** 2).item() for a, b in zip(s.flatten(), target.flatten(), strict=True) if not (a <= b and b <= 0)
    )
    torch.testing.assert_close(loss(s, t), torch.tensor(want / 2, dtype=D))
    assert torch.autograd.gradcheck(lambda f: loss(f, t), (s,))
    assert loss(target, t) == 0
    assert loss(torch.full_like(t, -9.0), torch.full_like(t, -0.01)) == 0
    three = create("ofd", scale=1e-3, margins=[margin] * 3)
    torch.testing.assert_close(three([s] * 3, [t] * 3), 1e-3 * loss(s, t) * (1 / 4 + 1 / 2 + 1))
    with pytest.raises(LossplugError, match="differ"):
        create("ofd")(*maps(3, 4))


class Convolutional(nn.Module):
    """A network whose batch norms can be named."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(1, width, 1), nn.BatchNorm2d(width), nn.Linear(8 * width, 4)

    def forward(self, x):
        return self.head(self.bn(self.conv(x[:, None, :, None])).relu().flatten(1))


def test_ofd_in_the_callback_reads_margins_and_trains_connectors():
    from distillation_runs import Plain

    module, teacher = Plain(), Convolutional(6)
    module.net = Convolutional(3)
    callback = Distillation(teacher, None, feature_loss="ofd", layers={"bn": "bn"})
    trainer(callback).fit(module, data())
    torch.testing.assert_close(
        callback.feature_loss.margins[0], negative_margin(teacher.bn.bias.detach(), teacher.bn.weight.detach().abs())
    )
    assert len(list(callback.trained.parameters())) == 3
    assert callback.logs["features"] > 0
    with pytest.raises(LossplugError, match="Conv2d is no batch norm"):
        trainer(Distillation(teacher, None, feature_loss="ofd", layers={"bn": "conv"})).fit(module, data())


def test_crd_equals_its_definition_and_moves_its_memories():
    torch.manual_seed(0)
    n, k = 20, 6
    loss = create("crd", student_dim=3, teacher_dim=4, n_data=n, feat_dim=5, k=k).double()
    s, t, index = torch.randn(4, 3, dtype=D, requires_grad=True), torch.randn(4, 4, dtype=D), torch.arange(4) * 3
    before = {name: loss.state_dict()[name].clone() for name in ("memory_student", "memory_teacher")}
    drawn = []
    original = loss.negatives
    loss.negatives = lambda i: drawn.append(original(i)) or drawn[-1]
    found = loss(s, t, index)
    v_s, v_t = F.normalize(loss.embeddings["student"](s), dim=1), F.normalize(loss.embeddings["teacher"](t), dim=1)
    want = 0
    for anchors, memory in ((v_s, before["memory_teacher"]), (v_t, before["memory_student"])):
        rows = torch.cat([index[:, None], drawn[0]], 1)
        scores = torch.stack([(memory[r] @ v / 0.07).exp() for r, v in zip(rows, anchors, strict=True)])
        p = scores / (scores.detach().mean() * n)
        h = p / (p + k / n + 1e-7)
        want = want - (h[:, 0].log().sum() + ((k / n) / (p[:, 1:] + k / n + 1e-7)).log().sum()) / 4
    torch.testing.assert_close(found, want)
    moved = F.normalize(0.5 * before["memory_student"][index] + 0.5 * v_s, dim=1)
    torch.testing.assert_close(loss.memory_student[index], moved)
    rest = [i for i in range(n) if i not in index]
    assert torch.equal(loss.memory_student[rest], before["memory_student"][rest])
    found.backward()
    assert s.grad.abs().sum() > 0
    assert not loss.memory_student.requires_grad
    z = loss.z.clone()
    loss(s, t, index)
    assert torch.equal(loss.z, z)  # set once
    again = create("crd", student_dim=3, teacher_dim=4, n_data=n, feat_dim=5, k=k).double()
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.z, z)


def test_crd_negatives_are_of_other_classes():
    labels = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0, 0])
    loss = create("crd", student_dim=2, teacher_dim=2, n_data=10, feat_dim=2, k=500, labels=labels)
    index = torch.arange(10)
    drawn = loss.negatives(index)
    assert (labels[drawn] != labels[:, None]).all()
    for i in range(10):
        assert set(drawn[i].tolist()) == {j for j in range(10) if labels[j] != labels[i]}
    assert nce(torch.tensor([[1e9, 0.0]], dtype=D), 1, 10) < 1e-5  # positives sure, negatives rejected
    with pytest.raises(LossplugError, match="one class"):
        create("crd", student_dim=2, teacher_dim=2, n_data=3, labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(LossplugError, match="outside the 10 samples"):
        loss(torch.randn(1, 2), torch.randn(1, 2), torch.tensor([10]))


def test_affinities():
    s, t = maps(3, 4, side=4)
    s.requires_grad_()
    affinity = lambda f: pixels(f) @ pixels(f).mT  # noqa: E731
    gap = affinity(s) - affinity(t)
    one, two = (create("faqd", order=order, connector=False) for order in (1, 2))
    torch.testing.assert_close(one(s, t), gap.abs().sum() / 16**2 / 2)
    torch.testing.assert_close(two(s, t), torch.linalg.vector_norm(gap, dim=(1, 2)).mean() / 16)
    legacy = create("faqd", order=2, connector=False, legacy_sum=True)
    torch.testing.assert_close(legacy(s, t), torch.linalg.vector_norm(gap) / 16)
    torch.testing.assert_close(create("faqd", connector=False, legacy_sum=True)(s, t), gap.abs().sum() / 16**2)
    rotation = torch.linalg.qr(maps(4, side=4, n=1)[0][0, :, :, 0]).Q
    turned = torch.einsum("dc,nchw->ndhw", rotation, t)
    assert one(turned, t) < 1e-6  # the 1e-5 beside the length is not invariant, nearly
    assert two(s.detach(), s.detach()) == 0
    assert torch.autograd.gradcheck(lambda f: one(f, t) + two(f, t), (s,))
    fast = [create("faqd", order=2, probes=15, seed=i, connector=False, legacy_sum=True)(s, t) for i in range(400)]
    mean = torch.stack(fast).square().mean() * 16**2
    torch.testing.assert_close(mean, gap.square().sum(), rtol=0.02, atol=0)
    same = create("faqd", probes=15, connector=False)
    assert torch.equal(same(s, t), same(s, t))
    z = torch.randn(16, 15, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(same(s, t), (gap @ z).abs().sum() / (15 * 16**2 * 2))
    learned = create("faqd").double()
    learned.build([s], [t])
    learned.double()(s, nn.functional.interpolate(t, 8)).backward()
    assert all(p.grad is not None for p in learned.parameters())


def test_groups_of_attention_maps():
    s, t = maps(3, 5)
    at = create("at")(s, t)
    loss = create("group_at", groups={"backbone": (2, 10.0), "head": (1, 3.0)})
    torch.testing.assert_close(loss([s] * 3, [t] * 3), 23 * at)
    assert len(create("group_at").weights) == 9
    with pytest.raises(LossplugError, match="2 features for groups of 3"):
        loss([s] * 2, [t] * 2)


@pytest.mark.parametrize("side", [5, 6])
def test_spectra(side):
    s, t = maps(3, 3, side=side)
    s.requires_grad_()
    torch.testing.assert_close(spectral_distance(s, t), F.mse_loss(s, t))  # Parseval
    (image,) = maps(2, side=9, seed=3)
    w = spectrum_weights(image, (side, side), alpha=0.0)
    torch.testing.assert_close(spectral_distance(s, t, w), F.mse_loss(s, t))
    w = spectrum_weights(image, (side, side))
    full = torch.fft.fft2(F.interpolate(image, (side, side), mode="bilinear"), norm="ortho").abs().mean(1, keepdim=True)
    want = (torch.fft.fft2(s - t, norm="ortho").abs().square() / (full + 1e-3)).mean()
    torch.testing.assert_close(spectral_distance(s, t, w), want)
    loss = create("spectral_kd", lambda_s=0.3, lambda_f=0.2)
    torch.testing.assert_close(loss([s], [t], image), 0.3 * F.mse_loss(s, t) + 0.2 * want)
    assert torch.autograd.gradcheck(lambda f: loss([f], [t], image), (s,))
    assert loss([t], [t], image) == 0
    with pytest.raises(LossplugError, match="differ"):
        loss([s], maps(4, side=side), image)
    loss.build([s], maps(4, side=side))
    loss.double()([s], maps(4, side=side), image).backward()
    assert loss.connectors["0"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("ids", [False, True])
def test_crd_in_the_callback_finds_samples_again_and_resumes(tmp_path, ids):
    import lightning.pytorch as pl
    from distillation_runs import Plain, network, same, samples
    from torch.utils.data import DataLoader

    from lightning_lossplug.callbacks import ExactResume
    from lightning_lossplug.integrations import WithSampleIds

    def loader():
        if not ids:
            return data()
        wrapped = WithSampleIds(samples())
        return DataLoader(wrapped, 8, collate_fn=wrapped.collate, generator=torch.Generator().manual_seed(0))

    def run(save, ckpt_path=None):
        class Saver(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if save and trainer.current_epoch == 0:
                    trainer.save_checkpoint(tmp_path / "middle.ckpt")

        torch.manual_seed(3)
        module = Plain("adamw", dropout=0.2)
        callback = Distillation(
            network(12, seed=5),
            None,
            feature_loss="crd",
            feature_parameters={"n_data": 64, "k": 7, "feat_dim": 6},
            layers={"input:4": "input:4"},
        )
        torch.manual_seed(4)
        trainer(callback, ExactResume(), Saver(), max_epochs=2).fit(module, loader(), ckpt_path=ckpt_path)
        return module.state_dict(), callback.trained.state_dict()

    straight, resumed = run(True), run(False, tmp_path / "middle.ckpt")
    assert same(straight[0], resumed[0])
    assert same(straight[1], resumed[1])
    assert straight[1]["features.count"] == 64
    small = {"n_data": 20, "k": 7}
    with pytest.raises(LossplugError, match="more samples than n_data=20"):
        callback = Distillation(
            network(12, seed=5), None, feature_loss="crd", feature_parameters=small, layers={"input:4": "input:4"}
        )
        trainer(callback).fit(Plain(), loader())
