"""CTC against torch and all alignments; RNN-T against a lattice by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import LabelError, create


@pytest.fixture
def speech():
    torch.manual_seed(0)
    z = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    return z, torch.tensor([[1, 2], [3, 3], [2, 0]]), torch.tensor([6, 5, 4]), torch.tensor([2, 2, 1])


def collapse(path):
    return [k for i, k in enumerate(path) if k != 0 and (i == 0 or path[i - 1] != k)]


def test_ctc_is_torchs_and_the_sum_over_alignments(speech):
    z, y, frames, lengths = speech
    lp = z.log_softmax(2)
    for reduction in ("none", "mean", "sum"):
        expected = F.ctc_loss(lp, y, frames, lengths, reduction=reduction, zero_infinity=True)
        torch.testing.assert_close(create("ctc", reduction=reduction)(lp, y, frames, lengths), expected)
    p, total = lp[:4, 2].exp(), 0.0
    for path in itertools.product(range(4), repeat=4):
        if collapse(path) == [2]:
            total = total + torch.stack([p[t, k] for t, k in enumerate(path)]).prod()
    torch.testing.assert_close(create("ctc", reduction="none")(lp, y, frames, lengths)[2], -total.log())


def test_ctc_gradient_through_the_softmax(speech):
    z, y, frames, lengths = speech
    loss = create("ctc")
    assert torch.autograd.gradcheck(lambda z: loss(z.log_softmax(2), y, frames, lengths), (z,))


def test_ctc_impossible_targets_and_bad_input(speech):
    z, y, _, lengths = speech
    short = torch.tensor([6, 1, 4])
    value = create("ctc")(z.log_softmax(2), y, short, lengths)
    assert value.isfinite()
    assert torch.autograd.grad(value, z)[0].isfinite().all()
    assert create("ctc", zero_infinity=False)(z.log_softmax(2), y, short, lengths).isinf()
    with pytest.raises(LossplugError, match="lengths"):
        create("ctc")(z, y, short[:2], lengths)
    with pytest.raises(LossplugError, match="blank"):
        create("ctc", blank=4)(z, y, short, lengths)
    for label in (-1, 4):  # torch reads beyond its memory there
        with pytest.raises(LabelError, match=f"label {label} is outside"):
            create("ctc")(z, y.index_fill(1, torch.tensor([0]), label), short, lengths)
    with pytest.raises(LabelError):
        create("ctc")(z, torch.tensor([1, 2, 3, 3, 9]), short, lengths)
    padded = torch.where(torch.arange(2) < lengths[:, None], y, -100)
    torch.testing.assert_close(create("ctc")(z, padded, short, lengths), create("ctc")(z, y, short, lengths))
    for bad in (y.double(), y[:2], y[None]):
        with pytest.raises(LossplugError, match="targets"):
            create("ctc")(z, bad, short, lengths)


def lattice(lp, y, frames, length, blank):
    """Forward variable of one sequence, cell by cell."""
    alpha = {(0, 0): lp.new_zeros(())}
    for t in range(frames):
        for u in range(length + 1):
            ways = [alpha[t - 1, u] + lp[t - 1, u, blank]] if t else []
            ways += [alpha[t, u - 1] + lp[t, u - 1, y[u - 1]]] if u else []
            if ways:
                alpha[t, u] = torch.stack(ways).logsumexp(0)
    return -(alpha[frames - 1, length] + lp[frames - 1, length, blank])


def test_rnnt_is_the_lattice_sum():
    try:
        import torchaudio  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # a build for another torch refuses with RuntimeError
        pytest.skip(f"rnnt delegates to torchaudio, which doesn't import here: {error}")
    torch.manual_seed(0)
    z = torch.randn(3, 5, 3, 6, requires_grad=True)
    y, frames, lengths = torch.tensor([[1, 2], [3, 4], [5, 0]]), torch.tensor([5, 4, 3]), torch.tensor([2, 2, 1])
    rows = torch.stack([lattice(z[i].log_softmax(-1), y[i], int(frames[i]), int(lengths[i]), 0) for i in range(3)])
    ours = create("rnnt", blank=0)
    torch.testing.assert_close(ours(z, y, frames, lengths, reduction="none"), rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(z, y, frames, lengths), rows.mean(), rtol=1e-4, atol=1e-4)
    one, two = (torch.autograd.grad(v, z)[0] for v in (ours(z, y, frames, lengths), rows.mean()))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_rnnt_without_input_or_shape():
    empty = torch.zeros(0, 5, 3, 6, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    assert torch.autograd.grad(create("rnnt")(empty, none[:, None], none, none), empty)[0].shape == empty.shape
    with pytest.raises(LossplugError, match="expected"):
        create("rnnt")(torch.zeros(2, 3), none, none, none)
