"""Shares of the samples: complete, disjoint, equally long where they have to be, and the same again."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from backends.serial import SerialCommunicator
from minidist.training.progress import Position
from minidist.training.sampler import ShardedSampler

SIZES = [1, 2, 3, 7, 8, 9, 100]
WORLDS = [1, 2, 3, 4]


def shares(num_samples, world_size, epoch=0, first_batch=0, batch_size=2, **options):
    result = []
    for rank in range(world_size):
        sampler = ShardedSampler(num_samples, rank, world_size, batch_size, **{"shuffle": True, "seed": 5, **options})
        sampler.set_epoch(epoch, first_batch)
        result.append(list(sampler))
        if first_batch == 0:
            assert len(result[-1]) == len(sampler)
    return result


def joined(parts):
    return [index for part in parts for index in part]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("num_samples", SIZES)
def test_padded_shares_are_equal_and_hold_every_sample(num_samples, world_size):
    parts = shares(num_samples, world_size)
    assert {len(part) for part in parts} == {-(-num_samples // world_size)}
    assert set(joined(parts)) == set(range(num_samples))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("num_samples", SIZES)
def test_unpadded_shares_hold_every_sample_once(num_samples, world_size):
    parts = shares(num_samples, world_size, pad=False)
    assert sorted(joined(parts)) == list(range(num_samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("num_samples", SIZES)
def test_drop_last_leaves_out_less_than_one_round(num_samples, world_size):
    parts = shares(num_samples, world_size, drop_last=True)
    assert {len(part) for part in parts} == {num_samples // world_size}
    assert len(set(joined(parts))) == len(joined(parts)) > num_samples - world_size


def test_rank_takes_every_world_size_th_sample_in_order():
    assert shares(7, 3, shuffle=False) == [[0, 3, 6], [1, 4, 0], [2, 5, 1]]
    assert shares(7, 3, shuffle=False, pad=False) == [[0, 3, 6], [1, 4], [2, 5]]
    assert shares(1, 3, shuffle=False) == [[0], [0], [0]]


def test_order_is_a_function_of_seed_and_epoch():
    torch.manual_seed(1)
    before = shares(100, 2, epoch=3)
    torch.manual_seed(2)
    assert shares(100, 2, epoch=3) == before
    assert shares(100, 2, epoch=4) != before
    assert shares(100, 2, epoch=3, seed=6) != before
    assert shares(100, 2, epoch=0, seed=1) != shares(100, 2, epoch=1, seed=0)


@pytest.mark.parametrize("first_batch", [0, 1, 3, 7, 8])
def test_an_epoch_can_begin_at_any_batch(first_batch):
    whole, rest = shares(30, 2), shares(30, 2, first_batch=first_batch)
    assert rest == [part[2 * first_batch :] for part in whole]


def test_all_ranks_together_take_the_joined_batches_of_one_process():
    one = ShardedSampler(24, 0, 1, batch_size=6, shuffle=True, seed=9)
    three = [ShardedSampler(24, rank, 3, batch_size=2, shuffle=True, seed=9) for rank in range(3)]
    batches = zip(*(DataLoader(range(24), 2, sampler=sampler) for sampler in three), strict=True)
    for joined_batch, parts in zip(DataLoader(range(24), 6, sampler=one), batches, strict=True):
        assert sorted(joined_batch.tolist()) == sorted(torch.cat(parts).tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1, 1), "num_samples must be at least 1, got 0"),
        ((1, 0, 0, 1), "world_size must be at least 1, got 0"),
        ((1, 0, 1, 0), "batch_size must be at least 1, got 0"),
        ((1, 2, 2, 1), r"rank must be 0 to 1 \(world_size - 1\), got 2"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShardedSampler(*arguments, shuffle=True)


# Where the order of a loader comes from -----------------------------------------------------------


class Asked(Dataset):
    """Notes which samples it is asked for."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.asked.append(index)
        return index


class Batches:
    """A batch sampler of one's own, without a batch size."""

    def __init__(self, sampler):
        self.own = sampler

    def __len__(self):
        return 8

    def __iter__(self):
        return iter(BatchSampler(self.own, 3, drop_last=False))

    def set_epoch(self, epoch):
        self.own.set_epoch(epoch)


class SeekableBatches(Batches):
    """One that can begin anywhere."""

    batch_size = 3
    first_batch = 0

    def set_epoch(self, epoch, first_batch=0):
        self.first_batch = first_batch
        self.own.set_epoch(epoch, first_batch)


class Wrapper:
    """What is put around a loader, such as a prefetcher."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return iter(self.loader)


class Delegating(Wrapper):
    def __getattr__(self, name):
        return getattr(self.loader, name)


class Telling(Wrapper):
    def set_epoch(self, epoch):
        self.loader.sampler.set_epoch(epoch)


def order():
    return ShardedSampler(24, 0, 1, 3, shuffle=True, seed=2)


def distributed():
    return DistributedSampler(range(24), 1, 0, seed=2)


LOADERS = {
    "sampler": (lambda data: DataLoader(data, 3, sampler=order()), True),
    "batch-sampler": (lambda data: DataLoader(data, batch_sampler=BatchSampler(order(), 3, False)), True),
    "seekable-batches": (lambda data: DataLoader(data, batch_sampler=SeekableBatches(order())), True),
    "batches-of-ones-own": (lambda data: DataLoader(data, batch_sampler=Batches(order())), False),
    "torchs-sampler": (lambda data: DataLoader(data, 3, sampler=distributed()), False),
    "torchs-in-batch-sampler": (
        lambda data: DataLoader(data, batch_sampler=BatchSampler(distributed(), 3, False)),
        False,
    ),
    "delegating": (lambda data: Delegating(DataLoader(data, 3, sampler=order())), False),
    "telling": (lambda data: Telling(DataLoader(data, 3, sampler=order())), False),
}


@pytest.mark.parametrize(("make", "seeks"), LOADERS.values(), ids=LOADERS)
def test_every_loader_has_an_order_per_epoch_and_goes_on_in_its_middle(make, seeks):
    def taken(epoch, first_batch):
        data = Asked()
        steps = Position(epoch, first_batch).steps(make(data), 1, SerialCommunicator())
        return [batch.tolist() for (batch,) in steps], data.asked

    whole, _ = taken(1, 0)
    assert sorted(joined(whole)) == list(range(24))
    assert whole != taken(0, 0)[0]
    rest, asked = taken(1, 5)
    assert rest == whole[5:]
    assert asked == joined(whole[5:] if seeks else whole)


def test_a_loader_without_batches_takes_one_sample_of_its_sampler_at_a_time():
    steps = Position(0, 20).steps(
        DataLoader(Asked(), None, sampler=ShardedSampler(24, 0, 1, 1, False)), 1, SerialCommunicator()
    )
    assert [batch for (batch,) in steps] == [20, 21, 22, 23]
