"""Proves a schedule for a world size: all ranks run it symbolically, and every chunk has to end with the right value.

The value of a chunk is the multiset of the contributions in it: ``(rank, chunk)`` stands for what that rank had in that
chunk at the start. A `Recv` replaces the multiset, a `Reduce` adds to it. So a sum is right exactly if every
contribution is in it once, whatever the numbers are::

    rank 0, chunk 1    {(0, 1)}  --Reduce from rank 3-->  {(0, 1), (3, 1)}  --...-->  {(0, 1), (1, 1), (2, 1), (3, 1)}

The transfers of a step are posted together, and a rank goes on when all of them are finished. A transfer finishes when
both ends are posted, which is the least that any transport guarantees: what is proved here needs no buffers. Messages
between two ranks match in the order in which they were posted.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from minidist.errors import ScheduleError
from minidist.schedule import Recv, RootedSchedule, Schedule, Send, Step, Transfer

MAX_STEPS = 100_000
MAX_WORLD_SIZE = 1024
ROOTED = ("reduce", "broadcast", "gather", "scatter")
COLLECTIVES = ("all_reduce", *ROOTED, "all_gather", "reduce_scatter", "all_to_all", "barrier")
Value = Counter[tuple[int, int]]


@dataclass(frozen=True)
class Counts:
    """What a schedule costs, by rank.

    Attributes:
        steps: how many steps each rank takes.
        messages: how many messages each rank sends.
    """

    steps: tuple[int, ...]
    messages: tuple[int, ...]


def prove(schedule: Schedule | RootedSchedule, collective: str, world_size: int, root: int = 0) -> Counts:
    """Accept a schedule that does what ``collective`` promises on ``world_size`` ranks, and count what it does.

    Args:
        schedule: ``schedule(rank, world_size)``, or with the root for broadcast, reduce, gather and scatter.
        collective: one of COLLECTIVES.
        world_size: 1 to MAX_WORLD_SIZE.
        root: of a rooted collective.

    Raises:
        ScheduleError: it is wrong; one sentence says what, on which rank and in which step.
        ValueError: there is no such collective, or the world size or the root is out of range.
    """
    if collective not in COLLECTIVES:
        raise ValueError(f"collective must be one of {', '.join(COLLECTIVES)}, got {collective!r}")
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise ValueError(f"world_size must be 1 to {MAX_WORLD_SIZE} to be proved, got {world_size}")
    if not 0 <= root < world_size:
        raise ValueError(f"root must be a rank from 0 to {world_size - 1}, got {root}")
    arguments = (world_size, root) if collective in ROOTED else (world_size,)
    ranks = [_Rank(rank, schedule(rank, *arguments)) for rank in range(world_size)]
    meaning = _Barrier(world_size) if collective == "barrier" else _Values(collective, world_size, root)
    _World(ranks, meaning).run()
    meaning.check()
    return Counts(tuple(rank.step + 1 for rank in ranks), tuple(rank.num_sent for rank in ranks))


# What the chunks hold -----------------------------------------------------------------------------


class _Values:
    """The chunks of all ranks as multisets of contributions."""

    def __init__(self, collective: str, world_size: int, root: int) -> None:
        self._collective, self._n, self._root = collective, world_size, root
        self.num_chunks = {"reduce": 1, "broadcast": 1, "all_to_all": 2 * world_size}.get(collective, world_size)
        self.equal = collective != "all_reduce"  # the chunks of an all-reduce may differ by one element
        self._held: dict[tuple[int, int], Value] = {}
        for rank in range(world_size):
            for chunk in range(self.num_chunks):
                if (value := self._start(rank, chunk)) is not None:
                    self._held[rank, chunk] = value
        self._sent: set[tuple[int, int]] = set()
        self._lost: dict[tuple[int, int], str] = {}

    def _start(self, rank: int, chunk: int) -> Value | None:
        """Return what a chunk holds at the start, if anything."""
        own = Counter({(rank, chunk): 1})
        match self._collective:
            case "broadcast" | "scatter":
                return own if rank == self._root else None
            case "all_gather" | "gather":
                return own if rank == chunk else None
            case "all_to_all" if chunk >= self._n:  # its own part of the output is there
                return Counter({(rank, rank): 1}) if chunk == self._n + rank else None
        return own

    def _end(self, rank: int, chunk: int) -> Value | None:
        """Return what a chunk has to hold at the end; None where it does not matter."""
        match self._collective:
            case "all_reduce":
                return self._everyone(chunk)
            case "reduce":
                return self._everyone(chunk) if rank == self._root else None
            case "reduce_scatter":
                return self._everyone(chunk) if rank == chunk else None
            case "broadcast":
                return Counter({(self._root, chunk): 1})
            case "all_gather":
                return Counter({(chunk, chunk): 1})
            case "gather":
                return Counter({(chunk, chunk): 1}) if rank == self._root else None
            case "scatter":
                return Counter({(self._root, chunk): 1}) if rank == chunk else None
        return Counter({(chunk - self._n, rank): 1}) if chunk >= self._n else None

    def _everyone(self, chunk: int) -> Value:
        return Counter({(rank, chunk): 1 for rank in range(self._n)})

    def send(self, rank: _Rank, transfer: Send) -> Value:
        """Return what is sent; the chunk may change as soon as the step is over."""
        if (rank.rank, transfer.chunk) not in self._held:
            raise ScheduleError(f"{rank.where}: it sends chunk {transfer.chunk}, in which there is nothing yet")
        self._sent.add((rank.rank, transfer.chunk))
        return self._held[rank.rank, transfer.chunk]

    def receive(self, rank: _Rank, transfer: Transfer, value: Value) -> None:
        """Overwrite a chunk, or add to it."""
        place = rank.rank, transfer.chunk
        if isinstance(transfer, Recv):
            if place in self._held and place not in self._sent:
                self._lost.setdefault(place, f"{rank.where} overwrote it before it was sent")
            self._held[place] = value
        elif place in self._held:
            self._held[place] = self._held[place] + value
        else:
            raise ScheduleError(f"{rank.where}: it reduces into chunk {transfer.chunk}, in which there is nothing yet")

    def check(self) -> None:
        """Compare what the chunks hold with what they should."""
        for rank in range(self._n):
            for chunk in range(self.num_chunks):
                wanted = self._end(rank, chunk)
                if wanted is not None and self._held.get((rank, chunk)) != wanted:
                    raise ScheduleError(f"rank {rank}, chunk {chunk}: {self._difference(rank, chunk, wanted)}")

    def _difference(self, rank: int, chunk: int, wanted: Value) -> str:
        held = self._held.get((rank, chunk), Counter())
        for (source, origin), count in sorted(held.items()):
            if (source, origin) not in wanted:
                return f"it ends with chunk {origin} of rank {source}, which does not belong there"
            if count > 1:
                return f"the contribution of rank {source} is in it {count} times"
        source, origin = min(wanted - held)
        reason = self._lost.get((source, origin))
        return f"the contribution of rank {source} is missing" + (f"; {reason}" if reason else "")


class _Barrier:
    """Who has heard of whom."""

    num_chunks, equal = 2, True

    def __init__(self, world_size: int) -> None:
        self._heard = [{rank} for rank in range(world_size)]

    def send(self, rank: _Rank, transfer: Send) -> Value:
        return Counter(dict.fromkeys(((other, 0) for other in self._heard[rank.rank]), 1))

    def receive(self, rank: _Rank, transfer: Transfer, value: Value) -> None:
        self._heard[rank.rank] |= {other for other, _ in value}

    def check(self) -> None:
        for rank, heard in enumerate(self._heard):
            if missing := set(range(len(self._heard))) - heard:
                raise ScheduleError(f"rank {rank}: it leaves the barrier and rank {min(missing)} may not have come")


# How the ranks get on -----------------------------------------------------------------------------


@dataclass
class _Rank:
    """One rank in the middle of its schedule."""

    rank: int
    steps: Iterator[Step]
    step: int = -1
    num_sent: int = 0
    finished: bool = False
    open: list[Transfer] = field(default_factory=list)  # posted, and not finished
    arrived: list[tuple[Transfer, Value]] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"rank {self.rank}, step {self.step}"


class _World:
    """All ranks; a transfer finishes when its two ends are posted."""

    def __init__(self, ranks: list[_Rank], meaning: _Values | _Barrier) -> None:
        self._ranks, self._meaning = ranks, meaning
        self._sends: dict[tuple[int, int], deque[tuple[Send, Value]]] = defaultdict(deque)
        self._receives: dict[tuple[int, int], deque[Transfer]] = defaultdict(deque)

    def run(self) -> None:
        """Let every rank go as far as it can."""
        ready = deque(self._ranks)
        while ready:
            rank = ready.popleft()
            while not rank.open and not rank.finished:
                self._finish_step(rank)
                self._post(rank)
                for transfer in tuple(rank.open):
                    peer = self._ranks[transfer.peer]
                    self._match(*((rank, peer) if isinstance(transfer, Send) else (peer, rank)))
                    if not peer.open:
                        ready.append(peer)
        stuck = next((rank for rank in self._ranks if rank.open), None)
        if stuck is not None:
            raise ScheduleError(self._why_stuck(stuck))

    def _post(self, rank: _Rank) -> None:
        step = next(rank.steps, None)
        if step is None:
            rank.finished = True
            return
        rank.step += 1
        self._check(rank, step)
        for transfer in step:
            rank.open.append(transfer)
            if isinstance(transfer, Send):
                rank.num_sent += 1
                self._sends[rank.rank, transfer.peer].append((transfer, self._meaning.send(rank, transfer)))
            else:
                self._receives[transfer.peer, rank.rank].append(transfer)

    def _check(self, rank: _Rank, step: Step) -> None:
        if rank.step >= MAX_STEPS:
            raise ScheduleError(f"rank {rank.rank}: it takes more than {MAX_STEPS} steps; does it end?")
        written: dict[int, Transfer] = {}
        for transfer in step:
            what = f"{rank.where}: {_spell(transfer)}"
            if not 0 <= transfer.peer < len(self._ranks) or transfer.peer == rank.rank:
                raise ScheduleError(f"{what}, but the other ranks are those of 0 to {len(self._ranks) - 1}")
            if not 0 <= transfer.chunk < self._meaning.num_chunks:
                raise ScheduleError(f"{what}, but the chunks are 0 to {self._meaning.num_chunks - 1}")
            if not isinstance(transfer, Send):
                before = written.setdefault(transfer.chunk, transfer)
                if before is not transfer and (isinstance(transfer, Recv) or isinstance(before, Recv)):
                    raise ScheduleError(f"{what} and {_spell(before)} in one step, in an order that nobody knows")
        for transfer in step:
            if isinstance(transfer, Send) and transfer.chunk in written:
                raise ScheduleError(f"{rank.where}: {_spell(transfer)} while {_spell(written[transfer.chunk])}")

    def _match(self, sender: _Rank, receiver: _Rank) -> None:
        sends, receives = self._sends[sender.rank, receiver.rank], self._receives[sender.rank, receiver.rank]
        while sends and receives:
            (send, value), receive = sends.popleft(), receives.popleft()
            if send.chunk != receive.chunk and not self._meaning.equal:
                raise ScheduleError(
                    f"{sender.where}: {_spell(send)}, where rank {receiver.rank} in step {receiver.step} expects chunk "
                    f"{receive.chunk}; their sizes can differ"
                )
            receiver.arrived.append((receive, value))
            sender.open.remove(send)
            receiver.open.remove(receive)

    def _finish_step(self, rank: _Rank) -> None:
        for transfer, value in rank.arrived:
            self._meaning.receive(rank, transfer, value)
        rank.arrived = []

    def _why_stuck(self, first: _Rank) -> str:
        """Follow who waits for whom, to a rank that has finished or back to one that was there before."""
        path = [first]
        while True:
            transfer = path[-1].open[0]
            peer = self._ranks[transfer.peer]
            if peer.finished:
                return (
                    f"{path[-1].where}: {_spell(transfer)}, but rank {peer.rank} has finished and never does its part"
                )
            if peer in path:
                cycle = path[path.index(peer) :]
                waits = (f"rank {rank.rank} in step {rank.step} ({_spell(rank.open[0])})" for rank in cycle)
                return f"deadlock: {' waits for '.join(waits)} waits for rank {peer.rank}"
            path.append(peer)


def _spell(transfer: Transfer) -> str:
    if isinstance(transfer, Send):
        return f"it sends chunk {transfer.chunk} to rank {transfer.peer}"
    verb = "receives" if isinstance(transfer, Recv) else "reduces"
    return f"it {verb} chunk {transfer.chunk} from rank {transfer.peer}"
