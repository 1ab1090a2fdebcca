"""Runs a schedule on a virtual clock, under a model of the network.

All ranks run in the order of time, as in execution.py: a transfer begins when both of its ends are posted, takes what
network.py says, and a step ends with the last of its transfers; a reduction takes gamma per byte more. So the clock
shows what the closed formulas show where these exist, and goes on where they end: shared links, slow ranks, other
numbers of ranks.

Where no two messages can share a link and every rank sends one message and receives one in each step, as in a ring on
a flat network, all ranks are one array, the schedule is asked once for all of them (its arithmetic is that of numbers
as of arrays), and thousands of ranks take seconds. The times are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minidist.analysis.execution import MAX_STEPS, Rank, World
from minidist.analysis.network import Link, Network, Route, Seconds
from minidist.errors import ScheduleError
from minidist.schedule import CUT, ROOTED, Reduce, Schedule, Send, Step, Transfer, indices

MAX_WORLD_SIZE = 65_536


class Message(NamedTuple):
    """One transfer on the clock.

    Attributes:
        src, dst: its ranks.
        src_step, dst_step: the steps of theirs in which it travels.
        sent, received: the chunks on both sides.
        reduces: whether it is combined with what is there.
        nbytes: its size.
        begins, ends: seconds; a reduction is not in them.
    """

    src: int
    dst: int
    src_step: int
    dst_step: int
    sent: Sequence[int]
    received: Sequence[int]
    reduces: bool
    nbytes: float
    begins: float
    ends: float


@dataclass(frozen=True)
class Timeline:
    """What happened when.

    Attributes:
        ends: seconds after the start at which each rank has finished.
        num_messages: how many were sent.
        messages: all of them, in the order in which they began; empty unless they were recorded.
    """

    ends: Sequence[float]
    num_messages: int
    messages: list[Message] = field(default_factory=list, repr=False)

    @property
    def seconds(self) -> float:
        """When the last rank has finished."""
        return max(self.ends)


def simulate(
    schedule: Schedule,
    world_size: int,
    nbytes: float,
    network: Network,
    collective: str = "all_reduce",
    root: int = 0,
    record: bool = False,
) -> Timeline:
    """Run ``schedule`` on ``world_size`` ranks that start together, and return when everything happened.

    Args:
        schedule: see `minidist.schedule`.
        world_size: 1 to MAX_WORLD_SIZE.
        nbytes: of the larger tensor of the collective, whose chunks are equal parts; a barrier has none.
        network: what a message takes.
        collective: one of COLLECTIVES.
        root: of a rooted collective.
        record: whether to keep every message.

    Raises:
        ScheduleError: the schedule cannot be run; `minidist.analysis.prove` says whether it is right.
        ValueError: an argument is out of range.
    """
    if not nbytes >= 0:
        raise ValueError(f"nbytes must be 0 or more, got {nbytes}")
    simulation = _Simulation(schedule, collective, world_size, root, nbytes, network, record)
    if not record and collective not in ROOTED and (ends := simulation.all_at_once(schedule)) is not None:
        return Timeline(ends, simulation.num_messages)
    simulation.run(network.start)
    return Timeline([rank.ends for rank in simulation.ranks], simulation.num_messages, simulation.messages)


class _Simulation(World):
    """All ranks on one clock."""

    def __init__(
        self,
        schedule: Schedule,
        collective: str,
        world_size: int,
        root: int,
        nbytes: float,
        network: Network,
        record: bool,
    ) -> None:
        super().__init__(schedule, collective, world_size, root, MAX_WORLD_SIZE)
        parts = world_size if collective == "all_to_all" else self.num_chunks
        self._chunk_bytes = 1.0 if collective == "barrier" else nbytes / parts
        self._network, self._record = network, record
        self._free: dict[Any, float] = {}  # by link: when it has served all that came to it
        self._routes: dict[tuple[int, int, float, bool], Route] = {}
        self.messages: list[Message] = []
        self.num_messages = 0

    def posted(self, rank: Rank, send: Send) -> None:
        return

    def step_ended(self, rank: Rank) -> None:
        return

    def met(self, sender: Rank, send: Send, message: Any, receiver: Rank, receive: Transfer, time: float) -> None:
        chunks = indices(send.chunk)
        nbytes, pair = self._chunk_bytes * len(chunks), (sender.rank, receiver.rank)
        key = (*pair, nbytes, isinstance(receive, Reduce))
        if key not in self._routes:
            self._routes[key] = self._network.route(*key)
        alpha, links = self._routes[key]
        ends = self._served(links, nbytes, time) + alpha
        sender.ends = max(sender.ends, ends)
        self.num_messages += 1
        if self._record:
            steps, reduces = (sender.step, receiver.step), isinstance(receive, Reduce)
            places = (chunks, indices(receive.chunk))
            self.messages.append(Message(*pair, *steps, *places, reduces, nbytes, time, ends))
        if isinstance(receive, Reduce):
            ends = self._served(self._network.reduction(receiver.rank, nbytes), nbytes, ends)
        receiver.ends = max(receiver.ends, ends)

    def _served(self, links: Sequence[Link], nbytes: float, time: float) -> float:
        """Return when the slowest of the links has served so many bytes, which come to it at ``time``."""
        served = time
        for name, beta in links:
            self._free[name] = free = max(time, self._free.get(name, 0.0)) + beta * nbytes
            served = max(served, free)
        return served

    def all_at_once(self, schedule: Schedule) -> list[float] | None:
        """Run all ranks as one array; None if the schedule or the network is not of that kind."""
        everyone = np.arange(self.world_size)
        if self._network.alone(everyone, everyone) is None:
            return None
        gammas, now = self._network.gammas(self.world_size), np.full(self.world_size, self._network.start)
        try:
            for number, step in enumerate(self._exchanges(schedule, everyone)):
                if number >= MAX_STEPS:
                    raise ScheduleError(f"it takes more than {MAX_STEPS} steps; does it end?")
                now = self._exchange(step, everyone, now, gammas)
        except ScheduleError:
            raise
        except (TypeError, ValueError, AttributeError, IndexError, _Uneven):
            self.num_messages = 0
            return None  # it asks something of a rank, or ranks do different things: one by one
        return list(now.tolist())

    def _exchanges(self, schedule: Schedule, everyone: Any) -> Iterator[Step]:
        for step in schedule(everyone, self.world_size):
            kinds = [isinstance(move, Send) for move in step]
            if sorted(kinds) != [False, True]:
                raise _Uneven
            yield step

    def _exchange(self, step: Step, everyone: Any, now: Seconds, gammas: Seconds) -> Seconds:
        """Return when each rank ends a step in which it sends one message and receives one."""
        send, receive = sorted(step, key=lambda move: not isinstance(move, Send))
        dst, src = np.asarray(send.peer), np.asarray(receive.peer)
        chunks = len(indices(send.chunk))
        if chunks != len(indices(receive.chunk)) or not np.array_equal(src[dst], everyone) or np.any(dst == everyone):
            raise _Uneven
        sent, received = (np.array([everyone * 0 + chunk for chunk in indices(move.chunk)]) for move in (send, receive))
        if not chunks or min(sent.min(), received.min()) < 0 or max(sent.max(), received.max()) >= self.num_chunks:
            raise _Uneven  # one by one, it is said what is wrong
        if self.collective in CUT and not np.array_equal(sent[:, src], received):
            raise _Uneven
        alone = self._network.alone(everyone, dst)
        assert alone is not None
        nbytes = self._chunk_bytes * chunks
        arrives = np.maximum(now, now[dst]) + alone[0] + alone[1] * nbytes
        self.num_messages += self.world_size
        reduced = gammas * nbytes if isinstance(receive, Reduce) else 0.0
        ends: Seconds = np.maximum(arrives, arrives[src] + reduced)
        return ends


class _Uneven(Exception):
    """Ranks do different things."""
