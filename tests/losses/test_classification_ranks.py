"""Losses whose state all ranks share: two processes have to agree, and to equal one process with all rows."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lightning_lossplug.losses import create

MINE = (slice(0, 2), slice(2, 5))  # two and three of five rows


def rows():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    y = torch.randint(4, (5,), generator=generator)
    features = torch.randn(5, 6, dtype=torch.float64, generator=generator)
    return z, y, features


def output_layer():
    layer = create("spherical_output_layer", in_features=6, num_classes=40).double()
    generator = torch.Generator().manual_seed(1)
    layer.set_weight(torch.randn(40, 6, dtype=torch.float64, generator=generator))
    return layer


def losses():
    return (
        create("aldr_kl", dataset_size=9).double(),
        create("bias_loss", normalisation="global").double(),
        output_layer(),
    )


INDEX = torch.tensor([1, 4, 2, 7, 1])  # sample 1 is on both ranks


def _rank(rank, file, result):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mine, (z, y, features) = MINE[rank], rows()
    aldr, bias, layer = losses()
    aldr(z[mine], y[mine], index=INDEX[mine])
    bias(z[mine], y[mine], features=features[mine])
    layer(features[mine], y[mine], denominator=2.5).backward()  # rows / ranks: the mean over all rows
    layer.step(0.1)
    empty = slice(0, rank)  # a rank without a row takes part all the same
    aldr(z[empty], y[empty], index=INDEX[empty])
    torch.save([loss.state_dict() for loss in (aldr, bias, layer)], f"{result}.{rank}")
    dist.destroy_process_group()


def test_ranks_hold_the_same_state_as_one_process(tmp_path):
    result = str(tmp_path / "state")
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "init"), result), nprocs=2)
    first, second = (torch.load(f"{result}.{rank}") for rank in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(a[key].equal(b[key]) for key in a)
    z, y, features = rows()
    aldr, bias, layer = losses()
    aldr(z, y, index=INDEX)
    aldr(z[:1], y[:1], index=INDEX[:1])
    bias(z, y, features=features)
    layer(features, y).backward()
    layer.step(0.1)
    for loss, state in zip((aldr, bias, layer), first, strict=True):
        torch.testing.assert_close(dict(loss.state_dict()), dict(state))
    assert first[0]["lambda_"].lt(1).tolist() == [False, True, True, False, True, False, False, True, False]
