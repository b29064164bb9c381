"""MGSR's parts, MiniLLM's policy gradient, learngenes, bits, cluster gates, dropped layers."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from distillation_runs import trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_online_distillation import LLAMA, llama, texts
from torch import nn

from lightning_lossplug import LossplugError
from lightning_lossplug.callbacks import Distillation
from lightning_lossplug.distillation import (
    LinearExpansion,
    cluster_views,
    create,
    descendant,
    learngene,
    length_normalised_advantages,
    loss_gate,
    pairs_by_depth,
)
from lightning_lossplug.distillation.entropic_student import bits
from lightning_lossplug.distillation.mgsr import inside_quantiles
from lightning_lossplug.integrations import CausalLM, drop_layers, timm_teacher

D = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def test_quantiles_of_the_mass():
    p = torch.tensor([[0.1, 0.5, 0.25, 0.15]], dtype=D)
    assert inside_quantiles(p, 0.0, 0.6).tolist() == [[False, True, True, False]]
    assert inside_quantiles(p, 0.5, 0.8).tolist() == [[False, False, True, True]]
    assert inside_quantiles(p, 0.0, 1.0).all()
    z_s, z_t, y = rand(3, 6), rand(3, 6, seed=1), torch.tensor([0, 1, 5])
    torch.testing.assert_close(create("dac_kl", upper=1.0)(z_s, z_t), create("gkd", beta=0.0)(z_s, z_t))
    keep = inside_quantiles(z_t.softmax(1), 0.0, 0.5).scatter(1, y[:, None], True)
    want = []
    for s, t, k in zip(z_s, z_t, keep, strict=True):
        p, q = t[k].softmax(0), s[k].softmax(0)
        want.append((p * (p / q).log()).sum())
    torch.testing.assert_close(create("dac_kl", upper=0.5)(z_s, z_t, y), torch.stack(want).mean())


def test_spans():
    z_s, z_t = rand(2, 5, 4).requires_grad_(), rand(2, 5, 4, seed=1)
    spans = torch.tensor([[0, 0, 0, -1, -1], [-1, 2, 2, 3, 3]])
    p, q = z_t.softmax(-1), z_s.softmax(-1)
    pairs = [(0, 0), (0, 1), (1, 1), (1, 3)]
    want = sum(((p[n, t] * p[n, t + 1] - q[n, t] * q[n, t + 1]) ** 2).sum() for n, t in pairs) / 4
    loss = create("span")
    torch.testing.assert_close(loss(z_s, z_t, spans), want)
    assert torch.autograd.gradcheck(lambda z: loss(z, z_t, spans), (z_s,))
    assert loss(z_t, z_t, spans) == 0
    none = loss(z_s, z_t, torch.full_like(spans, -1))
    assert none == 0
    none.backward()
    with pytest.raises(LossplugError, match="don't fit"):
        loss(z_s, z_t, spans[:, :4])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_advantages(seed, gamma):
    r = rand(3, 6, seed=seed)
    lengths = torch.tensor([6, 3, 1])
    mask = torch.arange(6) < lengths[:, None]
    found = length_normalised_advantages(r, mask, gamma)
    for n in range(3):
        end = int(lengths[n])
        for t in range(end):
            total = sum(gamma ** (k - t) * r[n, k] for k in range(t, end))
            assert found[n, t].item() == pytest.approx(total.item() / (end - t))
    assert (found[~mask] == 0).all()


def test_policy_gradient():
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 2:] = False
    old, teacher = -rand(2, 4).abs(), -rand(2, 4, seed=1).abs()
    student = old.clone().requires_grad_()
    loss = create("minillm_policy", whiten=False, gamma=0.5)
    (grad,) = torch.autograd.grad(loss(student, old, teacher, mask), student)
    advantage = length_normalised_advantages((teacher - old) * mask, mask, 0.5)
    torch.testing.assert_close(grad, -advantage * mask / mask.sum())
    assert loss(student, old, old, mask) == 0
    far = (old + 5.0).requires_grad_()  # clipped where the advantage is positive
    (grad,) = torch.autograd.grad(loss(far, old, teacher, mask), far)
    assert (grad[(advantage > 0) & mask] == 0).all()
    white = create("minillm_policy")(student, old, teacher, mask)
    assert abs(white) < 1e-9  # equal policies and advantages of mean 0


def test_linear_expansion():
    torch.manual_seed(0)
    model = timm_teacher("test_vit", pretrained=False, img_size=32, num_classes=3).double()
    depth = len(model.blocks)
    made = learngene(model)
    assert isinstance(model.blocks, LinearExpansion)
    with torch.no_grad():
        for slope in made.slope:
            slope.add_(0.05 * torch.randn_like(slope))
    x = torch.randn(2, 3, 32, 32, dtype=D)
    same = descendant(model, depth)
    assert torch.equal(same(x), model(x))
    names = [name for name, _ in made.base.named_parameters()]
    five = descendant(model, 5)
    for layer in range(5):
        own = dict(five.blocks[layer].named_parameters())
        for name, base, slope in zip(names, made.base.parameters(), made.slope, strict=True):
            torch.testing.assert_close(own[name], base + layer / 5 * slope)
    model(x).sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    fresh = LinearExpansion(nn.Linear(4, 4), 3)
    assert fresh.slope[0].abs().sum() > 0
    assert fresh.slope[1].abs().sum() == 0
    with pytest.raises(LossplugError, match="expected a Sequential"):
        learngene(model, "head")
    with pytest.raises(LossplugError, match="no linear expansion"):
        descendant(same, 3)


def test_bits_and_features():
    assert bits(torch.full((5, 4), 0.25)).item() == pytest.approx(40.0)
    s, t = rand(2, 3, 4, 4).requires_grad_(), rand(2, 3, 4, 4, seed=1)
    p = rand(2, 6).sigmoid()
    plain = create("entropic_student", beta=0.0)([s, s], [t, t], p)
    torch.testing.assert_close(plain, 2 * (s - t).square().sum())
    loss = create("entropic_student", beta=0.5)
    torch.testing.assert_close(loss(s, t, p), (s - t).square().sum() - 0.5 * p.log().sum() / math.log(2))
    assert loss(s, t, torch.ones(3)) == loss(s, t)


def test_gates_and_views_of_clusters():
    g = torch.Generator().manual_seed(0)
    good, bad = 0.3 + 0.1 * torch.randn(300, generator=g), 2.0 + 0.3 * torch.randn(100, generator=g)
    gate = loss_gate(torch.cat([good, bad]))
    assert (gate[:300] > 0.5).float().mean() > 0.99
    assert (gate[300:] < 0.5).float().mean() > 0.99
    clusters = torch.tensor([0, 1, 0, 2, 1, 0, 0])
    for _ in range(20):
        other = cluster_views(clusters, g)
        assert torch.equal(clusters[other], clusters)
        alone = clusters == 2
        assert torch.equal(other[alone], torch.nonzero(alone).flatten())
        assert (other[~alone] != torch.arange(7)[~alone]).all()
    seen = {int(cluster_views(clusters, g)[0]) for _ in range(100)}
    assert seen == {2, 5, 6}
    z, y = 3 * rand(6, 4), torch.arange(6) % 4
    gate = torch.tensor([0.9, 0.1, 0.9, 0.1, 0.1, 0.1])
    loss = create("ca_dino", threshold=0.6)
    top = z.softmax(1).amax(1)
    rows = []
    for i in range(6):
        if gate[i] > 0.5:
            rows.append(F.cross_entropy(z[i], y[i]))
        elif top[i] > 0.6:
            rows.append(-((z[i] / 0.1).softmax(0) * z[i].log_softmax(0)).sum())
    torch.testing.assert_close(loss(z, y, gate), torch.stack(rows).mean())
    torch.testing.assert_close(loss(z, y, torch.ones(6)), F.cross_entropy(z, y))


def test_layers_are_paired_by_depth():
    small, large = llama(3), llama(6)
    assert pairs_by_depth(small, large, 3) == {f"model.layers.{i}": f"model.layers.{2 * i + 1}" for i in range(3)}
    assert pairs_by_depth(small, large, 1) == {"model.layers.2": "model.layers.5"}
    vit = timm_teacher("test_vit", pretrained=False, img_size=32)
    assert list(pairs_by_depth(vit, vit, 2))[-1] == f"blocks.{len(vit.blocks) - 1}"
    with pytest.raises(LossplugError, match="the student has 3 blocks, 4 pairs"):
        pairs_by_depth(small, large, 4)
    with pytest.raises(LossplugError, match=r"the teacher .Linear. has no single stack of blocks"):
        pairs_by_depth(small, nn.Linear(2, 2), 1)
    torch.manual_seed(0)
    module = CausalLM(from_config={**LLAMA, "hidden_size": 16, "num_hidden_layers": 2})
    callback = Distillation(llama(4), None, feature_loss="hidden_cosine", layers=1)
    trainer(callback, max_steps=1).fit(module, texts())
    assert (callback.pairing.student, callback.pairing.teacher) == (["model.layers.1"], ["model.layers.3"])
    assert callback.logs["features"] > 0


def test_dropped_layers():
    model = llama(6).eval()
    before = copy.deepcopy(model.state_dict())
    small = drop_layers(model, 3)
    assert small.config.num_hidden_layers == 3
    assert model.config.num_hidden_layers == 6
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for i, j in enumerate((0, 2, 5)):
        for a, b in zip(small.model.layers[i].parameters(), model.model.layers[j].parameters(), strict=True):
            assert torch.equal(a, b)
    ids = torch.randint(32, (1, 6))
    made = small.generate(ids, max_new_tokens=4, do_sample=False)  # with a cache, whose layers are numbered anew
    with torch.no_grad():
        step = small(made[:, :-1], use_cache=False).logits[:, 5:].argmax(-1)
    assert torch.equal(made[:, 6:], step)
    same = drop_layers(model, [0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(same(ids).logits, model(ids).logits)
    with pytest.raises(LossplugError, match="can't be taken from 6"):
        drop_layers(model, [0, 7])
    with pytest.raises(LossplugError, match="can't be taken from 6"):
        drop_layers(model, [3, 1])
    with pytest.raises(LossplugError, match="0 lists of"):
        drop_layers(nn.Linear(2, 2), 1)
