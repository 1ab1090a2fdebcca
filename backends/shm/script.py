"""A schedule on shared memory, where nobody sends: one of the two ranks moves a message from memory to memory.

What is combined its receiver *takes*; what only moves its sender *puts* into the receiver's memory. Then a rank writes
mostly into lines of memory that it has read or written last itself; to write into those that are in another core's
cache is slow. A rank says how far it has come by one count, up to three times per step: it is *ready*, so that others
may take what it sends and overwrite what it receives; it has *put* what it puts; and the step is *done*::

    ready 0 | wait for a rank to be ready, put | put 0 | wait for a rank to be ready, take | done 0 | ready 1 | ...

What a step sends and also combines into is *staged*: taken out of a copy, the *outbox*. So is what a rank has in memory
that the others do not share, and who has its memory elsewhere takes instead of being given. So what is done depends on
whose memory is shared, which shows when it runs. An outbox has two halves, for even and odd steps.

All of this is worked out for all ranks at once: a schedule that is right for messages, which may be on their way while
their sender goes on, could come to a standstill here; such a one is left to messages.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from minidist.collective import Run
from minidist.schedule import Reduce, Schedule, Send, Step, Transfer, indices

COPY, FIRST, LAST = range(3)
"""How what is taken is stored: in the place of what is there, or combined with it, before or behind it."""


class Place(NamedTuple):
    """A chunk of a rank."""

    rank: int
    chunk: int


class Sent(NamedTuple):
    """A chunk that a rank sends in a step; ``always_staged``, or only where its memory is not shared."""

    place: Place
    step: int
    always_staged: bool


class If(NamedTuple):
    """Something is done only if the memory of a place is shared, or is not."""

    place: Place
    is_shared: bool


class Wait(NamedTuple):
    """Wait until a rank's count has come so far."""

    peer: int
    goal: int
    conditions: tuple[If, ...] = ()


class Tell(NamedTuple):
    """Say that this rank has come so ``far``."""

    far: int


class Stage(NamedTuple):
    """Copy what is sent into the outbox."""

    sent: Sent
    conditions: tuple[If, ...]


class Put(NamedTuple):
    """Copy what is sent into the memory of another rank."""

    sent: Sent
    into: Place
    conditions: tuple[If, ...]


class Take(NamedTuple):
    """Take a chunk.

    Attributes:
        how: COPY, FIRST or LAST.
        sent: what another rank sends; None for this rank's sums.
        into: where it belongs.
        in_sums: whether it goes into the sums for this chunk instead.
        conditions: when.
    """

    how: int
    sent: Sent | None
    into: Place
    in_sums: bool
    conditions: tuple[If, ...] = ()


Action = Wait | Tell | Stage | Put | Take
Script = Sequence[Action]


class _Message(NamedTuple):
    dst: int
    dst_step: int
    reduces: bool
    sent: Sequence[Sent]
    chunks: Sequence[int]

    @property
    def src(self) -> int:
        return self.sent[0].place.rank

    @property
    def src_step(self) -> int:
        return self.sent[0].step

    def pairs(self) -> Iterator[tuple[Sent, Place]]:
        """Yield each chunk that is sent, and where it belongs."""
        return zip(self.sent, (Place(self.dst, chunk) for chunk in self.chunks), strict=True)


def scripts(schedule: Schedule, run: Run) -> tuple[list[Script], int] | None:
    """Return what each rank does, and with which count all end; None where a schedule has to run over messages."""
    steps = [list(schedule(rank, *run.arguments)) for rank in range(run.world_size)]
    messages = _matched(steps)
    if messages is None:
        return None
    last = max(_done(len(some) - 1) for some in steps)
    written = [_Writer(rank, messages).script(len(some), last) for rank, some in enumerate(steps)]
    return (written, last) if _comes_to_its_end(written) else None


def _ready(step: int) -> int:
    return 3 * step + 1


def _put(step: int) -> int:
    return 3 * step + 2


def _done(step: int) -> int:
    return 3 * step + 3


def _matched(steps: Sequence[Sequence[Step]]) -> list[_Message] | None:
    """Return all messages; None if they do not go together, as in steps that are no collective."""
    waiting: dict[tuple[int, int], list[Sequence[Sent]]] = defaultdict(list)
    for rank, step, move, reduced in _moves(steps):
        if isinstance(move, Send):
            sent = [Sent(Place(rank, chunk), step, chunk in reduced) for chunk in indices(move.chunk)]
            waiting[rank, move.peer].append(sent)
    messages = []
    for rank, step, move, _ in _moves(steps):
        if not isinstance(move, Send):
            come = waiting[move.peer, rank].pop(0) if waiting[move.peer, rank] else ()
            chunks = indices(move.chunk)
            if len(come) != len(chunks):
                return None
            messages.append(_Message(rank, step, isinstance(move, Reduce), come, chunks))
    return None if any(waiting.values()) else messages


