"""What training reads batches from: where a loader's order comes from, and that it gives what it says, on all ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from minidist.communicator import Communicator

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
class ReshardableSampler(SeekableSampler, Protocol):
    """One that can leave out samples which all ranks together were given before, and share out the rest."""

    skipped: int


@runtime_checkable
class _Sampled(Protocol):
    """A batch sampler, or what is wrapped around a DataLoader, that says which sampler is beneath."""

    @property
    def sampler(self) -> object: ...


@dataclass
class Steps:
    """The rest of an epoch, as groups of batches; its length is that of the whole epoch.

    The last group of an epoch may be smaller than ``batches_per_step``.

    Attributes:
        epoch: its number.
        first_batch: how many batches of the epoch were trained on before.
        num_batches: what the loader says it has.
        batches_per_step: of a group.
        batches: the rest.
        who: this rank, for errors.

    Raises:
        ValueError: on iteration, where the loader has more or fewer batches than it says.
    """

    epoch: int
    first_batch: int
    num_batches: int
    batches_per_step: int
    batches: Iterator[Batch] = field(repr=False)
    who: str

    @property
    def num_done(self) -> int:
        """The steps before ``first_batch``."""
        return math.ceil(self.first_batch / self.batches_per_step)

    def __len__(self) -> int:
        return math.ceil(self.num_batches / self.batches_per_step)

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        num_read = self.first_batch
        while group := list(itertools.islice(self.batches, self.batches_per_step)):
            num_read += len(group)
            # Before the group is trained on: ranks would communicate in a step that the others do not have.
            if num_read > self.num_batches:
                raise ValueError(f"{self._complaint()} and goes on; its __len__ has to be what it gives")
            yield group
        if num_read < self.num_batches:
            raise ValueError(f"{self._complaint()} and ended after {num_read}; its __len__ has to be what it gives")

    def _complaint(self) -> str:
        return f"{self.who}: the training loader said that epoch {self.epoch} has {self.num_batches} batches"


def batches_from(loader: Loader, epoch: int, first_batch: int) -> Iterator[Batch]:
    """Return the batches of an epoch from ``first_batch`` on.

    A `SeekableSampler` is told where to begin; other loaders are read up to there.

    Raises:
        ValueError: the loader and its sampler differ in their ``batch_size``.
    """
    seekable = _seekable(loader)
    if seekable is not None:
        seekable.set_epoch(epoch, first_batch)
        return iter(loader)
    order, _ = _order(loader)
    if isinstance(order, EpochSampler):
        order.set_epoch(epoch)
    batches = iter(loader)
    for _ in itertools.islice(batches, first_batch):
        continue
    return batches


def skip(loader: Loader, num_samples: int) -> None:
    """Let the next epoch begin behind so many samples, which all ranks together were given before.

    Raises:
        ValueError: there are such samples, and the loader cannot leave them out.
    """
    order = _seekable(loader)
    if isinstance(order, ReshardableSampler):
        order.skipped = num_samples
    elif num_samples:
        _fail_to_reshard()


def batch_size_of(loader: Loader) -> int:
    """Return how many samples a full batch has, if the loader can share out the rest of an epoch anew; otherwise 0."""
    order = _seekable(loader)
    return order.batch_size if isinstance(order, ReshardableSampler) else 0


def reshardable_batch_size(loader: Loader) -> int:
    """Return the same, and raise ValueError, as `skip` does, where that is 0."""
    return batch_size_of(loader) or _fail_to_reshard()


def _fail_to_reshard() -> NoReturn:
    raise ValueError(
        "Engine.fit: training stopped in the middle of an epoch on another number of ranks, and this loader cannot "
        "share out the rest of it anew; use ShardedSampler, or go on from a checkpoint of the end of an epoch"
    )


def _seekable(loader: Loader) -> SeekableSampler | None:
    """Return the sampler that can begin in the middle of an epoch, if the loader has one."""
    order, batch_size = _order(loader)
    if not isinstance(order, SeekableSampler) or batch_size is None:
        return None
    if batch_size != order.batch_size:
        raise ValueError(
            f"Engine.fit: the loader's batch_size is {batch_size}, its sampler's {order.batch_size}; "
            "give both the same, or the middle of an epoch cannot be found again"
        )
    return order


def _order(loader: Loader) -> tuple[object, int | None]:
    """Return what decides on the order of ``loader``, and how much of it is a batch; None where nobody knows."""
    if isinstance(loader, EpochSampler):
        return loader, _own_batch_size(loader)
    if not isinstance(loader, DataLoader):
        return _sampler_beneath(loader), None
    batches = loader.batch_sampler
    if batches is None:
        return loader.sampler, 1  # what the sampler yields is a batch
    # Torch's own, and no class derived from it, is known to cut its sampler's order into batches of this size.
    if type(batches) is BatchSampler:
        return batches.sampler, batches.batch_size
    if isinstance(batches, EpochSampler):
        return batches, _own_batch_size(batches)
    return _sampler_beneath(batches), None


def _own_batch_size(order: object) -> int | None:
    return order.batch_size if isinstance(order, SeekableSampler) else None


def _sampler_beneath(part: object) -> object:
    return part.sampler if isinstance(part, _Sampled) else None


def length_of(loader: Loader, who: str) -> int:
    """Return how many batches an epoch has.

    Raises:
        TypeError: the loader does not know; ``who`` begins the message.
    """
    try:
        return len(loader)
    except TypeError as error:
        raise TypeError(
            f"{who}: the training loader has no length ({error}); all ranks have to know how many "
            "batches an epoch has: give a DataLoader or a list, or define __len__"
        ) from error


def ensure_equal_lengths(lengths: Sequence[int], num_done: int, epoch: int, who: str, may_be_over: bool) -> None:
    """Refuse training loaders that differ between ranks, or end before what was trained on already.

    Args:
        lengths: in batches, of each rank's loader.
        num_done: batches of the epoch that were trained on.
        epoch: its number.
        who: this rank, for errors.
        may_be_over: whether there may be no batch left.

    Raises:
        ValueError: as above, or there is no batch at all.
    """
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{who}: the training loaders of all ranks must have the same number of batches, "
            f"got {lengths}; use ShardedSampler with pad=True, or drop_last=True"
        )
    if lengths[0] == 0 and not may_be_over:
        raise ValueError(
            f"{who}: the training loader has no batch; give more samples, a smaller batch_size, or drop_last=False"
        )
    if lengths[0] < num_done:
        raise ValueError(
            f"{who}: training stopped after batch {num_done} of epoch {epoch}, and now the training loader "
            f"has only {lengths[0]}; go on with the loader of before"
        )


def ensure_eval_batches(eval_loader: Iterable[Any] | None, comm: Communicator) -> None:
    """Raise ValueError, on every rank, unless all ranks have an evaluation, with a batch on one of them. Collective."""
    who = comm.who("Engine.fit")
    lengths = comm.all_gather_object(_eval_length(eval_loader))
    if any((length is None) != (lengths[0] is None) for length in lengths):
        given = ", ".join(f"rank {rank} {'none' if length is None else 'one'}" for rank, length in enumerate(lengths))
        raise ValueError(f"{who}: give all ranks an eval_loader or none of them; got {given}")
    if all(length == 0 for length in lengths):
        raise ValueError(f"{who}: the eval_loader has no batch on any rank; give samples, or None")


def _eval_length(loader: Iterable[Any] | None) -> int | str | None:
    if loader is None:
        return None
    try:
        return len(loader)  # type: ignore[arg-type]  # that is the question
    except TypeError:
        return "unknown"
