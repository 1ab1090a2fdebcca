"""Proves a schedule for a world size: all ranks run it symbolically, and every chunk has to end with the right value.

The value of a chunk is the multiset of the contributions in it: ``(rank, chunk)`` stands for what that rank had in that
chunk at the start. A `Recv` replaces the multiset, a `Reduce` adds to it. So a sum is right exactly if every
contribution is in it once, whatever the numbers are::

    rank 0, chunk 1    {(0, 1)}  --Reduce from rank 3-->  {(0, 1), (3, 1)}  --...-->  {(0, 1), (1, 1), (2, 1), (3, 1)}

Beside it stands the order in which the contributions were added, as sums of floating-point numbers depend on it:
after an all-reduce it has to be the same on all ranks, so that they hold the same bits. How ranks get on, and what
can keep them from it, is in `minidist.analysis.execution`.
"""

from __future__ import annotations

import functools
import itertools
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minidist.analysis.execution import Execution, RankState
from minidist.collective import EVERYONE, Run
from minidist.errors import ScheduleError
from minidist.schedule import Recv, Schedule, Send, Transfer, indices

MAX_WORLD_SIZE = 1024
_BITS = 64
"""Of a count: how often one rank contributes to a value."""


@dataclass(frozen=True)
class Counts:
    """What a schedule costs, by rank.

    Attributes:
        steps: how many steps each rank takes.
        messages: how many messages each rank sends.
        chunks: how many chunks each rank sends.
        num_chunks: into how many the collective cuts its memory.
    """

    steps: tuple[int, ...]
    messages: tuple[int, ...]
    chunks: tuple[int, ...]
    num_chunks: int


