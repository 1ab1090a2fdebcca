"""A schedule on shared memory, where nobody sends: who is to receive takes a message out of its sender's memory.

A rank says how far it has come by one count, twice per step: its step is *ready*, so that others may take what it sends
in it, and it is *stored*, so that it has taken what it receives. It waits for another rank's count before it takes
something of it, and before it overwrites what that one may still take::

    ready 0 | wait for a rank's ready, take, ... | stored 0 | ready 1 | ...

What a step sends and also combines into is *staged*: taken out of a copy, the *outbox*. So is what a rank has in memory
that the others cannot see, so that whether it is staged is decided when it runs. An outbox has two halves, for even and
odd steps.

All of this is worked out for all ranks at once: a schedule that is right for messages, which may be on their way while
their sender goes on, could come to a standstill here; such a one is left to messages.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from minidist.collective import Run
from minidist.schedule import Reduce, Schedule, Send, Step, indices

COPY, FIRST, LAST = range(3)
"""How what is taken is stored: in the place of what is there, or combined with it, before or behind it."""
SUMS = -1
"""Instead of a rank: memory of its own, where values of lower ranks are combined before the own one follows."""


class Place(NamedTuple):
    """A chunk that a rank sends in a step; always staged, or only where others cannot see its memory."""

    rank: int
    step: int
    chunk: int
    always_staged: bool


class Wait(NamedTuple):
    """Wait until a rank's count has come so far.

    Attributes:
        peer: the rank.
        goal: its count.
        sent: what it may still take; None if it is the rank's own step that is waited for.
        in_place: what matters is that it takes it from its place; else, that it takes it from the outbox.
    """

    peer: int
    goal: int
    sent: Place | None = None
    in_place: bool = False


class Tell(NamedTuple):
    """Say that this rank has come so ``far``."""

    far: int


class Stage(NamedTuple):
    """Copy what is sent into the outbox, if it has to be taken from there."""

    place: Place


class Take(NamedTuple):
    """Take a chunk.

    Attributes:
        how: COPY, FIRST or LAST.
        source: what another rank sends; None for this rank's sums.
        chunk: where it belongs.
        in_sums: whether it goes into the sums for this chunk instead.
    """

    how: int
    source: Place | None
    chunk: int
    in_sums: bool


Action = Wait | Tell | Stage | Take
Script = Sequence[Action]


class _Message(NamedTuple):
    dst: int
    dst_step: int
    reduces: bool
    sent: Sequence[Place]
    chunks: Sequence[int]

    @property
    def src(self) -> int:
        return self.sent[0].rank

    @property
    def src_step(self) -> int:
        return self.sent[0].step


def scripts(schedule: Schedule, run: Run) -> list[Script] | None:
    """Return what each rank does; None where a schedule has to run over messages."""
    steps = [list(schedule(rank, *run.arguments)) for rank in range(run.world_size)]
    messages = _matched(steps)
    if messages is None:
        return None
    last = max(2 * len(some) for some in steps)
    written = [_Writer(rank, messages).script(len(some), last) for rank, some in enumerate(steps)]
    return written if _comes_to_its_end(written) else None


def _ready(step: int) -> int:
    return 2 * step + 1


def _stored(step: int) -> int:
    return 2 * step + 2


def _matched(steps: Sequence[Sequence[Step]]) -> list[_Message] | None:
    """Return all messages; None if they do not go together, as in steps that are no collective."""
    waiting: dict[tuple[int, int], list[Sequence[Place]]] = defaultdict(list)
    for rank, step, move, reduced in _moves(steps):
        if isinstance(move, Send):
            waiting[rank, move.peer].append([Place(rank, step, c, c in reduced) for c in indices(move.chunk)])
    messages = []
    for rank, step, move, _ in _moves(steps):
        if not isinstance(move, Send):
            sent = waiting[move.peer, rank].pop(0) if waiting[move.peer, rank] else ()
            chunks = indices(move.chunk)
            if len(sent) != len(chunks):
                return None
            messages.append(_Message(rank, step, isinstance(move, Reduce), sent, chunks))
    return None if any(waiting.values()) else messages


def _moves(steps: Sequence[Sequence[Step]]) -> Iterator[tuple[int, int, Reduce | Send, set[int]]]:
    """Yield every transfer with its rank, its step, and the chunks that this step combines into."""
    for rank, some in enumerate(steps):
        for number, step in enumerate(some):
            reduced = {chunk for move in step if isinstance(move, Reduce) for chunk in indices(move.chunk)}
            yield from ((rank, number, move, reduced) for move in step)  # type: ignore[misc]


class _Writer:
    """Writes the script of one rank."""

    def __init__(self, rank: int, messages: Sequence[_Message]) -> None:
        self._rank = rank
        self._sends: dict[int, list[_Message]] = defaultdict(list)
        self._arrivals: dict[int, list[_Message]] = defaultdict(list)
        for message in messages:
            if message.src == rank:
                self._sends[message.src_step].append(message)
            if message.dst == rank:
                self._arrivals[message.dst_step].append(message)
        self._actions: list[Action] = []
        # Who may still take what: by chunk, and by half of the outbox.
        self._takers_in_place: dict[int, list[Wait]] = defaultdict(list)
        self._takers_of_outbox: dict[int, list[Wait]] = defaultdict(list)

    def script(self, num_steps: int, last: int) -> Script:
        """Return all steps; all ranks end with the same count."""
        for step in range(num_steps):
            self._send(step)
            self._actions.append(Tell(_ready(step)))
            self._take(step)
            self._actions.append(Tell(_stored(step) if step < num_steps - 1 else last))
        if num_steps == 0:
            self._actions.append(Tell(last))
        self._actions += self._last_takers()
        return self._actions

    def _send(self, step: int) -> None:
        sends = self._sends[step]
        self._actions += self._takers_of_outbox.pop(step % 2, ()) if sends else ()
        self._actions += [Stage(place) for place in dict.fromkeys(p for message in sends for p in message.sent)]
        for message in sends:
            for place in message.sent:
                wait = Wait(message.dst, _stored(message.dst_step), place)
                self._takers_of_outbox[step % 2].append(wait)
                if not place.always_staged:
                    self._takers_in_place[place.chunk].append(wait._replace(in_place=True))

    def _take(self, step: int) -> None:
        arrivals = self._arrivals[step]
        into = Counter(chunk for message in arrivals if message.reduces for chunk in message.chunks)
        if max(into.values(), default=0) > 1:
            arrivals = sorted(arrivals, key=lambda message: message.src)
        lower = Counter(
            c for message in arrivals if message.reduces and message.src < self._rank for c in message.chunks
        )
        begun = set[int]()
        for message in arrivals:
            self._actions.append(Wait(message.src, _ready(message.src_step)))
            for place, chunk in zip(message.sent, message.chunks, strict=True):
                if message.reduces and message.src < self._rank and (lower[chunk] > 1 or chunk in begun):
                    self._actions.append(Take(LAST if chunk in begun else COPY, place, chunk, in_sums=True))
                    begun.add(chunk)
                    lower[chunk] -= 1
                    if lower[chunk] == 0:
                        self._overwrite(Take(FIRST, None, chunk, in_sums=False))
                else:
                    how = COPY if not message.reduces else FIRST if message.src < self._rank else LAST
                    self._overwrite(Take(how, place, chunk, in_sums=False))

    def _overwrite(self, take: Take) -> None:
        self._actions += self._takers_in_place.pop(take.chunk, ())
        self._actions.append(take)

    def _last_takers(self) -> list[Wait]:
        """Return the waits until all that this rank has sent is taken: then its caller may overwrite it."""
        goals: dict[int, int] = {}
        for messages in self._sends.values():
            for message in messages:
                goals[message.dst] = max(goals.get(message.dst, 0), _stored(message.dst_step))
        return [Wait(peer, goal) for peer, goal in goals.items()]


def _comes_to_its_end(written: Sequence[Script]) -> bool:
    """Whether no ranks wait for each other, even if each has to wait wherever it might have to."""
    counts = [0] * len(written)
    places = [0] * len(written)
    moved = True
    while moved:
        moved = False
        for rank, script in enumerate(written):
            while places[rank] < len(script):
                action = script[places[rank]]
                if isinstance(action, Wait) and counts[action.peer] < action.goal:
                    break
                if isinstance(action, Tell):
                    counts[rank] = action.far
                places[rank] += 1
                moved = True
    return all(place == len(script) for place, script in zip(places, written, strict=True))
