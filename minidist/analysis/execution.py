"""All ranks of a schedule at once, in one process: who posts what, what meets, and who waits for whom.

The transfers of a step are posted together, and a rank goes on when all of them are finished. A transfer begins when
both of its ends are posted, which is the least that any transport guarantees: what ends here needs no buffers.
Messages between two ranks match in the order in which they were posted.

What a transfer means is for a subclass to say: contributions in prove.py, time in simulate.py.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from minidist.errors import ScheduleError
from minidist.schedule import (
    COLLECTIVES,
    CUT,
    ROOTED,
    Recv,
    Reduce,
    Schedule,
    Send,
    Step,
    Transfer,
    chunks_of,
    default_chunks,
    indices,
)

MAX_STEPS = 100_000


@dataclass(slots=True)
class Rank:
    """One rank in the middle of its schedule.

    Attributes:
        rank: its number.
        steps: what is left of its schedule.
        step: the number of its present step.
        ends: when the present step ends, as far as is known.
        open: the transfers of the present step that have not begun.
        num_sent: how many messages it has sent.
        finished: whether its schedule has ended.
    """

    rank: int
    steps: Iterator[Step]
    step: int = -1
    ends: float = 0.0
    open: list[Transfer] = field(default_factory=list)
    num_sent: int = 0
    finished: bool = False

    @property
    def where(self) -> str:
        return f"rank {self.rank}, step {self.step}"


class World(ABC):
    """All ranks; they run in the order of time.

    Args:
        schedule: what they run.
        collective: one of COLLECTIVES.
        world_size: how many there are.
        root: of a rooted collective.
        max_world_size: the largest world size.

    Raises:
        ValueError: there is no such collective, or the world size or the root is out of range.
    """

    def __init__(self, schedule: Schedule, collective: str, world_size: int, root: int, max_world_size: int) -> None:
        if collective not in COLLECTIVES:
            raise ValueError(f"collective must be one of {', '.join(COLLECTIVES)}, got {collective!r}")
        if not 1 <= world_size <= max_world_size:
            raise ValueError(f"world_size must be 1 to {max_world_size}, got {world_size}")
        if not 0 <= root < world_size:
            raise ValueError(f"root must be a rank from 0 to {world_size - 1}, got {root}")
        self.collective, self.world_size, self.root = collective, world_size, root
        self.num_chunks = _checked_chunks(schedule, collective, world_size)
        self._arguments = (world_size, root) if collective in ROOTED else (world_size,)
        self._schedule = schedule
        self.ranks: list[Rank] = []
        self._sends: dict[tuple[int, int], deque[tuple[Send, Any]]] = defaultdict(deque)
        self._receives: dict[tuple[int, int], deque[Transfer]] = defaultdict(deque)

    @abstractmethod
    def posted(self, rank: Rank, send: Send) -> Any:
        """Return what is sent; the chunks may change as soon as the step is over."""

    @abstractmethod
    def met(self, sender: Rank, send: Send, message: Any, receiver: Rank, receive: Transfer, time: float) -> None:
        """Begin a transfer, and put off the ends of both steps to its end."""

    @abstractmethod
    def step_ended(self, rank: Rank) -> None:
        """Take what the step has brought."""

    def run(self, start: float = 0.0) -> None:
        """Run every rank from the time ``start`` to the end of its schedule.

        Raises:
            ScheduleError: a step is impossible, or ranks wait for each other for ever.
        """
        self.ranks = [Rank(rank, self._schedule(rank, *self._arguments)) for rank in range(self.world_size)]
        self._ready = [(start, rank) for rank in range(self.world_size)]
        while self._ready:
            time, number = heapq.heappop(self._ready)
            rank = self.ranks[number]
            self.step_ended(rank)
            self._post(rank, time)
        stuck = next((rank for rank in self.ranks if rank.open), None)
        if stuck is not None:
            raise ScheduleError(self._why_stuck(stuck))

    def _post(self, rank: Rank, time: float) -> None:
        step = next(rank.steps, None)
        rank.ends = time
        if step is None:
            rank.finished = True
            return
        rank.step += 1
        self._check(rank, step)
        rank.open = list(step)
        if not step:
            heapq.heappush(self._ready, (time, rank.rank))
        for transfer in step:
            if isinstance(transfer, Send):
                rank.num_sent += 1
                self._sends[rank.rank, transfer.peer].append((transfer, self.posted(rank, transfer)))
            else:
                self._receives[transfer.peer, rank.rank].append(transfer)
        for transfer in step:
            peer = self.ranks[transfer.peer]
            self._match(*((rank, peer) if isinstance(transfer, Send) else (peer, rank)), time)

    def _match(self, sender: Rank, receiver: Rank, time: float) -> None:
        sends, receives = self._sends[sender.rank, receiver.rank], self._receives[sender.rank, receiver.rank]
        while sends and receives:
            (send, message), receive = sends.popleft(), receives.popleft()
            self._check_sizes(sender, send, receiver, receive)
            self.met(sender, send, message, receiver, receive, time)
            for rank, transfer in ((sender, send), (receiver, receive)):
                rank.open.remove(transfer)
                if not rank.open:
                    heapq.heappush(self._ready, (rank.ends, rank.rank))

    def _check(self, rank: Rank, step: Step) -> None:
        if rank.step >= MAX_STEPS:
            raise ScheduleError(f"rank {rank.rank}: it takes more than {MAX_STEPS} steps; does it end?")
        if not isinstance(step, tuple) or not all(isinstance(move, Transfer) for move in step):
            raise ScheduleError(f"{rank.where}: a step is a tuple of Send, Recv and Reduce, got {step!r}")
        for transfer in step:
            self._check_transfer(rank, transfer)
        arrivals = [move for move in step if not isinstance(move, Send)]
        if len(arrivals) > 1:
            self._check_together(rank, arrivals)
        for receive in arrivals:
            if isinstance(receive, Recv):
                for send in step:
                    if isinstance(send, Send) and not set(indices(receive.chunk)).isdisjoint(indices(send.chunk)):
                        raise ScheduleError(f"{rank.where}: {spell(send)} while {spell(receive)}")

    def _check_transfer(self, rank: Rank, transfer: Transfer) -> None:
        if not isinstance(transfer.peer, int):
            raise ScheduleError(f"{rank.where}: a rank is a whole number, got {transfer.peer!r}")
        if not 0 <= transfer.peer < self.world_size or transfer.peer == rank.rank:
            others = f"the other ranks are those of 0 to {self.world_size - 1}"
            raise ScheduleError(f"{rank.where}: {spell(transfer)}, but {others}")
        chunks = indices(transfer.chunk)
        if not chunks:
            raise ScheduleError(f"{rank.where}: a transfer with rank {transfer.peer} names no chunk")
        if any(not isinstance(chunk, int) or not 0 <= chunk < self.num_chunks for chunk in chunks):
            raise ScheduleError(f"{rank.where}: {spell(transfer)}, but the chunks are 0 to {self.num_chunks - 1}")
        if len(chunks) > 1 and len(set(chunks)) < len(chunks):
            raise ScheduleError(f"{rank.where}: {spell(transfer)}, one of them twice")
        self._check_memory(rank, transfer)

    def _check_memory(self, rank: Rank, transfer: Transfer) -> None:
        """Refuse chunks that are not there, and to overwrite what is the caller's input."""
        chunks, is_root, collective = indices(transfer.chunk), rank.rank == self.root, self.collective
        if collective in ("gather", "scatter") and not is_root and set(chunks) != {rank.rank}:
            what = f"{rank.where}: {spell(transfer)}"
            raise ScheduleError(f"{what}, but of the chunks of a {collective} it has only its own")
        is_input = (
            (collective == "scatter" and is_root)
            or (collective == "gather" and not is_root)
            or (collective == "all_to_all" and min(chunks) < self.world_size)
        )
        if is_input and not isinstance(transfer, Send):
            what = f"{rank.where}: {spell(transfer)}"
            raise ScheduleError(f"{what}, but that is the input of the {collective}, which stays as it is")

    def _check_together(self, rank: Rank, arrivals: Sequence[Transfer]) -> None:
        """Refuse what one step brings into one chunk in an order that is not settled."""
        written: dict[int, int] = {}
        for number, transfer in enumerate(arrivals):
            for chunk in indices(transfer.chunk):
                first = written.setdefault(chunk, number)
                if first == number:
                    continue
                before = arrivals[first]
                both = f"{rank.where}: {spell(transfer)} and {spell(before)} in one step"
                if isinstance(transfer, Recv) or isinstance(before, Recv):
                    raise ScheduleError(f"{both}, in an order that nobody knows")
                if tuple(indices(transfer.chunk)) != tuple(indices(before.chunk)):
                    raise ScheduleError(f"{both}; what is reduced together has to be the same chunks")

    def _check_sizes(self, sender: Rank, send: Send, receiver: Rank, receive: Transfer) -> None:
        sent, received = indices(send.chunk), indices(receive.chunk)
        equal = self.collective not in CUT  # the chunks of a cut tensor may differ by one element
        if len(sent) != len(received) or (not equal and tuple(sent) != tuple(received)):
            raise ScheduleError(
                f"{sender.where}: {spell(send)}, where rank {receiver.rank} in step {receiver.step} expects "
                f"{_name(receive)}; their sizes can differ"
            )

    def _why_stuck(self, first: Rank) -> str:
        """Follow who waits for whom, to a rank that has finished or back to one that was there before."""
        path = [first]
        while True:
            transfer = path[-1].open[0]
            peer = self.ranks[transfer.peer]
            if peer.finished:
                return f"{path[-1].where}: {spell(transfer)}, but rank {peer.rank} has finished and never does its part"
            if peer in path:
                cycle = path[path.index(peer) :]
                waits = (f"rank {rank.rank} in step {rank.step} ({spell(rank.open[0])})" for rank in cycle)
                return f"deadlock: {' waits for '.join(waits)} waits for rank {peer.rank}"
            path.append(peer)


def _checked_chunks(schedule: Schedule, collective: str, world_size: int) -> int:
    count = chunks_of(schedule, collective, world_size)
    least = 1 if collective in CUT else default_chunks(collective, world_size)
    if count < least or (count > least and collective not in (*CUT, "all_to_all")):
        bound = "at least " if collective in (*CUT, "all_to_all") else ""
        raise ScheduleError(f"{collective} on {world_size} ranks has {bound}{least} chunks, got num_chunks({count})")
    return count


def spell(transfer: Transfer) -> str:
    """Return what a transfer does, in words."""
    verb, way = {Send: ("sends", "to"), Recv: ("receives", "from"), Reduce: ("reduces", "from")}[type(transfer)]
    return f"it {verb} {_name(transfer)} {way} rank {transfer.peer}"


def _name(transfer: Transfer) -> str:
    chunks = indices(transfer.chunk)
    if len(chunks) == 1:
        return f"chunk {chunks[0]}"
    if isinstance(chunks, range) and chunks.step == 1 and chunks:
        return f"chunks {chunks[0]} to {chunks[-1]}"
    return f"chunks {', '.join(map(str, chunks))}"
