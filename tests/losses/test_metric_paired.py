"""Losses of two views or modalities: NT-Xent, InfoNCE, tiles, SigLIP, Barlow Twins, W-MSE, align-uniform, AMCL."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import create
from lightning_lossplug.losses.angular import angular_margin
from lightning_lossplug.losses.siglip import row_sums
from lightning_lossplug.losses.w_mse import whiten

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SEEDS = given(seed=st.integers(0, 10_000))
FEW = settings(max_examples=15, deadline=None)


def views(batch: int = 8, width: int = 4, seed: int = 0, *, unit: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, batch, width, generator=generator, dtype=torch.float64)
    b = a + b
    return (F.normalize(a), F.normalize(b)) if unit else (a, b)


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def rotation(width: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(views(width, width, seed)[0])[0]


COSINE = ["nt_xent", "nt_xent_am", "info_nce", "tiled_contrastive", "siglip", "align_uniform"]


@pytest.mark.parametrize("name", COSINE)
@FEW
@SEEDS
def test_cosine_losses_see_directions_only(name, seed):
    loss = create(name).double()
    a, b = views(seed=seed)
    turn = rotation(4, seed)
    torch.testing.assert_close(loss(3 * a @ turn, b @ turn / 5), loss(a, b), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [*COSINE, "barlow_twins"])
def test_modalities_can_be_swapped(name):
    loss, (a, b) = create(name).double(), views()
    torch.testing.assert_close(loss(b, a), loss(a, b), **EXACT)


class TestNTXent:
    def test_is_the_cross_entropy_of_simclr(self):
        a, b = views(unit=True)
        z = torch.cat([a, b])
        logits = (z @ z.T * 7).fill_diagonal_(-torch.inf)
        target = (torch.arange(16) + 8) % 16
        torch.testing.assert_close(create("nt_xent", scale=7.0)(a, b), F.cross_entropy(logits, target), **EXACT)

    def test_margin_shifts_the_positive_column(self):
        a, b = views(unit=True)
        z, target = torch.cat([a, b]), (torch.arange(16) + 8) % 16
        logits = (z @ z.T * 7).fill_diagonal_(-torch.inf)
        logits = logits - 1.4 * F.one_hot(target, 16).double()
        loss = create("nt_xent_am", scale=7.0, margin=0.2)
        torch.testing.assert_close(loss(a, b), F.cross_entropy(logits, target), **EXACT)
        torch.testing.assert_close(create("nt_xent", scale=7.0)(a, b, margin=0.2), loss(a, b), **EXACT)

    def test_one_direction_is_plain_cross_entropy(self):
        a, b = views(unit=True)
        loss = create("nt_xent", scale=7.0, symmetric=False)
        torch.testing.assert_close(loss(a, b), F.cross_entropy(7 * a @ b.T, torch.arange(8)), **EXACT)

    @pytest.mark.parametrize("angular", [False, True])
    @FEW
    @SEEDS
    def test_grows_with_the_margin(self, angular, seed):
        a, b = views(seed=seed)
        loss = create("nt_xent_am", angular=angular)
        values = [float(loss(a, b, margin=m)) for m in (0.0, 0.05, 0.3, 0.6, 0.99)]
        assert all(low <= high + 1e-12 for low, high in itertools.pairwise(values))

    def test_angular_margin_is_the_angle_plus_m(self):
        theta = torch.linspace(0.01, 3.1, 50, dtype=torch.float64)
        value = angular_margin(theta.cos(), 0.5)
        inside = theta + 0.5 <= math.pi
        torch.testing.assert_close(value[inside], (theta + 0.5).cos()[inside], rtol=1e-9, atol=1e-9)
        assert (value.diff() < 0).all()  # keeps falling past pi
        torch.testing.assert_close(angular_margin(theta.cos(), torch.tensor(0.5).double()), value)

    def test_scale_and_margin_that_are_learnt_have_gradients(self):
        a, b = views()
        s, m = leaves(torch.tensor(5.0), torch.tensor(0.1))
        create("nt_xent_am")(a, b, s, margin=m).backward()
        assert s.grad.abs() > 0
        assert m.grad > 0  # the loss grows with the margin

    def test_scale_per_pair(self):
        a, b = views()
        loss = create("nt_xent", scale=4.0)
        torch.testing.assert_close(loss(a, b, torch.full((16, 16), 4.0)), loss(a, b), **EXACT)

    def test_a_single_sample_has_no_negatives(self):
        assert create("nt_xent")(*views(1)) == 0


class TestInfoNCE:
    def test_is_the_mean_of_two_cross_entropies(self):
        a, b = views(unit=True)
        loss = create("info_nce", logit_scale=1.5).double()
        logits, target = math.exp(1.5) * a @ b.T, torch.arange(8)
        expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        torch.testing.assert_close(loss(a, b), expected, **EXACT)
        one = create("info_nce", logit_scale=1.5, symmetric=False).double()
        torch.testing.assert_close(one(a, b), F.cross_entropy(logits, target), **EXACT)

    def test_no_scale_gives_log_b(self):
        torch.testing.assert_close(create("info_nce")(*views(), scale=0.0), torch.tensor(math.log(8)).double())

    def test_gradient(self):
        a, b = leaves(*views(unit=True))
        create("info_nce", normalize=False)(a, b, 3.0).backward()
        x = 3 * a.detach() @ b.detach().T
        d = (x.softmax(1) + x.softmax(0) - 2 * torch.eye(8)) / 16
        torch.testing.assert_close(a.grad, 3 * d @ b.detach(), **EXACT)
        torch.testing.assert_close(b.grad, 3 * d.T @ a.detach(), **EXACT)

    def test_joint_order_does_not_matter_a_one_sided_one_does(self):
        a, b = views()
        loss, order = create("info_nce").double(), torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
        torch.testing.assert_close(loss(a[order], b[order]), loss(a, b), **EXACT)
        assert abs(loss(a[order], b) - loss(a, b)) > 0.1

    def test_scale_is_held_below_one_hundred_and_can_come_back(self):
        loss = create("info_nce").double()
        with torch.no_grad():
            loss.logit_scale.fill_(7.0)
        assert loss.eval()(*views()).isfinite()
        assert loss.logit_scale == 7
        loss.train()(*views()).backward()
        torch.testing.assert_close(loss.logit_scale.exp(), torch.tensor(100.0).double())
        assert loss.logit_scale.grad.abs() > 0

    def test_a_scale_of_the_model_leaves_nothing_to_learn(self):
        loss = create("info_nce", learnable=False)
        assert not list(loss.parameters())
        assert "logit_scale" in loss.state_dict()
        a, b = views()
        torch.testing.assert_close(
            loss(a, b, scale=100.0), create("info_nce", logit_scale=math.log(100)).double()(a, b)
        )

    def test_a_constant_bias_cancels_a_matrix_does_not(self):
        a, b = views()
        loss = create("info_nce").double()
        torch.testing.assert_close(loss(a, b, bias=3.0), loss(a, b), **EXACT)
        logits = F.normalize(a) @ F.normalize(b).T / 0.07 + torch.eye(8)
        expected = (F.cross_entropy(logits, torch.arange(8)) + F.cross_entropy(logits.T, torch.arange(8))) / 2
        torch.testing.assert_close(loss(a, b, bias=torch.eye(8)), expected, rtol=1e-6, atol=1e-6)


class TestTiles:
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize(("row_tile", "col_tile"), [(1, 1), (3, 5), (8, 7), (100, 100), (11, 1)])
    def test_value_and_gradients_are_those_of_info_nce(self, row_tile, col_tile, symmetric):
        dense = create("info_nce", symmetric=symmetric).double()
        tiled = create("tiled_contrastive", row_tile=row_tile, col_tile=col_tile, symmetric=symmetric).double()
        backend = create(
            "info_nce", backend="tiled", row_tile=row_tile, col_tile=col_tile, symmetric=symmetric
        ).double()
        found = []
        for loss in (dense, tiled, backend):
            a, b = leaves(*views(11))
            value = loss(a, b)
            value.backward()
            found.append((value.detach(), a.grad, b.grad, loss.logit_scale.grad))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], **EXACT)

    def test_rows_and_upstream_weights(self):
        weights, found = torch.linspace(0, 1, 8, dtype=torch.float64), []
        for name in ("info_nce", "tiled_contrastive"):
            a, b = leaves(*views())
            rows = create(name, reduction="none").double()(a, b)
            rows.backward(weights)
            found.append((rows.detach(), a.grad, b.grad))
        torch.testing.assert_close(found[1], found[0], **EXACT)

    @pytest.mark.parametrize("frozen", [0, 1, 2])
    def test_frozen_inputs(self, frozen):
        a, b = leaves(*views())
        loss = create("tiled_contrastive", row_tile=3, col_tile=3).double()
        inputs = [a, b, loss.logit_scale]
        inputs[frozen].requires_grad_(False)
        loss(a, b).backward()
        assert [x.grad is None for x in inputs] == [index == frozen for index in range(3)]

    def test_large_logits_do_not_overflow(self):
        a, b = (x.float() for x in views())
        value = create("tiled_contrastive", row_tile=3, col_tile=2)(a, b, 1e4)
        torch.testing.assert_close(value, create("info_nce")(a, b, 1e4))

    def test_no_tensor_is_larger_than_the_inputs_or_a_tile(self):
        largest = {}

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                for x in out if isinstance(out, tuple | list) else (out,):
                    if isinstance(x, torch.Tensor):
                        largest[name] = max(largest.get(name, 0), x.numel())
                return out

        for name, parameters in (("info_nce", {}), ("tiled_contrastive", {"row_tile": 16, "col_tile": 16})):
            a, b = leaves(*views(128, 2))
            loss = create(name, **parameters).double()
            with Watch():
                loss(a, b).backward()
        assert largest == {"info_nce": 128 * 128, "tiled_contrastive": 256}

    def test_single_values_only(self):
        loss = create("tiled_contrastive")
        for bad in ({"scale": torch.ones(8, 8)}, {"bias": torch.ones(8, 8)}):
            with pytest.raises(LossplugError, match="single"):
                loss(*views(), **bad)

    def test_second_derivatives_are_refused(self):
        a, b = leaves(*views())
        with pytest.raises(LossplugError, match="second derivative"):
            torch.autograd.grad(create("tiled_contrastive")(a, b), a, create_graph=True)


class TestSigLIP:
    @pytest.mark.parametrize("row_tile", [None, 1, 3, 8])
    def test_by_hand(self, row_tile):
        a, b = views(unit=True)
        x = 10 * a @ b.T - 4
        expected = (F.softplus(x).sum() - x.diagonal().sum()) / 8
        loss = create("siglip", logit_bias=-4.0, row_tile=row_tile).double()
        torch.testing.assert_close(loss(a, b), expected, rtol=1e-6, atol=1e-6)  # 10 is a float32 exponential here
        torch.testing.assert_close(loss(a, b, 10.0, -4.0), expected, **EXACT)

    def test_initial_scale_and_bias(self):
        loss = create("siglip")
        torch.testing.assert_close(loss.logit_scale.exp(), torch.tensor(10.0))
        assert loss.logit_bias == -10
        assert not list(create("siglip", learnable=False).parameters())

    def test_gradients(self):
        a, b = leaves(*views(unit=True))
        t, c = leaves(torch.tensor(3.0).double(), torch.tensor(-1.0).double())
        create("siglip", normalize=False)(a, b, t, c).backward()
        s = a.detach() @ b.detach().T
        d = ((3 * s - 1).sigmoid() - torch.eye(8)) / 8
        torch.testing.assert_close(a.grad, 3 * d @ b.detach(), **EXACT)
        torch.testing.assert_close(t.grad, (d * s).sum(), **EXACT)
        torch.testing.assert_close(c.grad, d.sum(), **EXACT)

    def test_tiles_have_the_same_gradients(self):
        found = []
        for tile in (None, 3):
            a, b = leaves(*views())
            loss = create("siglip", row_tile=tile).double()
            loss(a, b).backward()
            found.append((a.grad, b.grad, loss.logit_scale.grad, loss.logit_bias.grad))
        torch.testing.assert_close(found[1], found[0], **EXACT)

    def test_foreign_rows_are_all_negative(self):
        a, b = views()
        t, c = torch.tensor(2.0).double(), torch.tensor(-1.0).double()
        expected = torch.logaddexp(2 * a @ b.T - 1, torch.zeros(8, 8)).sum()
        torch.testing.assert_close(row_sums(a, b, t, c, start=8).sum(), expected, **EXACT)

    def test_small_losses_keep_their_digits(self):
        a = torch.eye(2)
        value = create("siglip")(a, a, 60.0, -30.0)  # two rows of one positive at 30, one negative at -30
        torch.testing.assert_close(value, torch.tensor(2 * math.exp(-30)), rtol=1e-5, atol=0)


class TestBarlowTwins:
    def test_by_hand(self):
        a, b = views()
        za, zb = ((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() for x in (a, b))
        c = za.T @ zb / 8
        expected = sum((c[i, j] - 1) ** 2 if i == j else 0.3 * c[i, j] ** 2 for i in range(4) for j in range(4))
        torch.testing.assert_close(create("barlow_twins", lambd=0.3)(a, b), expected, **EXACT)

    @FEW
    @SEEDS
    def test_per_dimension_affine_maps_change_nothing(self, seed):
        a, b = views(seed=seed)
        slope, shift = torch.tensor([2.0, -3.0, 50.0, 7.0]), torch.tensor([1.0, 5.0, -7.0, 0.0])
        # not exactly: the eps of the variance isn't scaled
        loss = create("barlow_twins")
        torch.testing.assert_close(loss(a * slope + shift, b * slope), loss(a, b), rtol=1e-3, atol=1e-3)

    def test_equal_views_with_orthogonal_dimensions_give_almost_nothing(self):
        x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
        assert create("barlow_twins")(x, x) < 1e-9
        assert create("barlow_twins")(x, -x) > 7.9

    def test_one_sample_is_the_number_of_dimensions(self):
        torch.testing.assert_close(create("barlow_twins")(*views(1)), torch.tensor(4.0).double())


class TestWMSE:
    @FEW
    @given(seed=st.integers(0, 10_000), eps=st.sampled_from([0.0, 0.01]))
    def test_whitened_covariance(self, seed, eps):
        x = views(20, 3, seed)[0] * torch.tensor([1.0, 10.0, 0.1]) + 5
        w = whiten(x, eps)
        centred = x - x.mean(0)
        covariance = (1 - eps) * centred.T @ centred / 19 + eps * torch.eye(3)
        factor = torch.linalg.cholesky(covariance)
        torch.testing.assert_close(factor @ w.T, centred.T, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(w.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-9)
        if eps == 0:
            torch.testing.assert_close(w.T @ w / 19, torch.eye(3).double(), rtol=1e-8, atol=1e-8)

    def test_by_hand_with_one_sub_batch(self):
        a, b = views(12, 3)
        wa, wb = whiten(a), whiten(b)
        loss = create("w_mse", w_size=12)
        torch.testing.assert_close(loss(a, b), 2 - 2 * F.cosine_similarity(wa, wb).mean(), **EXACT)
        torch.testing.assert_close(create("w_mse", w_size=12, normalize=False)(a, b), F.mse_loss(wa, wb), **EXACT)

    def test_sub_batches_are_the_same_for_both_views(self):
        a, _ = views(24, 3)
        torch.testing.assert_close(create("w_mse", w_size=6, w_iter=3)(a, a), torch.tensor(0.0).double(), **EXACT)

    def test_partitions_are_drawn_and_averaged(self):
        a, b = views(24, 3)
        torch.manual_seed(3)
        orders = [torch.randperm(24), torch.randperm(24)]
        expected = 0
        for order in orders:
            for part in order.split(6):
                expected = expected + (2 - 2 * F.cosine_similarity(whiten(a[part]), whiten(b[part])).mean()) / 8
        torch.manual_seed(3)
        torch.testing.assert_close(create("w_mse", w_size=6, w_iter=2)(a, b), expected, **EXACT)

    @FEW
    @SEEDS
    def test_lower_triangular_maps_change_nothing_and_range(self, seed):
        a, b = views(20, 3, seed)
        lower = torch.tril(views(3, 3, seed)[0]) + 3 * torch.eye(3)
        loss = create("w_mse", w_size=20)
        value = loss(a, b)
        # Rows map by x L^T, so the covariance is L S L^T and its factor the product of the two
        torch.testing.assert_close(loss(a @ lower.T + 1, b @ lower.T), value, rtol=1e-7, atol=1e-7)
        assert 0 <= value <= 4

    def test_opposite_views_reach_the_upper_end(self):
        a, _ = views(20, 3)
        torch.testing.assert_close(create("w_mse", w_size=20)(a, -a), torch.tensor(4.0).double(), **EXACT)

    def test_refusals(self):
        with pytest.raises(LossplugError, match="divide"):
            create("w_mse", w_size=7)(*views(20, 3))
        with pytest.raises(LossplugError, match="exceed the width"):
            create("w_mse", w_size=3)(*views(12, 3))
        flat = torch.ones(12, 3)
        with pytest.raises(LossplugError, match="singular"):
            create("w_mse", w_size=12)(flat, flat)


class TestAlignUniform:
    @pytest.mark.parametrize(("alpha", "t", "lam"), [(2.0, 2.0, 1.0), (1.0, 3.0, 0.5), (3.0, 0.5, 0.0)])
    def test_by_hand(self, alpha, t, lam):
        a, b = views(unit=True)
        align = (a - b).norm(dim=1).pow(alpha).mean()
        uniform = sum(F.pdist(x).pow(2).mul(-t).exp().mean().log() for x in (a, b)) / 2
        loss = create("align_uniform", alpha=alpha, t=t, lam=lam)
        torch.testing.assert_close(loss(a, b), align + lam * uniform, rtol=1e-10, atol=1e-10)

    @FEW
    @SEEDS
    def test_uniformity_lies_between_minus_4t_and_zero(self, seed):
        a, _ = views(seed=seed)
        value = create("align_uniform", t=3.0)(a, a)  # alignment is 0
        assert -12 <= value <= 1e-12

    def test_ends_of_the_range(self):
        point = torch.ones(5, 3, dtype=torch.float64)
        assert create("align_uniform")(point, point).abs() < 1e-12
        pole = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(create("align_uniform", t=3.0)(pole, pole), torch.tensor(-12.0).double())

    @pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 2.0, 3.0])
    def test_equal_views_have_a_gradient(self, alpha):
        a, b = leaves(*[views()[0]] * 2)
        create("align_uniform", alpha=alpha, lam=0.0)(a, b).backward()
        assert (a.grad.abs() < 1e-9).all()

    def test_no_normalisation(self):
        a, b = views()
        expected = (a - b).square().sum(1).mean() + sum(
            F.pdist(x).pow(2).mul(-2).exp().mean().log() for x in (a, b)
        ) / 2
        torch.testing.assert_close(create("align_uniform", normalize=False)(a, b), expected, rtol=1e-10, atol=1e-10)


class TestAMCL:
    def one_head(self, **parameters):
        torch.manual_seed(0)
        return create("amcl", embedding_size=4, n_heads=1, projection_size=5, **parameters).double()

    @pytest.mark.parametrize("base", ["nt_xent", "info_nce"])
    def test_one_head_with_constant_temperature_is_the_base_loss(self, base):
        loss, (a, b) = self.one_head(base=base, temperature=0.2), views()
        head = loss.heads[0]
        torch.testing.assert_close(loss(a, b), create(base).double()(head(a), head(b), 5.0), **EXACT)

    def test_heads_are_summed_each_with_its_temperatures(self):
        torch.manual_seed(0)
        tau = torch.rand(2, 16, 16).double() + 0.5
        loss = create("amcl", embedding_size=4, n_heads=2, temperature=lambda u, v: tau).double()
        a, b = views()
        expected = sum(create("nt_xent")(head(a), head(b), 1 / tau[m]) for m, head in enumerate(loss.heads))
        torch.testing.assert_close(loss(a, b), expected, **EXACT)

    def test_temperature_module_and_heads_are_trained_the_base_is_not(self):
        class Temperature(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.log_tau = torch.nn.Parameter(torch.zeros(1))

            def forward(self, u, v):
                assert u.shape == v.shape == (1, 8, 5)
                return self.log_tau.exp()

        loss = self.one_head(base="info_nce", temperature=Temperature(), regulariser=lambda tau: 3 * tau.sum())
        loss(*views()).backward()
        trained = {key for key, p in loss.named_parameters() if p.grad is not None}
        assert trained == {key for key, p in loss.named_parameters() if p.requires_grad}
        assert {"temperature.log_tau", "heads.0.0.weight"} <= trained
        assert "base.logit_scale" not in trained

    def test_regulariser_is_added(self):
        a, b = views()
        plain = self.one_head(temperature=0.5)
        regularised = self.one_head(temperature=0.5, regulariser=lambda tau: 7 * tau)
        torch.testing.assert_close(regularised(a, b), plain(a, b) + 3.5, **EXACT)

    def test_base_parameters_and_refusals(self):
        a, b = views()
        wide = self.one_head(base="nt_xent_am", base_parameters={"margin": 0.5})
        assert wide(a, b) > self.one_head(base="nt_xent_am", base_parameters={"margin": 0.0})(a, b)
        with pytest.raises(LossplugError, match="no parameter"):
            self.one_head(base_parameters={"marginn": 0.5})
        with pytest.raises(LossplugError, match="rows"):
            self.one_head(reduction="none", regulariser=torch.sum)
        with pytest.raises(LossplugError, match="width"):
            self.one_head()(a[:, :3], b[:, :3])

    def test_embeddings_of_a_half_precision_encoder(self):
        torch.manual_seed(0)
        loss = create("amcl", embedding_size=4)
        a, b = (x.bfloat16() for x in views())
        assert loss(a, b).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert loss(a, b).isfinite()
