"""Which samples a rank sees, in which order.

The order of an epoch is a pure function of (seed, epoch), the same on all ranks, and rank r takes
every world_size-th index of it, starting with the r-th. For 7 samples on 3 ranks::

    order               4 0 6 2 5 1 3
    pad=True            4 0 6 2 5 1 3 4 0     rank 0: 4 2 3   rank 1: 0 5 4   rank 2: 6 1 0
    drop_last=True      4 0 6 2 5 1           rank 0: 4 2     rank 1: 0 5     rank 2: 6 1
    pad=False           4 0 6 2 5 1 3         rank 0: 4 2 3   rank 1: 0 5     rank 2: 6 1

So what all ranks have had after some batches is the beginning of the order, and the rest can be cut for another number
of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from minidist.training.seed import derived_seed


class ShardedSampler(Sampler[int]):
    """One rank's share of a data set's indices, for a `torch.utils.data.DataLoader`.

    Training needs equally many batches on all ranks: leave ``pad`` on, which repeats samples from the
    start of the order until the shares are equal, or set ``drop_last``, which leaves the rest out.
    Evaluation needs every sample exactly once: ``pad=False``, with shares that differ by at most one.

    Args:
        num_samples: size of the data set.
        rank, world_size: whose share it is.
        batch_size: the loader's; says where batch ``first_batch`` of an epoch begins.
        shuffle: whether each epoch has an order of its own; otherwise 0 to num_samples - 1.
        seed: of the orders; the same on all ranks.
        drop_last: leave out the samples that would make the shares unequal.
        pad: repeat samples so that the shares are equal; without effect when ``drop_last``.

    Attributes:
        skipped: samples at the start of the epoch's order that are nobody's, since they were trained on before.

    Raises:
        ValueError: a count below 1, or a rank outside of the world.
    """

    def __init__(
        self,
        num_samples: int,
        rank: int,
        world_size: int,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool = False,
        pad: bool = True,
    ) -> None:
        for name, count in (("num_samples", num_samples), ("world_size", world_size), ("batch_size", batch_size)):
            if count < 1:
                raise ValueError(f"ShardedSampler: {name} must be at least 1, got {count}")
        if not 0 <= rank < world_size:
            raise ValueError(f"ShardedSampler: rank must be 0 to {world_size - 1} (world_size - 1), got {rank}")
        self.num_samples = num_samples
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.pad = pad
        self.epoch = self.first_batch = self.skipped = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch whose order comes next, from batch ``first_batch`` of this rank on."""
        self.epoch = epoch
        self.first_batch = first_batch

    def __len__(self) -> int:
        """Return this rank's number of samples in what is not skipped of an epoch, at whichever batch it begins."""
        num_samples = max(0, self.num_samples - self.skipped)
        if self.drop_last:
            return num_samples // self.world_size
        # Rounded up: with pad on all ranks, without it on those below num_samples % world_size.
        left_over = self.world_size - 1 if self.pad else self.world_size - 1 - self.rank
        return (num_samples + left_over) // self.world_size

    def __iter__(self) -> Iterator[int]:
        # All of the order, also where the epoch begins in its middle: only then is its rest what it was before.
        order = self._order()
        for position in range(self.first_batch * self.batch_size, len(self)):
            # Only the padded end goes beyond the order: at its start again, several times in a small data set.
            yield order[(self.skipped + self.rank + position * self.world_size) % self.num_samples]

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.num_samples))
        # Of its own: the global generator stands elsewhere on each rank, and elsewhere again after a resume.
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        return torch.randperm(self.num_samples, generator=generator).tolist()
