"""Moments summed over two gloo processes are those of one, and factors of two become one's."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_lossplug.kv_cache import Factors, KVFactors, KVShrinkSettings, LayerFactors
from lightning_lossplug.kv_cache.files import shared_factors
from lightning_lossplug.kv_cache.moments import Moments


def rows():
    return torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    moments = Moments(4)
    moments.update(rows()[:3] if rank else rows()[3:])
    moments.all_reduce()
    layer = LayerFactors(
        Factors(torch.full((4, 2), 1.0 + rank), torch.ones(2, 4)), Factors(*[torch.eye(4)] * 2), 0.1, 0.2
    )
    factors = shared_factors(KVFactors({0: layer}, KVShrinkSettings(), {"layers": {"0": 0.5}}, 10 + rank))
    kept = {"encode": factors.layers[0].keys.encode, "tokens": factors.tokens}
    torch.save({**moments.state_dict(), **kept}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    mp.start_processes(work, (str(tmp_path),), nprocs=2, start_method="fork")  # spawning imports torch twice more
    alone = Moments(4)
    alone.update(rows())
    alone.all_reduce()  # outside a group: nothing
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt")
        assert state["count"] == state["tokens"] == 10
        assert torch.equal(state["encode"], torch.ones(4, 2))
        torch.testing.assert_close(state["gram"], alone.gram, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state["total"], alone.total, rtol=1e-12, atol=1e-12)
