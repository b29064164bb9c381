"""Losses with ``gather`` on two real processes: averaged gradients are those of one process on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.losses import create
from lightning_lossplug.losses.ranks import gather_rows, logsumexp_ranks, sum_ranks
from lightning_lossplug.registry import registry

B, D, CLASSES = 12, 3, 4
SPLITS = {"even": (6, 6), "uneven": (7, 5), "one rank empty": (12, 0)}
HEAD = {"num_classes": CLASSES, "embedding_size": D}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "circle": ("circle", {"gamma": 8.0}),
    "supcon": ("supcon", {"temperature": 0.3}),
    "supcon, skip_empty": ("supcon", {"skip_empty": True}),
    "tcm": ("tcm", {"margin_pos": 0.6, "margin_neg": -0.2}),
    "nt_xent": ("nt_xent", {"scale": 5.0}),
    "nt_xent, one direction": ("nt_xent", {"scale": 5.0, "symmetric": False}),
    "nt_xent_am": ("nt_xent_am", {"scale": 5.0, "margin": 0.3}),
    "info_nce": ("info_nce", {}),
    "info_nce, one direction": ("info_nce", {"symmetric": False}),
    "tiled_contrastive": ("tiled_contrastive", {"row_tile": 2, "col_tile": 5}),
    "siglip": ("siglip", {"logit_bias": -2.0}),
    "siglip, tiles": ("siglip", {"logit_bias": -2.0, "row_tile": 2}),
    "barlow_twins": ("barlow_twins", {"lambd": 0.1}),
    "w_mse": ("w_mse", {"w_size": 6}),
    "align_uniform": ("align_uniform", {"alpha": 1.5}),
    "amcl": ("amcl", {"embedding_size": D, "n_heads": 2, "projection_size": 4}),
    "adaface": ("adaface", {**HEAD, "t_alpha": 0.3, "s": 8.0}),
    "info_nce, sum": ("info_nce", {"reduction": "sum"}),
}


def batch(case: str) -> tuple[Tensor, Tensor]:
    """Two float64 views, or one and labels (one class has a single sample)."""
    generator = torch.Generator().manual_seed(5)
    x, other = torch.randn(2, B, D, generator=generator, dtype=torch.float64)
    labels = registry.get("loss", CASES[case][0]).signature.startswith("embeddings_labels")
    return x, torch.tensor([0, 0, 1, 2, 1, 0, 2, 1, 0, 3, 2, 1]) if labels else x + other / 2


def gradients(case: str, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of some rows behind a linear encoder, and the gradients of encoder and loss."""
    name, parameters = CASES[case]
    torch.manual_seed(0)
    loss = create(name, gather=True, **parameters).double()
    encoder = nn.Linear(D, D).double()
    x, y = (part[rows] for part in batch(case))
    torch.manual_seed(1)
    value = loss(encoder(x), encoder(y) if y.is_floating_point() else y)
    value.backward()
    named = [*encoder.named_parameters(), *((f"loss.{key}", p) for key, p in loss.named_parameters())]
    grads = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in named}
    return value.detach(), grads | {f"buffer.{key}": x for key, x in loss.named_buffers()}


