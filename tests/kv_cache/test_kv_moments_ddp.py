"""Moments summed over two gloo processes are those of one."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_lossplug.kv_cache.moments import Moments


def rows():
    return torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    moments = Moments(4)
    moments.update(rows()[:3] if rank else rows()[3:])
    moments.all_reduce()
    torch.save(moments.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    mp.start_processes(work, (str(tmp_path),), nprocs=2, start_method="fork")  # spawning imports torch twice more
    alone = Moments(4)
    alone.update(rows())
    alone.all_reduce()  # outside a group: nothing
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt")
        assert state["count"] == 10
        torch.testing.assert_close(state["gram"], alone.gram, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state["total"], alone.total, rtol=1e-12, atol=1e-12)