def _moves(steps: Sequence[Sequence[Step]]) -> Iterator[tuple[int, int, Transfer, set[int]]]:
    """Yield every transfer with its rank, its step, and the chunks that this step combines into."""
    for rank, some in enumerate(steps):
        for number, step in enumerate(some):
            reduced = {chunk for move in step if isinstance(move, Reduce) for chunk in indices(move.chunk)}
            yield from ((rank, number, move, reduced) for move in step)


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
        self._takers: dict[int, list[Wait]] = defaultdict(list)
        self._takers_of_outbox: dict[int, list[Wait]] = defaultdict(list)

    def script(self, num_steps: int, last: int) -> Script:
        """Return all steps; all ranks end with the same count."""
        for step in range(num_steps):
            self._stage(step)
            self._make_room(step)
            self._actions.append(Tell(_ready(step)))
            self._give(step)
            self._take(step)
            self._actions.append(Tell(_done(step) if step < num_steps - 1 else last))
        if num_steps == 0:
            self._actions.append(Tell(last))
        self._actions += self._last_takers()
        return self._actions

    def _stage(self, step: int) -> None:
        sends = self._sends[step]
        self._actions += self._takers_of_outbox.pop(step % 2, ()) if sends else ()
        pairs = [(sent, _given(message, into)) for message in sends for sent, into in message.pairs()]
        users = Counter(sent for sent, _ in pairs)
        staged = {sent: _where_staged(sent) + (_unless(given) if users[sent] == 1 else ()) for sent, given in pairs}
        self._actions += [Stage(sent, conditions) for sent, conditions in staged.items()]
        for message in sends:
            for sent, into in message.pairs():
                taken = _unless(_given(message, into))
                wait = Wait(message.dst, _done(message.dst_step))
                self._takers_of_outbox[step % 2].append(wait._replace(conditions=_where_staged(sent) + taken))
                if not sent.always_staged:
                    in_place = (If(sent.place, is_shared=True), *taken)
                    self._takers[sent.place.chunk].append(wait._replace(conditions=in_place))

    def _make_room(self, step: int) -> None:
        """Wait for those who still take from where others put something in this step."""
        for message in self._arrivals[step]:
            for chunk in () if message.reduces else message.chunks:
                self._actions += self._takers.pop(chunk, ())

    def _give(self, step: int) -> None:
        """Put what only moves; before the step combines anything into it."""
        given = [message for message in self._sends[step] if not message.reduces]
        for message in given:
            for sent, into in message.pairs():
                shared = _given(message, into)
                self._actions.append(Wait(message.dst, _ready(message.dst_step), shared))
                self._actions.append(Put(sent, into, shared))
        if given:
            self._actions.append(Tell(_put(step)))

    def _take(self, step: int) -> None:
        arrivals = self._arrivals[step]
        reduced = [chunk for message in arrivals if message.reduces for chunk in message.chunks]
        if len(reduced) > len(set(reduced)):
            arrivals = sorted(arrivals, key=lambda message: message.src)
        # By chunk: how many values of lower ranks are still to come before the own one.
        lower = Counter(chunk for each in arrivals if each.reduces and each.src < self._rank for chunk in each.chunks)
        begun = set[Place]()
        for message in arrivals:
            if message.reduces:
                self._actions.append(Wait(message.src, _ready(message.src_step)))
                for sent, into in message.pairs():
                    self._combine(sent, into, lower, begun)
            else:
                self._receive(message)

    def _receive(self, message: _Message) -> None:
        """Wait for what is put here, or take it."""
        for sent, into in message.pairs():
            given = _given(message, into)
            self._actions.append(Wait(message.src, _put(message.src_step), given))
            self._actions.append(Wait(message.src, _ready(message.src_step), _unless(given)))
            self._actions.append(Take(COPY, sent, into, in_sums=False, conditions=_unless(given)))

    def _combine(self, sent: Sent, into: Place, lower: Counter[int], begun: set[Place]) -> None:
        """Take a value that is combined: of lower ranks, if they are several, in the sums first."""
        is_lower = sent.place.rank < self._rank
        if is_lower and (lower[into.chunk] > 1 or into in begun):
            self._actions.append(Take(LAST if into in begun else COPY, sent, into, in_sums=True))
            begun.add(into)
            lower[into.chunk] -= 1
            if lower[into.chunk]:
                return
            take = Take(FIRST, None, into, in_sums=False)
        else:
            take = Take(FIRST if is_lower else LAST, sent, into, in_sums=False)
        self._actions += self._takers.pop(into.chunk, ())
        self._actions.append(take)

    def _last_takers(self) -> list[Wait]:
        """Return the waits until all that this rank has sent is taken: then its caller may overwrite it."""
        goals: dict[int, int] = {}
        for messages in self._sends.values():
            for message in messages:
                goals[message.dst] = max(goals.get(message.dst, 0), _done(message.dst_step))
        return [Wait(peer, goal) for peer, goal in goals.items()]


def _given(message: _Message, into: Place) -> tuple[If, ...]:
    """Return when a chunk of a message is put; never, if it is combined."""
    return () if message.reduces else (If(into, is_shared=True),)


def _unless(given: tuple[If, ...]) -> tuple[If, ...]:
    return tuple(each._replace(is_shared=False) for each in given)


def _where_staged(sent: Sent) -> tuple[If, ...]:
    return () if sent.always_staged else (If(sent.place, is_shared=False),)


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