class Model(nn.Module):
    """Encoder and loss in one module, as DDP wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.loss = nn.Linear(D, D).double(), create("info_nce", gather=True).double()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.loss(self.encoder(a), self.encoder(b))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[Any, Any] = {}
    for split, sizes in SPLITS.items():
        start = sum(sizes[:rank])
        for case in CASES:
            found[case, split] = gradients(case, slice(start, start + sizes[rank]))
    model = DistributedDataParallel(Model())
    a, b = batch("info_nce")
    rows = slice(6 * rank, 6 * rank + 6)
    value = model(a[rows], b[rows])
    value.backward()
    found["ddp"] = value.detach(), {key: p.grad for key, p in model.module.named_parameters()}

    x = torch.arange(3.0, dtype=torch.float64)[: rank + 1].mul(rank + 1).requires_grad_()
    (rows_of_all, labels), start = gather_rows(True, x, torch.full((rank + 1,), rank))
    (rows_of_all.square().sum() * (rank + 1)).backward()
    found["gather_rows"] = rows_of_all.detach(), labels, start, x.grad
    y = torch.tensor([float(rank), -torch.inf, -torch.inf if rank else 2.0], dtype=torch.float64, requires_grad=True)
    merged = logsumexp_ranks(True, y)
    merged[[0, 2]].sum().backward()
    found["logsumexp_ranks"] = merged.detach(), y.grad
    found["sum_ranks"] = sum_ranks(True, torch.tensor([1.0 + rank]))
    try:
        index = torch.tensor([0])
        create("circle", gather=True)(torch.randn(3, 2), torch.arange(3), indices_tuple=(index, index, index))
    except LossplugError as error:
        found["indices_tuple"] = str(error)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]


def test_table_holds_every_loss_that_gathers():
    gathering = {e.name for e in registry if e.kind == "loss" and e.family == "metric" and e.facts["gather"]}
    assert {name for name, _ in CASES.values()} == gathering


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", CASES)
def test_averaged_gradients_are_those_of_the_whole_batch(ranks, case, split):
    value, grads = gradients(case, slice(0, B))
    parts = [rank[case, split] for rank in ranks]
    torch.testing.assert_close(torch.stack([part[0] for part in parts]).mean(), value, rtol=1e-12, atol=1e-12)
    assert any(grad.abs().max() > 1e-6 for key, grad in grads.items() if not key.startswith("buffer"))
    for key, grad in grads.items():
        both = torch.stack([part[1][key] for part in parts])
        torch.testing.assert_close(both.mean(dim=0), grad, rtol=1e-10, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
        if key.startswith("buffer"):
            torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)


def test_without_gather_the_gradients_differ(ranks):
    x, y = batch("info_nce")
    torch.manual_seed(0)
    loss = create("info_nce").double()
    local = (loss(x[:6], y[:6]) + loss(x[6:], y[6:])) / 2
    assert abs(local - loss(x, y)) > 0.1


def test_real_ddp(ranks):
    model = Model()
    value = model(*batch("info_nce"))
    value.backward()
    torch.testing.assert_close((ranks[0]["ddp"][0] + ranks[1]["ddp"][0]) / 2, value.detach(), rtol=1e-12, atol=1e-12)
    for key, p in model.named_parameters():
        for rank in ranks:
            torch.testing.assert_close(rank["ddp"][1][key], p.grad, rtol=1e-10, atol=1e-12)


def test_gather_rows_concatenates_and_sums_gradients(ranks):
    whole = torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)
    for index, rank in enumerate(ranks):
        rows, labels, start, grad = rank["gather_rows"]
        torch.testing.assert_close(rows, whole)
        assert labels.tolist() == [0, 1, 1]
        assert start == index
        own = whole[:1] if index == 0 else whole[1:]
        torch.testing.assert_close(grad, 2 * own * (1 + 2))  # both ranks' uses, weighted 1 and 2


def test_logsumexp_ranks(ranks):
    ys = torch.tensor([[0.0, -torch.inf, 2.0], [1.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    for index, rank in enumerate(ranks):
        merged, grad = rank["logsumexp_ranks"]
        torch.testing.assert_close(merged, ys.logsumexp(dim=0))
        share = torch.nan_to_num((ys - ys.logsumexp(dim=0)).exp())
        torch.testing.assert_close(grad, 2 * share[index] * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
        assert rank["sum_ranks"] == 3


def test_local_indices_are_refused_across_ranks(ranks):
    assert "indices_tuple" in ranks[0]["indices_tuple"]


def test_gather_without_a_process_group_changes_nothing():
    x, y = batch("info_nce")
    torch.testing.assert_close(create("info_nce", gather=True)(x, y), create("info_nce")(x, y), rtol=0, atol=0)
    (only,), start = gather_rows(True, x)
    assert only is x
    assert start == 0
