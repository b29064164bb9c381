"""Two ranks with different data come to the same masks: those of all the data together."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lossplug.schedules import Progress
from lightning_lossplug.sparsity import NMSettings, NMTechnique


def data():
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5, 1, 5, 1, 5, 1, 5])
    x[8:] = x[8:].flip(1) * 3
    return x


def masks(rank, world):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    technique = NMTechnique(NMSettings(2, 4, "nm_ste", ["0", "2"], score="wanda", score_ema=0.5))
    technique.attach(model)
    runner = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    technique.advance(Progress(0, 4))
    for step in range(3):
        optimizer.zero_grad()
        for part in data()[rank::world].chunk(2):  # gradient accumulation
            runner(part * (step + 1)).square().mean().backward()
        technique.before_step(optimizer)
        optimizer.step()
        technique.after_step(optimizer)
        technique.advance(Progress(step + 1, 4))
    return {k: v.clone() for k, v in model.state_dict().items() if "transforms" in k}


def work(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(masks(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_with_each_other_and_with_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    alone = masks(0, 1)
    squares = [key for key in alone if key.endswith("input_square")]
    assert len(squares) == 2
    # The first layer sees the data itself; behind it the accumulated gradients differ in rounding only.
    for key in squares:
        assert torch.allclose(first[key], alone[key], rtol=1e-4), key
    for key in (key for key in alone if key.endswith("bits")):
        assert torch.equal(first[key], alone[key]), key
