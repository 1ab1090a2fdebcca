"""Where training stands, and how to get back there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from minidist.communicator import Communicator
from minidist.training.loaders import (
    Batch,
    Loader,
    Steps,
    batch_size_of,
    batches_from,
    ensure_equal_lengths,
    length_of,
    reshardable_batch_size,
    skip,
)
from minidist.training.seed import RandomState, random_state, restore_random_state


@dataclass
class Position:
    """How far this rank has come.

    Attributes:
        epoch: epochs that are complete.
        batch: batches read from the loader in the epoch after them.
        step: optimizer steps since the start of training.
        skipped: samples of that epoch that all ranks were given when there was another number of them; ``batch`` counts
            from there.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    skipped: int = 0
    _epoch_random: RandomState = field(default_factory=random_state, repr=False)
    _ranks_before: int = 0
    _batch_size: int = 0

    def steps(self, loader: Loader, batches_per_step: int, comm: Communicator) -> Steps:
        """Return the steps of this epoch that are still to come. Collective.

        In the middle of an epoch the loader's iterator is made from the random state of the epoch's start, since
        an order or the seeds of worker processes may be drawn from it; then training's own state is put
        back. A `minidist.training.loaders.SeekableSampler` skips at once, other loaders are read up to the batch.
        Augmentations drawn in worker processes (``num_workers`` above 0) repeat exactly only in the latter case.

        Raises:
            ValueError: on every rank, if the ranks' loaders differ in length, or one of them has no batch.
        """
        who = comm.who("Engine.fit")
        self._cut_anew(loader)
        skip(loader, self.skipped)
        num_batches = length_of(loader, who)
        batches = self._rest_of_epoch(loader)
        # A loader can say that it has batches and give none, such as a generator that was read before. One rank alone
        # would see that, and leave the others in the first step's all-reduce; so all ranks read first, and then tell.
        first = next(batches, None)
        told = comm.all_gather_object((num_batches, first is not None))
        ensure_equal_lengths([length for length, _ in told], self.batch, self.epoch, who, self.skipped > 0)
        silent = [rank for rank, (_, has_first) in enumerate(told) if not has_first]
        if silent and self.batch < num_batches:
            raise ValueError(
                f"{who}: the training loader of rank {silent[0]} gave no batch in epoch {self.epoch}, though its "
                f"length is {num_batches}; give one that can be read again in each epoch, as a DataLoader or a list can"
            )
        rest = batches if first is None else itertools.chain([first], batches)
        return Steps(self.epoch, self.batch, num_batches, batches_per_step, rest, who)

    def _rest_of_epoch(self, loader: Loader) -> Iterator[Batch]:
        if self.batch == 0:
            self._epoch_random = random_state()
            return batches_from(loader, self.epoch, 0)
        # A shuffled DataLoader draws its order when its iterator is made: from the state of the epoch's start it
        # draws the same one again. What dropout and augmentations draw goes on from where they were.
        now = random_state()
        restore_random_state(self._epoch_random)
        batches = batches_from(loader, self.epoch, self.batch)
        restore_random_state(now)
        return batches

    def _cut_anew(self, loader: Loader) -> None:
        """Share out what is left of the epoch among another number of ranks than have begun it."""
        if self._ranks_before and self.batch:
            # The batch size of before: it is natural to keep that of all ranks, and change each one's.
            self.skipped += self._ranks_before * self.batch * (self._batch_size or reshardable_batch_size(loader))
            self.batch = 0
        self._ranks_before = 0
        self._batch_size = batch_size_of(loader)

    def advance(self, num_batches: int) -> None:
        """Go one optimizer step further, for which so many batches were read."""
        self.step += 1
        self.batch += num_batches

    def end_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch += 1
        self.batch = self.skipped = 0

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs; the random states are those of this rank."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "skipped": self.skipped,
            "batch_size": self._batch_size,
            "epoch_random": self._epoch_random,
            "random": random_state(),
        }

    def restore(self, state: dict[str, Any], ranks_before: int = 0, with_random: bool = True) -> None:
        """Go to where `state` was called, the global random generators included.

        Args:
            state: what `state` returned.
            ranks_before: how many ranks there were, if that was another number: the rest of the epoch is cut anew.
            with_random: False for a rank that there was not: its random numbers go on as they are.
        """
        self.epoch = state["epoch"]
        self.batch = state["batch"]
        self.step = state["step"]
        self.skipped = state.get("skipped", 0)
        self._batch_size = state.get("batch_size", 0)
        self._ranks_before = ranks_before
        if with_random:
            self._epoch_random = state["epoch_random"]
            restore_random_state(state["random"])
