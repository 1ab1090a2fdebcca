"""Where training stands, and how to get back there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from minidist.communicator import Communicator
from minidist.training.seed import RandomState, random_state, restore_random_state

Batch = tuple[Tensor, Tensor]


class Loader(Protocol):
    """What training reads batches ``(inputs, targets)`` from: a DataLoader, a list, anything of that kind."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


@runtime_checkable
class EpochSampler(Protocol):
    """A sampler with an order per epoch, such as torch's DistributedSampler.

    It is looked for as the loader itself, its batch sampler, and its sampler.
    """

    def set_epoch(self, epoch: int) -> None: ...


@runtime_checkable
class SeekableSampler(Protocol):
    """A sampler that can begin in the middle of an epoch, such as `minidist.training.sampler.ShardedSampler`.

    A batch sampler or a loader of this kind begins with its ``first_batch``, too.
    """

    first_batch: int
    batch_size: int

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None: ...


@runtime_checkable
class _Sampled(Protocol):
    """A batch sampler, or what is wrapped around a DataLoader, that says which sampler is beneath."""

    @property
    def sampler(self) -> object: ...


class Steps:
    """The rest of an epoch, as groups of batches; its length is that of the whole epoch.

    The last group of an epoch may be smaller than ``batches_per_step``.

    Args:
        epoch: its number.
        who: this rank, for errors.
        first_batch: what was taken from the epoch before.
        num_batches: what the loader says it has.
        batches_per_step: of a group.
        batches: the rest.

    Raises:
        ValueError: on iteration, where the loader has more or fewer batches than it says.
    """

    def __init__(
        self, epoch: int, who: str, first_batch: int, num_batches: int, batches_per_step: int, batches: Iterator[Batch]
    ) -> None:
        self.epoch, self.num_done = epoch, math.ceil(first_batch / batches_per_step)
        self._num_steps = math.ceil(num_batches / batches_per_step)
        self._who, self._taken, self._num_batches = who, first_batch, num_batches
        self._batches_per_step, self._batches = batches_per_step, batches

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        while group := list(itertools.islice(self._batches, self._batches_per_step)):
            self._taken += len(group)
            if self._taken > self._num_batches:
                raise ValueError(f"{self._complaint()} and goes on; its __len__ has to be what it gives")
            yield group
        if self._taken < self._num_batches:
            raise ValueError(f"{self._complaint()} and ended after {self._taken}; its __len__ has to be what it gives")

    def _complaint(self) -> str:
        return f"{self._who}: the training loader said that epoch {self.epoch} has {self._num_batches} batches"


@dataclass
class Position:
    """How far this rank has come.

    Attributes:
        epoch: epochs that are complete.
        batch: batches taken from the loader in the epoch after them.
        step: optimizer steps since the start of training.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    _epoch_random: RandomState = field(default_factory=random_state, repr=False)

    def steps(self, loader: Loader, batches_per_step: int, comm: Communicator) -> Steps:
        """Return the steps of this epoch that are still to come. Collective.

        In the middle of an epoch the loader's iterator is made from the random state of the epoch's start, since
        an order or the seeds of worker processes may be drawn from it; then training's own state is put
        back. A `SeekableSampler` skips at once, other loaders are read up to the batch. Augmentations drawn in
        worker processes (``num_workers`` above 0) repeat exactly only in the latter case.

        Raises:
            ValueError: on every rank, if the ranks' loaders differ in length, or one of them has no batch.
        """
        who, num_batches, batches = comm.who("Engine.fit"), _length(loader, comm), self._batches(loader)
        first = next(batches, None)
        says = comm.all_gather_object((num_batches, first is not None))
        self._check_lengths([length for length, _ in says], who)
        silent = [rank for rank, (_, has_first) in enumerate(says) if not has_first]
        if silent and self.batch < num_batches:
            raise ValueError(
                f"{who}: the training loader of rank {silent[0]} gave no batch in epoch {self.epoch}, though its "
                f"length is {num_batches}; give one that can be read again in each epoch, as a DataLoader or a list can"
            )
        rest = batches if first is None else itertools.chain([first], batches)
        return Steps(self.epoch, who, self.batch, num_batches, batches_per_step, rest)

    def _check_lengths(self, lengths: Sequence[int], who: str) -> None:
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{who}: the training loaders of all ranks must have the same number of batches, "
                f"got {lengths}; use ShardedSampler with pad=True, or drop_last=True"
            )
        if lengths[0] == 0:
            raise ValueError(
                f"{who}: the training loader has no batch; give more samples, a smaller batch_size, or drop_last=False"
            )
        if lengths[0] < self.batch:
            raise ValueError(
                f"{who}: training stopped after batch {self.batch} of epoch {self.epoch}, and now the training loader "
                f"has only {lengths[0]}; go on with the loader of before"
            )

    def _batches(self, loader: Loader) -> Iterator[Batch]:
        if self.batch == 0:
            self._epoch_random = random_state()
            return self._seek(loader)
        now = random_state()
        restore_random_state(self._epoch_random)
        batches = self._seek(loader)
        restore_random_state(now)
        return batches

    def _seek(self, loader: Loader) -> Iterator[Batch]:
        order, batch_size = _order(loader)
        if isinstance(order, SeekableSampler) and batch_size is not None:
            if batch_size != order.batch_size:
                raise ValueError(
                    f"Engine.fit: the loader's batch_size is {batch_size}, its sampler's {order.batch_size}; "
                    "give both the same, or the middle of an epoch cannot be found again"
                )
            order.set_epoch(self.epoch, self.batch)
            return iter(loader)
        if isinstance(order, EpochSampler):
            order.set_epoch(self.epoch)
        batches = iter(loader)
        next(itertools.islice(batches, self.batch, self.batch), None)
        return batches

    def advance(self, num_batches: int) -> None:
        """Go one optimizer step further, for which so many batches were taken."""
        self.step, self.batch = self.step + 1, self.batch + num_batches

    def end_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch, self.batch = self.epoch + 1, 0

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs; the random states are those of this rank."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "epoch_random": self._epoch_random,
            "random": random_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was called, the global random generators included."""
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self._epoch_random = state["epoch_random"]
        restore_random_state(state["random"])


def _order(loader: Loader) -> tuple[object, int | None]:
    """Return what decides on the order of ``loader``, and how much of it is a batch; None where nobody knows."""
    if isinstance(loader, EpochSampler):
        return loader, loader.batch_size if isinstance(loader, SeekableSampler) else None
    if not isinstance(loader, DataLoader):
        return loader.sampler if isinstance(loader, _Sampled) else None, None
    batches = loader.batch_sampler
    if batches is None:
        return loader.sampler, 1  # what the sampler yields is a batch
    if type(batches) is BatchSampler:
        return batches.sampler, batches.batch_size
    if isinstance(batches, EpochSampler):
        return batches, batches.batch_size if isinstance(batches, SeekableSampler) else None
    return batches.sampler if isinstance(batches, _Sampled) else None, None


def _length(loader: Loader, comm: Communicator) -> int:
    try:
        return len(loader)
    except TypeError as error:
        raise TypeError(
            f"{comm.who('Engine.fit')}: the training loader has no length ({error}); all ranks have to know how many "
            "batches an epoch has: give a DataLoader or a list, or define __len__"
        ) from error
