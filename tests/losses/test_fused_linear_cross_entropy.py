"""The registered loss over hidden states and a classifier."""

import pytest
import torch
import torch.nn.functional as F

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import CrossEntropy, Focal, create
from lightning_lossplug.registry import registry


def head():
    g = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((9, 4), (12, 4), (12,)))
    y = torch.randint(12, (9,), generator=g)
    y[3] = -100
    return h, w, b, y


def same(ours, reference, inputs):
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(reference, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_is_registered_with_the_parameters_of_its_card():
    entry = registry.get("loss", "linear_cross_entropy")
    assert entry.signature == "hidden_classifier"
    names = {p.name for p in entry.parameters()}
    card = {
        "ignore_index",
        "label_smoothing",
        "softcap",
        "lse_penalty",
        "reduction",
        "tile",
        "return_lse",
        "weight",
        "base",
    }
    assert card <= names


@pytest.mark.parametrize("backend", ["rows", "tiles"])
def test_equals_the_materialised_loss(backend):
    h, w, b, y = head()
    weight = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    loss = create(
        "linear_cross_entropy",
        label_smoothing=0.1,
        softcap=3.0,
        weight=weight,
        tile=5,
        backend=backend,
        reduction="sum",
    )
    z = 3 * torch.tanh((h @ w.T + b) / 3)
    same(loss(h, w, y, b), F.cross_entropy(z, y, weight, label_smoothing=0.1, reduction="sum"), (h, w, b))


@pytest.mark.parametrize("backend", ["rows", "tiles"])
@pytest.mark.parametrize("weighted", [False, True])
def test_lse_penalty_is_reduced_like_the_loss(backend, weighted):
    h, w, b, y = head()
    weight = torch.linspace(0.5, 2, 12, dtype=torch.float64) if weighted else None
    loss = create("linear_cross_entropy", lse_penalty=0.3, weight=weight, backend=backend)
    kept = y != -100
    z = (h @ w.T + b)[kept]
    rows = F.cross_entropy(z, y[kept], reduction="none") + 0.3 * z.logsumexp(1).square()
    s = torch.ones(8, dtype=torch.float64) if weight is None else weight[y[kept]]
    same(loss(h, w, y, b), (s * rows).sum() / s.sum(), (h, w, b))
    plain = create("linear_cross_entropy", lse_penalty=0.0, weight=weight)
    same(plain(h, w, y, b), F.cross_entropy(h @ w.T + b, y, weight), (h, w, b))


def test_another_base_brings_its_class_weights():
    h, w, b, y = head()
    focal = Focal(1.5, weight=torch.linspace(0.5, 2, 12, dtype=torch.float64))
    loss = create("linear_cross_entropy", base=focal)
    same(loss(h, w, y, b), focal(h @ w.T + b, y), (h, w, b))
    by_name = create("linear_cross_entropy", base="focal")
    same(by_name(h, w, y, b), create("focal")(h @ w.T + b, y), (h, w, b))


def test_overrides_of_a_call():
    h, w, b, y = head()
    loss = create("linear_cross_entropy")
    s = torch.rand(9, dtype=torch.float64)
    reference = CrossEntropy(ignore_index=2)
    y = y.clamp_min(0)
    ours = loss(h, w, y, b, sample_weight=s, denominator=4, ignore_index=2)
    same(ours, reference(h @ w.T + b, y, sample_weight=s, denominator=4), (h, w, b))
    assert loss(h, w, y, reduction="none").shape == (9,)


def test_return_lse():
    h, w, b, y = head()
    value, lse = create("linear_cross_entropy", return_lse=True)(h, w, y, b)
    z = h @ w.T + b
    same(value, F.cross_entropy(z, y), (h, w, b))
    torch.testing.assert_close(lse, torch.where(y == -100, 0, z.logsumexp(1)))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"label_smoothing": 0.1, "base": "focal"}, "Set it on the base"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"lse_penalty": -0.1}, "lse_penalty is -0.1"),
        ({"tile": 0}, "tile is 0"),
        ({"base": "focall"}, "focal"),
        ({"reduction": "avg"}, "avg"),
        ({"filter_eps": -0.1}, "filter_eps is -0.1"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(LossplugError, match=message):
        create("linear_cross_entropy", **parameters)
