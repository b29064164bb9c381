"""Identities of the cards ``spherical_softmax``, ``taylor_softmax`` and ``spherical_output_layer``."""

from __future__ import annotations

import pytest
import torch

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import LabelError, create
from lightning_lossplug.losses.stats import logit_stats

LOSSES = ("z_loss", "spherical_softmax", "taylor_softmax")


def test_spherical_softmax_is_even_and_scale_invariant():
    torch.manual_seed(0)
    o, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    loss = create("spherical_softmax")
    sign = torch.randint(2, o.shape) * 2 - 1
    torch.testing.assert_close(loss(sign * o, y), loss(o, y))
    p = loss.predict_proba(o)
    torch.testing.assert_close(p.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(loss(o, y, reduction="none"), -p.gather(1, y[:, None])[:, 0].log())
    small = create("spherical_softmax", eps=1e-14)
    torch.testing.assert_close(small(7 * o, y), small(o, y))


def test_taylor_softmax_is_softmax_to_third_order():
    torch.manual_seed(0)
    o, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    loss = create("taylor_softmax")
    p = loss.predict_proba(o)
    torch.testing.assert_close(loss(o, y, reduction="none"), -p.gather(1, y[:, None])[:, 0].log())
    errors = [(loss.predict_proba(h * o) - (h * o).softmax(1)).abs().max() for h in (1e-2, 5e-3)]
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.05)
    low = torch.full((1, 3), -1.0, dtype=torch.float64)  # the smallest numerators
    torch.testing.assert_close(loss.predict_proba(low), torch.full_like(low, 1 / 3))


def dense_step(weight, h, y, loss, lr, decay=0.0):
    """One step of plain SGD on a dense weight; also returns the gradient in the features."""
    w, h = weight.clone().requires_grad_(), h.detach().clone().requires_grad_()
    value = loss(h @ w.T, y)
    value.backward()
    return weight - lr * (w.grad + decay * weight), h.grad, value.detach()


def invariants(layer):
    w = layer.weight()
    torch.testing.assert_close(layer.Q, w.T @ w, rtol=0, atol=1e-11)
    torch.testing.assert_close(layer.wbar, w.sum(0), rtol=0, atol=1e-11)
    eye = torch.eye(w.shape[1], dtype=w.dtype)
    torch.testing.assert_close(layer.U @ layer.U_inv, eye, rtol=0, atol=1e-11)


def make(loss="z_loss", classes=40, **options):
    torch.manual_seed(0)
    layer = create("spherical_output_layer", in_features=6, num_classes=classes, loss=loss, **options).double()
    layer.set_weight(layer.weight())  # Q and W^T 1 were float32
    return layer


@pytest.mark.parametrize("invert_mode", ["woodbury", "exact"])
@pytest.mark.parametrize("name", LOSSES)
def test_25_steps_equal_dense_sgd(name, invert_mode):
    layer, loss = make(name, invert_mode=invert_mode), create(name)
    weight = layer.weight()
    for _ in range(25):
        h = torch.randn(8, 6, dtype=torch.float64)
        y = torch.randint(5, (8,))  # few labels, so that most batches repeat some
        weight, grad, value = dense_step(weight, h, y, loss, 0.05)
        h.requires_grad_()
        ours = layer(h, y)
        ours.backward()
        layer.step(0.05)
        torch.testing.assert_close(ours.detach(), value, rtol=0, atol=1e-12)
        torch.testing.assert_close(h.grad, grad, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.weight(), weight, rtol=0, atol=1e-12)
        invariants(layer)
    assert int(layer.steps) == 25
    torch.testing.assert_close(layer.logits(h.detach()), h.detach() @ weight.T)


def test_weight_decay_and_stabilisation_keep_the_dense_path():
    layer = make("spherical_softmax", weight_decay=0.3, stabilize_every=3)
    loss, weight = create("spherical_softmax"), layer.weight()
    for _ in range(12):
        h, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(40, (8,))
        weight, _, _ = dense_step(weight, h, y, loss, 0.5, decay=0.3)
        layer(h, y).backward()
        layer.step(0.5)
        torch.testing.assert_close(layer.weight(), weight, rtol=0, atol=1e-11)
        invariants(layer)
    layer.stabilize()
    assert torch.linalg.svdvals(layer.U).min() > 0.4


