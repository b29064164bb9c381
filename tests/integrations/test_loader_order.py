"""Order of an epoch, its division among processes, and the resumable loader in a plain loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations.data.loader import ResumableLoader
from lightning_lossplug.integrations.data.order import count_batches, epoch_order, mix, random_uniform, rank_batches

sizes = {
    "samples": st.integers(1, 60),
    "batch_size": st.integers(1, 9),
    "world_size": st.integers(1, 5),
    "drop_last": st.booleans(),
}


@settings(max_examples=150, deadline=None)
@given(**sizes)
def test_every_rank_gets_as_many_batches_and_no_sample_is_lost(samples, batch_size, world_size, drop_last):
    step = batch_size * world_size
    if drop_last and samples < step:
        with pytest.raises(LossplugError, match="do not fill one batch"):
            count_batches(samples, batch_size, world_size, drop_last)
        return
    order = epoch_order(samples, 0, 0)
    ranks = [rank_batches(order, batch_size, rank, world_size, drop_last) for rank in range(world_size)]
    count = count_batches(samples, batch_size, world_size, drop_last)
    for batches in ranks:
        assert len(batches) == count
        assert [len(batch) for batch in batches] == [len(batch) for batch in ranks[0]]
        assert all(0 < len(batch) <= batch_size for batch in batches)
        assert all(len(batch) == batch_size for batch in batches[:-1])
    seen = [index for batches in ranks for batch in batches for index in batch.tolist()]
    if drop_last:
        assert len(seen) == len(set(seen)) == samples // step * step
    else:
        assert set(seen) == set(range(samples))
        assert len(seen) - samples == -samples % world_size  # no more repeats than the division needs


@settings(max_examples=60, deadline=None)
@given(batch_size=st.integers(1, 4), steps=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_processes(batch_size, steps, seed):
    order = epoch_order(4 * batch_size * steps + 3, seed, 7)
    together = [set(batch.tolist()) for batch in rank_batches(order, 4 * batch_size, 0, 1, True)]
    for world_size in (2, 4):
        each = [rank_batches(order, 4 * batch_size // world_size, rank, world_size, True) for rank in range(world_size)]
        assert [set(torch.cat(parts).tolist()) for parts in zip(*each, strict=True)] == together


def test_order_is_a_permutation_of_its_own_for_each_seed_and_epoch():
    orders = {(seed, epoch): tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len(set(orders.values())) == 16
    assert epoch_order(5, 1, 1, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_order_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    loader = ResumableLoader(TensorDataset(torch.arange(20)), 4, num_workers=1)
    assert len(list(loader)) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_random_uniform_is_uniform_and_independent_of_the_batch():
    index = torch.arange(200_000)
    draws = random_uniform(index, 3, 1)
    assert draws.min() >= 0 and draws.max() < 1
    # 5 standard errors
    assert abs(draws.mean() - 0.5) < 5 * (1 / 12 / len(index)) ** 0.5
    counts = torch.histc(draws, 20, 0, 1)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 60  # chi-square with 19 degrees of freedom, p < 1e-5
    other = random_uniform(index, 3, 2)
    assert abs(torch.corrcoef(torch.stack([draws, other]))[0, 1]) < 0.012
    assert abs(torch.corrcoef(torch.stack([draws[:-1], draws[1:]]))[0, 1]) < 0.012
    assert torch.equal(random_uniform(torch.tensor([77, 5]), 3, 1), draws[[77, 5]])


def test_random_uniform_is_splitmix64():
    full = (1 << 64) - 1

    def reference(index, *key):
        state = (index * 0x9E3779B97F4A7C15 + mix(*key)) & full
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & full
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & full
        return ((state ^ (state >> 31)) >> 11) / 2**53

    indices = [0, 1, 2, 59_999, 2**31]
    wanted = [reference(index, 5, 9, 2) for index in indices]
    assert random_uniform(torch.tensor(indices), 5, 9, 2).tolist() == wanted


def loader(**options):
    return ResumableLoader(TensorDataset(torch.arange(23)), **{"batch_size": 4, "seed": 2, **options})


def epochs(loader, first, last):
    seen = []
    for epoch in range(first, last):
        loader.set_epoch(epoch)
        seen += [batch[0].tolist() for batch in loader]
    return seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 6, 8])
def test_plain_loop_goes_on_where_it_stopped(workers, stop):
    whole = epochs(loader(drop_last=False), 0, 3)
    assert len(whole) == 18
    first = loader(drop_last=False, num_workers=workers)
    seen = []
    for epoch in range(3):
        first.set_epoch(epoch)
        for batch in first:
            seen.append(batch[0].tolist())
            if len(seen) == stop:
                break
        if len(seen) == stop:
            break
    state = first.state_dict()
    assert state["batches"] == stop - 6 * epoch
    second = loader(drop_last=False, num_workers=workers)
    second.load_state_dict(state)
    assert len(second) == 6
    assert seen + epochs(second, second.sampler.epoch, 3) == whole


def test_a_continued_epoch_is_whole_when_begun_again():
    one = loader()
    one.load_state_dict({**one.state_dict(), "batches": 3})
    assert [len(list(one)) for _ in range(2)] == [2, 5]


def test_state_of_a_finished_epoch_skips_nothing_of_the_next():
    one = loader()
    whole = epochs(one, 0, 2)
    two = loader()
    two.load_state_dict({**one.state_dict(), "epoch": 0, "batches": 5})
    assert epochs(two, 1, 2) == whole[5:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "seed 2 and is resumed with 3"),
        ({"batch_size": 5}, "batch_size 4 and is resumed with 5"),
        ({"shuffle": False}, "shuffle 1 and is resumed with 0"),
    ],
)
def test_other_settings_are_refused_in_mid_epoch(change, message):
    state = {**loader().state_dict(), "batches": 2}
    other = loader(**change)
    other.load_state_dict(state)
    with pytest.raises(LossplugError, match=message):
        next(iter(other))


def test_bad_input():
    with pytest.raises(LossplugError, match="batch_size is 0"):
        loader(batch_size=0)
    with pytest.raises(LossplugError, match="23 samples do not fill one batch of 24"):
        loader(batch_size=24)