@dataclass(frozen=True, slots=True)
class Value:
    """What a chunk holds.

    Attributes:
        counts: by the chunk that it comes from, how often each rank contributes: 64 bits per rank.
        order: stands for the order in which it was added up.
    """

    counts: Mapping[int, int]
    order: int

    def contributions(self) -> dict[tuple[int, int], int]:
        """Return how often each (rank, chunk) is in it."""
        found = {}
        for chunk, counts in self.counts.items():
            for rank in range((counts.bit_length() + _BITS - 1) // _BITS):
                if count := counts >> (_BITS * rank) & (2**_BITS - 1):
                    found[rank, chunk] = count
        return found


Held = Mapping[tuple[int, int], Value]
"""What each (rank, chunk) holds."""
Observer = Callable[[RankState, Held], None]


def prove(schedule: Schedule, run: Run, observe: Observer = lambda rank, held: None) -> Counts:
    """Accept a schedule that does what its collective promises, and count what it does.

    Args:
        schedule: ``schedule(rank, world_size)``, or with the root for broadcast, reduce, gather and scatter.
        run: the collective and its ranks, 1 to MAX_WORLD_SIZE of them: ``Run("all_reduce", 5)``.
        observe: called with a rank that has ended a step, and with what all chunks hold.

    Raises:
        ScheduleError: it is wrong; one sentence says what, on which rank and in which step.
        ValueError: the world size or the root is out of range.
    """
    proof = (_Values if run.collective.has_tensor else _Barrier)(schedule, run, observe)
    proof.execute()
    proof.ensure_promised()
    return Counts(
        steps=tuple(rank.step + 1 for rank in proof.ranks),
        messages=tuple(rank.num_sent for rank in proof.ranks),
        chunks=tuple(proof.chunks_sent),
        num_chunks=proof.num_chunks,
    )


class _Proof(Execution):
    """What the two kinds of proof share."""

    def __init__(self, schedule: Schedule, run: Run, observe: Observer) -> None:
        super().__init__(schedule, run, MAX_WORLD_SIZE)
        self.chunks_sent = [0] * run.world_size
        self.observe = observe

    def posted(self, rank: RankState, send: Send) -> Any:
        self.chunks_sent[rank.rank] += len(indices(send.chunk))
        return self.sent(rank, send)

    @abstractmethod
    def sent(self, rank: RankState, send: Send) -> Any:
        """Return what is sent."""

    @abstractmethod
    def ensure_promised(self) -> None:
        """Compare what every rank ends with with what it should."""


class _Values(_Proof):
    """The chunks of all ranks as multisets of contributions."""

    def __init__(self, schedule: Schedule, run: Run, observe: Observer) -> None:
        super().__init__(schedule, run, observe)
        # A sum is a number for the pair of what was added, so two are alike exactly if they were added up alike. What
        # is there at the start is a pair of negative numbers, which no sum is.
        self._orders: dict[tuple[int, int], int] = {}
        self._held: dict[tuple[int, int], Value] = {}
        for rank, chunk in self._places():
            if (origin := run.collective.starts(run, rank, chunk)) is not None:
                order = self._in_order(-1 - rank, -1 - origin)
                self._held[rank, chunk] = Value({origin: 1 << (_BITS * rank)}, order)
        # What a step brings waits for its end, as what it sends is what was there before it.
        self._arrived: dict[int, list[tuple[Transfer, list[Value]]]] = {rank: [] for rank in range(run.world_size)}
        # Only to say why something is missing: an overwritten chunk that was never sent is mostly the reason.
        self._sent: set[tuple[int, int]] = set()
        self._lost: dict[tuple[int, int], str] = {}

    def _in_order(self, first: int, second: int) -> int:
        """Return what stands for the sum of two values, the same one for the same two."""
        return self._orders.setdefault((first, second), len(self._orders))

    def sent(self, rank: RankState, send: Send) -> list[Value]:
        values = []
        for chunk in indices(send.chunk):
            if (rank.rank, chunk) not in self._held:
                raise ScheduleError(f"{rank.where}: it sends chunk {chunk}, in which there is nothing yet")
            self._sent.add((rank.rank, chunk))
            values.append(self._held[rank.rank, chunk])
        return values

    def met(
        self, sender: RankState, send: Send, message: Any, receiver: RankState, receive: Transfer, time: float
    ) -> None:
        self._arrived[receiver.rank].append((receive, message))

    def step_ended(self, rank: RankState) -> None:
        """Overwrite chunks, or add to them in the order of the ranks."""
        reduced: dict[int, list[tuple[int, Value]]] = defaultdict(list)  # by chunk: from which rank, and what
        # By rank and not as they came: the order of arrival is up to the network, and sums must not depend on it. The
        # sort is stable, so two messages of one rank stay in the order in which they were posted.
        for transfer, values in sorted(self._arrived[rank.rank], key=lambda arrived: arrived[0].peer):
            for chunk, value in zip(indices(transfer.chunk), values, strict=True):
                if isinstance(transfer, Recv):
                    self._overwrite(rank, (rank.rank, chunk), value)
                else:
                    reduced[chunk].append((transfer.peer, value))
        for chunk, values_by_rank in reduced.items():
            self._reduce(rank, chunk, values_by_rank)
        self._arrived[rank.rank] = []
        if rank.step >= 0:
            self.observe(rank, self._held)

    def _reduce(self, rank: RankState, chunk: int, arrived: list[tuple[int, Value]]) -> None:
        """Add up what came into a chunk and what is there, as the executor does, so that orders are the real ones."""
        place = rank.rank, chunk
        if place not in self._held:
            raise ScheduleError(f"{rank.where}: it reduces into chunk {chunk}, in which there is nothing yet")
        # The own value stands at its own place: ranks that exchange the same values then add them up alike.
        in_order = sorted([*arrived, (rank.rank, self._held[place])], key=lambda one: one[0])
        self._held[place] = functools.reduce(self._sum, (value for _, value in in_order))

    def _sum(self, first: Value, second: Value) -> Value:
        counts = dict(first.counts)
        for chunk, count in second.counts.items():
            counts[chunk] = counts.get(chunk, 0) + count
        return Value(counts, self._in_order(first.order, second.order))

    def _overwrite(self, rank: RankState, place: tuple[int, int], value: Value) -> None:
        # The first loss is told: what is overwritten later may be what the first one had put there.
        if place in self._held and place not in self._sent:
            self._lost.setdefault(place, f"{rank.where} overwrote it before it was sent")
        self._held[place] = value

    def _places(self) -> Iterator[tuple[int, int]]:
        return itertools.product(range(self.run.world_size), range(self.num_chunks))

    def ensure_promised(self) -> None:
        everyone = sum(1 << (_BITS * rank) for rank in range(self.run.world_size))
        first: dict[tuple[int, int], Value] = {}  # of the ranks that end with the same, what the first one holds
        for rank, chunk in self._places():
            if (wanted := self.run.collective.ends(self.run, rank, chunk)) is None:
                continue
            source, origin = wanted
            counts = {origin: everyone if source == EVERYONE else 1 << (_BITS * source)}
            held = self._held.get((rank, chunk), Value({}, 0))
            if held.counts != counts:
                raise ScheduleError(f"rank {rank}, chunk {chunk}: {self._difference(held, Value(counts, 0))}")
            # Only an all-reduce has several ranks end with one sum.
            if held.order != first.setdefault(wanted, held).order:
                raise ScheduleError(
                    f"rank {rank}, chunk {chunk}: it is added up in another order than on rank 0, so "
                    "that their bits can differ"
                )

    def _difference(self, held: Value, wanted: Value) -> str:
        there = held.contributions()
        should = wanted.contributions()
        for (source, origin), count in sorted(there.items()):
            if (source, origin) not in should:
                return f"it ends with chunk {origin} of rank {source}, which does not belong there"
            if count > 1:
                return f"the contribution of rank {source} is in it {count} times"
        # Nothing is there that should not be, so something that should be is not.
        source, origin = min(should.keys() - there.keys())
        reason = self._lost.get((source, origin))
        return f"the contribution of rank {source} is missing" + (f"; {reason}" if reason else "")


class _Barrier(_Proof):
    """Who has heard of whom."""

    def __init__(self, schedule: Schedule, run: Run, observe: Observer) -> None:
        super().__init__(schedule, run, observe)
        self._heard = [{rank} for rank in range(run.world_size)]
        self._arrived: list[set[int]] = [set() for _ in range(run.world_size)]

    def sent(self, rank: RankState, send: Send) -> set[int]:
        # A token tells that its sender has come, and so all of whom the sender had heard before it sent.
        return set(self._heard[rank.rank])

    def met(
        self, sender: RankState, send: Send, message: Any, receiver: RankState, receive: Transfer, time: float
    ) -> None:
        self._arrived[receiver.rank] |= message

    def step_ended(self, rank: RankState) -> None:
        self._heard[rank.rank] |= self._arrived[rank.rank]
        heard = {other: 1 << (_BITS * other) for other in self._heard[rank.rank]}
        if rank.step >= 0:
            # Shown in the chunk that tokens come into, as if each were a contribution.
            self.observe(rank, {(rank.rank, 1): Value({0: sum(heard.values())}, 0)})

    def ensure_promised(self) -> None:
        for rank, heard in enumerate(self._heard):
            if missing := set(range(self.run.world_size)) - heard:
                raise ScheduleError(f"rank {rank}: it leaves the barrier and rank {min(missing)} may not have come")