@pytest.mark.parametrize("scales", [[0.1, 1, 1, 1, 1, 1], [5, 0.2, 1.5, 1, 1, 1], [0.01, 0.01, 9, 1, 1, 1]])
def test_stabilize_leaves_the_weight_and_mends_u(scales):
    layer = make()
    left, right = (torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0] for _ in range(2))
    layer.U = left @ torch.diag(torch.tensor(scales, dtype=torch.float64)) @ right
    layer.U_inv = torch.linalg.inv(layer.U)
    layer.omega = torch.randn(6, dtype=torch.float64)
    weight = layer.weight()
    layer.Q, layer.wbar = weight.T @ weight, weight.sum(0)
    layer.stabilize()
    torch.testing.assert_close(layer.weight(), weight)
    invariants(layer)
    values = torch.linalg.svdvals(layer.U)
    assert values.min() >= 0.5
    assert values.max() <= 2


def test_batches_accumulate_until_the_step():
    layer, loss = make(), create("z_loss", reduction="sum")
    weight = layer.weight()
    h, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(40, (8,))
    expected, _, _ = dense_step(weight, h, y, loss, 0.1)
    for part in (slice(0, 3), slice(3, 8)):
        (layer(h[part], y[part], denominator=1.0)).backward()
    layer(h, y)  # never went backward: no part of the step
    layer.step(0.1)
    torch.testing.assert_close(layer.weight(), expected)
    layer.step(0.1)  # nothing to do
    torch.testing.assert_close(layer.weight(), expected)
    layer.eval()(h, y)
    with torch.no_grad():
        layer.train()(h, y)
    assert not layer._pending


def test_ignored_rows_and_class_weights():
    weight = torch.linspace(0.5, 2, 40)
    loss = create("taylor_softmax", weight=weight, ignore_index=7)
    layer = make(loss)
    before = layer.weight()
    h = torch.randn(2, 3, 6, dtype=torch.float64)
    y = torch.tensor([[1, 7, 2], [7, 1, 39]])
    expected, _, value = dense_step(before, h.view(-1, 6), y.flatten(), loss, 0.1)
    ours = layer(h, y)
    torch.testing.assert_close(ours.detach(), value)
    ours.backward()
    layer.step(0.1)
    torch.testing.assert_close(layer.weight(), expected)
    assert layer(h, torch.full_like(y, 7)) == 0


def test_saved_and_restored_layer_goes_on_alike():
    layer = make()
    h, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(40, (8,))
    for _ in range(3):
        layer(h, y).backward()
        layer.step(0.1)
    assert not list(layer.parameters())
    other = create("spherical_output_layer", in_features=6, num_classes=40).double()
    other.load_state_dict(layer.state_dict())
    for each in (layer, other):
        each(h, y).backward()
        each.step(0.1)
    assert layer.weight().equal(other.weight())
    assert int(other.steps) == 4


def test_half_precision_features_and_bad_calls():
    layer = make().float()
    h, y = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True), torch.tensor([0, 1, 2, 3])
    layer(h, y).backward()
    assert h.grad.dtype == torch.bfloat16
    layer.step(0.1)
    for bad in ((h[:, :5], y), (h, y[:3]), (h, y.float())):
        with pytest.raises(LossplugError, match="don't fit"):
            layer(*bad)
    with pytest.raises(LabelError):
        layer(h, y + 37)
    with pytest.raises(LossplugError, match="bfloat16"):
        make().bfloat16()(h, y)
    with pytest.raises(LossplugError, match="expected"):
        layer.set_weight(torch.ones(3, 6))
    with pytest.raises(LossplugError, match="o_y"):
        make("cross_entropy")
    for parameter in ({"stabilize_every": 0}, {"invert_mode": "lu"}, {"weight_decay": -1.0}, {"classes": 0}):
        with pytest.raises(LossplugError):
            make(**parameter)
    decayed = make(weight_decay=1.0)
    with pytest.raises(LossplugError, match="lr"):
        decayed.step(2.0)


def test_losses_outside_the_family_would_need_lse():
    torch.manual_seed(0)
    z, y = torch.randn(4, 5, dtype=torch.float64), torch.randint(5, (4,))
    for name in LOSSES:
        loss = create(name)
        stats = logit_stats(z, y, loss.needs)
        nothing = torch.full_like(stats.lse, torch.nan)
        torch.testing.assert_close(loss.from_stats(stats._replace(lse=nothing)), loss.rows(z, y))
