"""Identities of the card ``legendretron``."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import create
from lightning_lossplug.losses.legendretron import ConvexGradient

C = 4


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return 2 * torch.randn(16, C, dtype=torch.float64), torch.randint(C, (16,))


def make(**options):
    torch.manual_seed(1)
    return create("legendretron", num_classes=C, **options).double()


def make_identity(loss):
    """Turns every block into the identity: no convex network, ``softplus(w0) = 1``."""
    with torch.no_grad():
        for block in loss.blocks:
            block.w1.fill_(-1000.0)
            block.w0.fill_(math.log(math.e - 1))
    return loss


def test_identity_link_is_cross_entropy(batch):
    z, y = batch
    loss = make_identity(make(l2=0.0))
    torch.testing.assert_close(loss(z, y), F.cross_entropy(z, y))
    x = z[:, :-1]
    torch.testing.assert_close(loss(x, y), F.cross_entropy(F.pad(x, (0, 1)), y))
    all_low = torch.full((1, C - 1), -1e4, dtype=torch.float64)
    assert loss(all_low, torch.tensor([C - 1])) == 0


def test_logits_and_scores_agree_and_probabilities_sum_to_one(batch):
    z, y = batch
    loss = make()
    loss(z, y)
    torch.testing.assert_close(loss(z, y), loss(z[:, :-1] - z[:, -1:], y))
    torch.testing.assert_close(loss(z + 3, y), loss(z, y))
    p = loss.predict_proba(z)
    torch.testing.assert_close(p.sum(1), torch.ones(16, dtype=torch.float64))
    penalty = 0.005 * sum(q.square().sum() for q in loss.parameters())
    torch.testing.assert_close(loss(z, y), -p.gather(1, y[:, None]).log().mean() + penalty)


def test_jacobian_of_every_block_is_symmetric_positive_definite(batch):
    torch.manual_seed(2)
    for depth in (1, 2, 4):
        block = ConvexGradient(3, 4, depth).double()
        block(torch.randn(20, 3, dtype=torch.float64))  # the first batch sets the normalisation
        for x in torch.randn(5, 3, dtype=torch.float64):
            jacobian = torch.autograd.functional.jacobian(lambda x, b=block: b(x[None])[0], x)
            torch.testing.assert_close(jacobian, jacobian.T)
            assert torch.linalg.eigvalsh(jacobian).min() > 0


def test_first_training_batch_normalises_and_is_saved(batch):
    z, y = batch
    loss = make()
    flags = [n for n, _ in loss.named_buffers() if n.endswith("initialised")]
    assert flags
    loss(z[:1], y[:1])  # one row has no variance
    assert not any(loss.get_buffer(n) for n in flags)
    loss.eval()(z, y)
    assert not any(loss.get_buffer(n) for n in flags)
    loss.train()(z, y)
    assert all(loss.get_buffer(n) for n in flags)
    other = create("legendretron", num_classes=C).double()
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other(3 * z, y), loss(3 * z, y))


def test_gradient_reaches_scores_and_all_parameters(batch):
    z, y = batch
    loss = make(l2=0.0)
    loss(z, y)
    z = z.requires_grad_()
    loss(z, y).backward()
    assert z.grad.abs().sum() > 0
    # The network's last shift moves the potential by a constant, which its gradient does not see.
    free = {n for n, p in loss.named_parameters() if p.requires_grad and (p.grad is None or p.grad.eq(0).all())}
    assert free == set()


def test_works_without_gradients_and_in_inference_mode(batch):
    z, y = batch
    loss = make()
    expected = loss(z, y).detach()
    loss.eval()
    with torch.no_grad():
        torch.testing.assert_close(loss(z, y), expected)
        assert not loss.predict_proba(z).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(loss(z * 1, y * 1), expected)


def test_training_lowers_the_loss(batch):
    z, y = batch
    loss = make(l2=0.0)
    start = loss(z, y).item()
    optimizer = torch.optim.Adam(loss.parameters(), 0.01)
    for _ in range(20):
        optimizer.zero_grad()
        loss(z, y).backward()
        optimizer.step()
    assert loss(z, y).item() < start


def test_wrong_width_and_half_precision_are_refused(batch):
    z, y = batch
    with pytest.raises(LossplugError, match="2 scores for 4 classes"):
        make()(z[:, :2], y)
    with pytest.raises(LossplugError, match="float16"):
        make().half()(z, y)
