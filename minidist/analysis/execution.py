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

from minidist.analysis.rules import Rules, counted_chunks, spell, spell_chunks
from minidist.collective import Run
from minidist.errors import ScheduleError
from minidist.schedule import Schedule, Send, Step, Transfer, indices

MAX_STEPS = 100_000


@dataclass(slots=True)
class RankState:
    """One rank in the middle of its schedule.

    Attributes:
        rank: its number.
        steps: what is left of its schedule.
        step: the number of its present step; -1 before the first.
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


def ensure_size(run: Run, max_world_size: int) -> None:
    """Refuse a world that is too large, and a root that is not in it."""
    if not 1 <= run.world_size <= max_world_size:
        raise ValueError(f"world_size must be 1 to {max_world_size}, got {run.world_size}")
    if not 0 <= run.root < run.world_size:
        raise ValueError(f"root must be a rank from 0 to {run.world_size - 1}, got {run.root}")


class Execution(ABC):
    """All ranks; they run in the order of time.

    Args:
        schedule: what they run.
        run: the collective, and on how many ranks.
        max_world_size: the largest world size.

    Attributes:
        run: see above.
        num_chunks: into how many chunks the schedule cuts the memory of the collective.
        ranks: how far each one is.

    Raises:
        ValueError: the world size or the root is out of range.
        ScheduleError: the collective cannot be cut into so many chunks.
    """

    def __init__(self, schedule: Schedule, run: Run, max_world_size: int) -> None:
        ensure_size(run, max_world_size)
        self.run = run
        self.num_chunks = counted_chunks(schedule, run)
        self.ranks: list[RankState] = []
        self._schedule = schedule
        self._rules = Rules(run, self.num_chunks)
        # By (src, dst), what was posted and has not met its other end: transports match messages in this order.
        self._sends: dict[tuple[int, int], deque[tuple[Send, Any]]] = defaultdict(deque)
        self._receives: dict[tuple[int, int], deque[Transfer]] = defaultdict(deque)

    @abstractmethod
    def posted(self, rank: RankState, send: Send) -> Any:
        """Return what is sent; the chunks may change as soon as the step is over."""

    @abstractmethod
    def met(
        self, sender: RankState, send: Send, message: Any, receiver: RankState, receive: Transfer, time: float
    ) -> None:
        """Begin a transfer, and put off the ends of both steps to its end."""

    @abstractmethod
    def step_ended(self, rank: RankState) -> None:
        """Take what the step has brought."""

    def execute(self, starts: Sequence[float] | None = None) -> None:
        """Run every rank from its start, which is 0 unless it is given, to the end of its schedule.

        Raises:
            ScheduleError: a step is impossible, or ranks wait for each other for ever.
        """
        world_size = self.run.world_size
        arguments = self.run.arguments
        self.ranks = [RankState(rank, self._schedule(rank, *arguments)) for rank in range(world_size)]
        # A heap by time: of ranks whose step has ended the earliest goes on, so that nobody posts in another's past.
        self._ready = [(start, rank) for rank, start in enumerate(starts or [0.0] * world_size)]
        heapq.heapify(self._ready)
        while self._ready:
            time, number = heapq.heappop(self._ready)
            rank = self.ranks[number]
            self.step_ended(rank)
            self._post(rank, time)
        # Whoever has not finished waits for the other end of a transfer, and nobody is left who goes on to post it.
        stuck = next((rank for rank in self.ranks if rank.open), None)
        if stuck is not None:
            raise ScheduleError(self._why_stuck(stuck))

    def _post(self, rank: RankState, time: float) -> None:
        step = next(rank.steps, None)
        rank.ends = time
        if step is None:
            rank.finished = True
            return
        rank.step += 1
        self._ensure_possible(rank, step)
        rank.open = list(step)
        if not step:  # nothing will meet, which is what ends a step elsewhere
            heapq.heappush(self._ready, (time, rank.rank))
        for transfer in step:
            if isinstance(transfer, Send):
                rank.num_sent += 1
                # Its content is taken now: a step sends what was there before it, and the peer may come much later.
                self._sends[rank.rank, transfer.peer].append((transfer, self.posted(rank, transfer)))
            else:
                self._receives[transfer.peer, rank.rank].append(transfer)
        # Once all of them are posted: which ends first must not depend on the order in which a step names them.
        for transfer in step:
            peer = self.ranks[transfer.peer]
            sender, receiver = (rank, peer) if isinstance(transfer, Send) else (peer, rank)
            self._match(sender, receiver, time)

    def _match(self, sender: RankState, receiver: RankState, time: float) -> None:
        sends = self._sends[sender.rank, receiver.rank]
        receives = self._receives[sender.rank, receiver.rank]
        while sends and receives:
            send, message = sends.popleft()
            receive = receives.popleft()
            self._ensure_same_size(sender, send, receiver, receive)
            self.met(sender, send, message, receiver, receive, time)
            for rank, transfer in ((sender, send), (receiver, receive)):
                # The first that equals it: of two equal transfers with one peer, either stands for the other.
                rank.open.remove(transfer)
                if not rank.open:  # all have begun, so the end of the step is known for good
                    heapq.heappush(self._ready, (rank.ends, rank.rank))

    def _ensure_possible(self, rank: RankState, step: Step) -> None:
        if rank.step >= MAX_STEPS:
            raise ScheduleError(f"rank {rank.rank}: it takes more than {MAX_STEPS} steps; does it end?")
        self._rules.ensure_possible(rank.rank, rank.where, step)

    def _ensure_same_size(self, sender: RankState, send: Send, receiver: RankState, receive: Transfer) -> None:
        """Refuse a message whose ends differ: the chunks of a tensor that is cut may differ by one element."""
        sent = indices(send.chunk)
        received = indices(receive.chunk)
        same = tuple(sent) == tuple(received) if self.run.collective.is_cut else len(sent) == len(received)
        if not same:
            raise ScheduleError(
                f"{sender.where}: {spell(send)}, where rank {receiver.rank} in step {receiver.step} expects "
                f"{spell_chunks(receive)}; their sizes can differ"
            )

    def _why_stuck(self, first: RankState) -> str:
        """Follow who waits for whom, to a rank that has finished or back to one that was there before."""
        # One of both it comes to: whoever has not finished is stuck too, and there are only so many ranks.
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
