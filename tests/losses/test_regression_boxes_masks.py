"""Identities of the cards of the regression, box and mask losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import LabelError, create

D = torch.float64
RESIDUALS = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6)


def residual_loss(name, r, **parameters):
    r = torch.as_tensor(r, dtype=D)
    return create(name, reduction="none", **parameters)(r, torch.zeros_like(r))


@settings(max_examples=40, deadline=None)
@given(RESIDUALS, st.floats(1e-3, 50.0))
def test_pseudo_huber_definition_even_and_bounded_slope(r, c):
    r = torch.tensor(r, dtype=D, requires_grad=True)
    value = residual_loss("pseudo_huber", r, c=c)
    torch.testing.assert_close(value, c * ((r**2 + c**2).sqrt() - c), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(residual_loss("pseudo_huber", -r, c=c), value)
    grad = torch.autograd.grad(value.sum(), r)[0]
    torch.testing.assert_close(grad, (c * r / (r**2 + c**2).sqrt()).detach())
    assert (grad.abs() <= c + 1e-12).all()


def test_pseudo_huber_limits():
    small = torch.tensor([1e-9, -3e-9], dtype=D)
    torch.testing.assert_close(residual_loss("pseudo_huber", small), small**2 / 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(residual_loss("pseudo_huber", small.float(), c=1.0), small**2 / 2, rtol=1e-6, atol=0)
    large = torch.tensor([1e5, -2e5], dtype=D)
    torch.testing.assert_close(residual_loss("pseudo_huber", large), 0.1 * large.abs() - 0.01)
    r = torch.tensor([0.5, -2.0], dtype=D)
    torch.testing.assert_close(residual_loss("pseudo_huber", r, c=1e5, scale=2), r**2)
    huge = torch.tensor([3e38, -3e38])
    assert create("pseudo_huber", reduction="none")(huge, torch.zeros(2)).isfinite().all()


def test_pseudo_huber_schedules():
    torch.manual_seed(0)
    pred, target = torch.randn(3, 4, 2, dtype=D), torch.randn(3, 4, 2, dtype=D)
    t = torch.tensor([0, 400, 1000])
    for schedule, points in (("exponential", [1.0, 0.2**0.4, 0.2]), ("reverse", [0.2, 0.2**0.6, 1.0])):
        loss = create("pseudo_huber", schedule=schedule, c_min=0.2, reduction="none")
        for i, c in enumerate(points):
            expected = create("pseudo_huber", c=c, reduction="none")(pred[i], target[i])
            torch.testing.assert_close(loss(pred, target, t)[i], expected)
            torch.testing.assert_close(loss(pred, target, int(t[i]))[i], expected)
        with pytest.raises(LossplugError, match="timestep"):
            loss(pred, target)
        with pytest.raises(LossplugError, match="timestep"):
            loss(pred, target, torch.zeros(4))


def test_regression_checks_and_left_out_elements():
    pred, target = torch.ones(3, 2, dtype=D, requires_grad=True), torch.zeros(3, 2, dtype=D)
    with pytest.raises(LossplugError, match="takes no timestep"):
        create("gmadl")(pred, target, 3)
    with pytest.raises(LossplugError, match="shapes differ"):
        create("gmadl")(pred, target[:, :1])
    with pytest.raises(LossplugError, match="dtype"):
        create("gmadl")(pred, target.bool())
    broken = target.clone()
    broken[1] = float("nan")
    weight = torch.tensor([1.0, 0.0, 1.0])
    value = create("pseudo_huber")(pred, broken, sample_weight=weight)
    torch.testing.assert_close(value, create("pseudo_huber")(pred, target))
    grad = torch.autograd.grad(value, pred)[0]
    assert (grad[1] == 0).all()
    assert (grad[0] > 0).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-0.999, 0.999), min_size=1, max_size=6))
def test_lmse_definition_even_and_increasing(r):
    r = torch.tensor(r, dtype=D, requires_grad=True)
    value = residual_loss("lmse", r)
    torch.testing.assert_close(value, -torch.log1p(1e-12 - r**2), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(residual_loss("lmse", -r), value)
    grad = torch.autograd.grad(value.sum(), r)[0]
    assert (grad * r.detach() >= 0).all()


def test_lmse_ends_and_refusal():
    small = torch.tensor([1e-3, -2e-3], dtype=D)
    torch.testing.assert_close(residual_loss("lmse", small), small**2, rtol=1e-5, atol=1e-11)
    one = torch.tensor([1.0, -1.0, 0.0], requires_grad=True)  # float32: eps is far below its resolution at 1
    value = create("lmse", reduction="none")(one, torch.zeros(3))
    torch.testing.assert_close(value, torch.tensor([-math.log(1e-12)] * 2 + [0.0]), rtol=1e-6, atol=1e-9)
    assert torch.autograd.grad(value.sum(), one)[0].isfinite().all()
    with pytest.raises(LossplugError, match="outside"):
        create("lmse")(torch.tensor([1.5]), torch.zeros(1))
    assert residual_loss("lmse", [1.5], outside="clamp") == residual_loss("lmse", [1.0])


def test_directional_losses():
    torch.manual_seed(0)
    r, f = torch.randn(9, dtype=D), torch.randn(9, dtype=D, requires_grad=True)
    madl = create("madl")
    with pytest.warns(UserWarning, match="gmadl"):
        value = madl(f, r)
    torch.testing.assert_close(value, (-torch.sign(r * f) * r.abs()).mean())
    assert (torch.autograd.grad(value, f)[0] == 0).all()
    torch.testing.assert_close(madl(r, r), -r.abs().mean())
    torch.testing.assert_close(madl(-r, r), r.abs().mean())
    torch.testing.assert_close(create("gmadl", a=1e9)(f, r), madl(f, r) / 2)
    rows = create("gmadl", a=3.0, b=1.5, reduction="none")(f, r)
    s = torch.sigmoid(3.0 * r * f)
    torch.testing.assert_close(rows, -(s - 0.5) * r.abs() ** 1.5)
    grad = torch.autograd.grad(rows.sum(), f)[0]
    torch.testing.assert_close(grad, (-3.0 * r * s * (1 - s) * r.abs() ** 1.5).detach())


def some_boxes(n, seed=0):
    torch.manual_seed(seed)
    corner = 4 * torch.rand(n, 2, dtype=D)
    return torch.cat([corner, corner + 0.5 + torch.rand(n, 2, dtype=D)], 1)


@pytest.mark.parametrize("name", ["diou", "ciou"])
def test_boxes_equal_torchvision(name):
    ops = pytest.importorskip("torchvision.ops", reason="box losses delegate to torchvision")
    theirs = {"diou": ops.distance_box_iou_loss, "ciou": ops.complete_box_iou_loss}[name]
    a, b = some_boxes(20), some_boxes(20, 1)
    torch.testing.assert_close(create(name)(a, b), theirs(a, b), rtol=0, atol=0)
    torch.testing.assert_close(create(name)(a, b, reduction="mean"), theirs(a, b, reduction="mean"))
    assert create(name)(a, b).shape == (20,)  # none is the default
    torch.testing.assert_close(create(name, reduction="sum")(a, b, denominator=3), theirs(a, b, reduction="sum"))


@pytest.mark.parametrize("name", ["diou", "ciou"])
def test_box_identities(name):
    a, b = some_boxes(30), some_boxes(30, 1)
    loss = create(name)
    torch.testing.assert_close(loss(a, a), torch.zeros(30, dtype=D), rtol=0, atol=1e-6)
    torch.testing.assert_close(loss(7 * a + 3, 7 * b + 3), loss(a, b), rtol=1e-6, atol=1e-6)
    if name == "diou":
        assert (loss(a, b) >= 0).all()
        assert (loss(a, b) < 2).all()
    apart = torch.tensor([[0.0, 0, 1, 1]], dtype=D, requires_grad=True)
    value = loss(apart, torch.tensor([[5.0, 5, 6, 7]], dtype=D))
    assert torch.autograd.grad(value.sum(), apart)[0].abs().min() > 0


def test_ciou_alpha_has_no_gradient():
    a, b = some_boxes(8).requires_grad_(), some_boxes(8, 1)
    w, h = a[:, 2] - a[:, 0], a[:, 3] - a[:, 1]
    wt, ht = b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]
    v = 4 / math.pi**2 * (torch.atan(wt / ht) - torch.atan(w / h)) ** 2
    inter = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp_min(0).prod(1)
    iou = inter / (w * h + wt * ht - inter)
    alpha = (v / ((1 - iou) + v)).detach()
    expected = create("diou")(a, b) + alpha * v
    torch.testing.assert_close(create("ciou")(a, b), expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(create("ciou")(a, b).sum(), a, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), a)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["diou", "ciou"])
def test_degenerate_and_left_out_boxes(name):
    flat = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 2], [2, 2, 1, 1], [300, 300, 300, 300]], requires_grad=True)
    target = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 1, 1], [300, 300, 301, 301]])
    value = create(name)(flat, target)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), flat)[0].isfinite().all()
    broken = torch.cat([target, torch.full((1, 4), float("nan"))]).requires_grad_()
    weight = torch.tensor([1.0, 1, 1, 1, 0])
    value = create(name, reduction="mean")(broken, torch.cat([target, target[:1]]), sample_weight=weight)
    torch.testing.assert_close(value, torch.tensor(0.0), rtol=0, atol=1e-5)
    assert torch.autograd.grad(value, broken)[0].isfinite().all()
    with pytest.raises(LossplugError, match="expected"):
        create(name)(torch.zeros(3, 5), torch.zeros(3, 5))


def hard_logits(labels, classes=3):
    return 1e4 * F.one_hot(labels, classes).movedim(-1, 1).to(D)


def iou_and_dice(x, y, classes=3):
    ious, dices = [], []
    for c in range(classes):
        a, b = x == c, y == c
        both, either = (a & b).sum().item(), (a | b).sum().item()
        if b.any():
            ious.append(both / either)
            dices.append(2 * both / (a.sum() + b.sum()).item())
    return sum(ious) / len(ious), sum(dices) / len(dices)


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randint(3, (4, 5, 6)), torch.randint(3, (4, 5, 6))


def test_hard_masks_are_one_minus_the_index(maps):
    x, y = maps
    z = hard_logits(x)
    iou, dice = iou_and_dice(x, y)
    for form in ("jml1", "jml2"):
        loss = create("jaccard_metric", form=form, smooth=0.0)
        assert float(loss(z, y)) == pytest.approx(1 - iou)
        halves = create("jaccard_metric", form="jml1", smooth=0.0, alpha=0.5, beta=0.5)
        assert float(halves(z, y)) == pytest.approx(1 - dice)
    assert float(create("dice", batch=True)(z, y)) == pytest.approx(1 - dice)
    per_image = [iou_and_dice(a, b) for a, b in zip(x, y, strict=True)]
    image = create("jaccard_metric", mIoUD=0.0, mIoUI=1.0, smooth=0.0)
    assert float(image(z, y)) == pytest.approx(1 - sum(i for i, _ in per_image) / 4)
    torch.testing.assert_close(
        create("dice", reduction="none")(z, y), torch.tensor([1 - d for _, d in per_image], dtype=D)
    )


def test_jaccard_index_is_dice_over_two_minus_dice(maps):
    x, y = maps
    z, t = (2.0 * (x == 1) - 1)[:, None].to(D) * 1e4, (y == 1).long()
    dice = 1 - create("dice", batch=True)(z, t)
    torch.testing.assert_close(1 - create("jaccard_metric", smooth=0.0)(z, t), dice / (2 - dice))


def test_jaccard_against_the_published_form():
    torch.manual_seed(0)
    z, q = torch.randn(3, 4, 20, dtype=D), torch.randn(3, 4, 20, dtype=D).softmax(1)
    x = z.softmax(1)
    norm = lambda t: t.abs().sum((0, 2))  # noqa: E731
    jml1 = 1 - (norm(x + q) - norm(x - q)) / (norm(x + q) + norm(x - q))
    jml2 = 1 - norm(x * q) / (norm(x * q) + norm(x - q))
    torch.testing.assert_close(create("jaccard_metric", smooth=0.0)(z, q), jml1.mean())
    torch.testing.assert_close(create("jaccard_metric", smooth=0.0, form="jml2")(z, q), jml2.mean())
    tp = (norm(x) + norm(q) - norm(x - q)) / 2
    tversky = (tp + 0.5) / (tp + 0.7 * (norm(x) - tp) + 0.3 * (norm(q) - tp) + 0.5)
    loss = create("jaccard_metric", alpha=0.7, beta=0.3, smooth=0.5, gamma=1.5, class_weights=[1.0, 2.0, 0.0, 1.0])
    torch.testing.assert_close(loss(z, q), ((1 - tversky) ** 1.5 * torch.tensor([1.0, 2, 0, 1])).mean())
    torch.testing.assert_close(
        create("jaccard_metric", smooth=0.5, alpha=0.7, beta=0.3, log_loss=True)(z, q), -tversky.log().mean()
    )


def test_jaccard_is_zero_only_at_the_soft_label_and_soft_dice_is_not():
    torch.manual_seed(0)
    z = torch.randn(2, 3, 9, dtype=D)
    q = z.softmax(1)
    zero = torch.zeros((), dtype=D)
    for form, exact in (("jml1", zero), ("jml2", zero)):
        loss = create("jaccard_metric", form=form)
        torch.testing.assert_close(loss(z, q), exact, rtol=0, atol=1e-12)
        assert loss(z + 0.1 * torch.randn_like(z), q) > 1e-3
    dice = create("dice")
    assert dice(3 * z, q) < dice(z, q)  # sharper than the label is better for it


def test_jaccard_active_classes_and_averages():
    y = torch.zeros(2, 3, 3, dtype=torch.long)
    y[1, 0, 0] = 1  # class 2 is nowhere, class 1 in one image
    torch.manual_seed(0)
    z = torch.randn(2, 3, 3, 3, dtype=D)
    x, t = z.softmax(1), F.one_hot(y, 3).movedim(-1, 1).to(D)

    def loss(images, c):
        a, b = x[images, c], t[images, c]
        return 1 - torch.minimum(a, b).sum() / torch.maximum(a, b).sum()

    both = slice(None)
    weights = {"smooth": 0.0}
    torch.testing.assert_close(create("jaccard_metric", **weights)(z, y), (loss(both, 0) + loss(both, 1)) / 2)
    i = create("jaccard_metric", mIoUD=0.0, mIoUI=1.0, **weights)(z, y)
    torch.testing.assert_close(i, (loss(0, 0) + (loss(1, 0) + loss(1, 1)) / 2) / 2)
    c = create("jaccard_metric", mIoUD=0.0, mIoUC=1.0, **weights)(z, y)
    torch.testing.assert_close(c, ((loss(0, 0) + loss(1, 0)) / 2 + loss(1, 1)) / 2)
    mixed = create("jaccard_metric", mIoUD=0.5, mIoUI=2.0, mIoUC=1.0, **weights)(z, y)
    torch.testing.assert_close(mixed, 0.25 * (loss(both, 0) + loss(both, 1)) + 2 * i + c)


@pytest.mark.parametrize("name", ["jaccard_metric", "dice"])
def test_ignored_pixels(name, maps):
    _, y = maps
    torch.manual_seed(1)
    z = torch.randn(4, 3, 5, 6, dtype=D)
    ignored = y.clone()
    ignored[:, 3:] = -100
    loss = create(name)
    torch.testing.assert_close(loss(z, ignored), loss(z[:, :, :3], y[:, :3]))
    keep = torch.zeros_like(y, dtype=torch.bool)
    keep[:, :3] = True
    torch.testing.assert_close(loss(z, y, keep_mask=keep), loss(z, ignored))
    q = torch.randn(4, 3, 5, 6, dtype=D).softmax(1)
    torch.testing.assert_close(loss(z, q, keep_mask=keep), loss(z[:, :, :3], q[:, :, :3]))
    bad = z.clone()
    bad[:, :, 3:] = float("nan")
    bad.requires_grad_()
    value = loss(bad, ignored)
    torch.testing.assert_close(value, loss(z, ignored))
    assert torch.autograd.grad(value, bad)[0].isfinite().all()
    for smooth in (0.0, 1e-3):
        none = create(name, smooth=smooth)(bad, torch.full_like(y, -100))
        assert none == 0
        assert (torch.autograd.grad(none, bad)[0] == 0).all()


@pytest.mark.parametrize("name", ["jaccard_metric", "dice"])
def test_masks_are_checked(name, maps):
    _, y = maps
    z = torch.randn(4, 3, 5, 6)
    loss = create(name)
    for logits, target in ((z, y[:, :2]), (z, z[:, :2]), (z[0, 0, 0], y), (z[:, :0], y), (z.long(), y)):
        with pytest.raises(LossplugError):
            loss(logits, target)
    with pytest.raises(LabelError):
        loss(z, torch.full_like(y, 3))
    with pytest.raises(LossplugError, match="keep_mask"):
        loss(z, y, keep_mask=y)
    with pytest.raises(LossplugError, match="class_weights"):
        create("jaccard_metric", class_weights=[1.0, 1.0])(z, y)


def test_dice_forms_by_hand(maps):
    _, y = maps
    torch.manual_seed(1)
    z = torch.randn(4, 3, 5, 6, dtype=D)
    x, t = z.softmax(1), F.one_hot(y, 3).movedim(-1, 1).to(D)
    both, single, squares = 2 * (x * t).sum((2, 3)), (x + t).sum((2, 3)), (x**2 + t**2).sum((2, 3))
    torch.testing.assert_close(create("dice", smooth=1.0)(z, y), (1 - (both + 1) / (single + 1)).mean())
    torch.testing.assert_close(create("dice", squared=True)(z, y), (1 - both / squares).mean())
    micro = 1 - both.sum(1) / single.sum(1)
    torch.testing.assert_close(create("dice", average="micro", reduction="none")(z, y), micro)
    torch.testing.assert_close(create("dice", batch=True)(z, y), (1 - both.sum(0) / single.sum(0)).mean())
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=D)
    weighted = 1 - (weight[:, None] * both).sum(0) / (weight[:, None] * single).sum(0)
    torch.testing.assert_close(create("dice", batch=True)(z, y, sample_weight=weight), weighted.mean())


def test_dice_equals_monai(maps):
    monai = pytest.importorskip("monai.losses", reason="parity needs monai")
    _, y = maps
    z = torch.randn(4, 3, 5, 6)
    for ours, theirs in (
        ({"smooth": 1e-5}, {}),
        ({"smooth": 1e-5, "squared": True}, {"squared_pred": True}),
        ({"smooth": 1e-5, "batch": True}, {"batch": True}),
    ):
        loss = monai.DiceLoss(to_onehot_y=True, softmax=True, smooth_nr=1e-5, smooth_dr=1e-5, **theirs)
        torch.testing.assert_close(create("dice", **ours)(z, y), loss(z, y[:, None]))


def test_half_precision_sums_do_not_overflow():
    z = torch.zeros(1, 2, 400, 400, dtype=torch.float16)
    y = torch.zeros(1, 400, 400, dtype=torch.long)
    assert create("dice")(z, y).isfinite()
    assert create("jaccard_metric")(z, y).isfinite()
