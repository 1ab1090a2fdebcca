"""The script of a schedule on tensors of one shape, as a table of words that a kernel follows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from backends.executor.layout import Range, layout
from backends.shm.compiled import desk, schedule_words
from backends.shm.layout import LINE_BYTES
from backends.shm.script import Action, If, Place, Put, Script, Sent, Stage, Take, Tell, Wait
from minidist.collective import Run

WORKING_BYTES = 2**25
"""How much of all chunks is done at a time, which bounds the outbox. Slices that stay in nearer caches gained up to a
fifth on quiet cores, and lost many times as much on busy ones, where a rank that waits gets its core back late."""
LEAST_BYTES = 2**13
"""And how much of one chunk at least: less would take more time for the meetings."""
Memory = tuple[int, int]
"""A region of memory, and where in it."""


@dataclass(frozen=True)
class Table:
    """What a rank does; see backends/shm/compiled/schedule_words.py.

    Attributes:
        slice_bytes: how much of each chunk is done at a time.
        num_slices: how often that is done.
        last: the count with which all ranks end a slice.
        rows: what is done.
        outbox_bytes: how large the outbox of this rank is.
        always_stages: whether it needs the outbox even where all of its memory is shared.
        sums_bytes: how large its sums are.
        reduces: whether it combines anything.
    """

    slice_bytes: int
    num_slices: int
    last: int
    rows: Sequence[Sequence[int]]
    outbox_bytes: int
    always_stages: bool
    sums_bytes: int
    reduces: bool


def table(
    written: Sequence[Script], last: int, run: Run, num_chunks: int, rank: int, numel: int, itemsize: int
) -> Table | None:
    """Return what ``rank`` does on tensors, or blocks, of so many elements; None where messages have to do it.

    All ranks get a table, or none does.

    Args:
        written: the scripts of all ranks.
        last: with which count they end.
        run: what they do.
        num_chunks: how many chunks there are.
        rank: one of them.
        numel: see `backends.executor.layout.layout`.
        itemsize: bytes of an element.
    """
    chunks = [layout(run, each, num_chunks, numel) for each in range(run.world_size)]
    maker = _Maker(chunks, itemsize, written, last)
    return maker.table(rank) if maker.is_even() else None


class _Maker:
    """Makes the table of a rank."""

    def __init__(self, chunks: Sequence[Sequence[Range]], itemsize: int, written: Sequence[Script], last: int) -> None:
        self._chunks = chunks
        self._itemsize = itemsize
        self._written = written
        self._last = last
        self._chunk_bytes = max(each.numel for some in chunks for each in some) * itemsize
        share = WORKING_BYTES // len(chunks[0])
        self._slice_bytes = _lines(min(self._chunk_bytes, max(share, LEAST_BYTES)))
        self._outbox = functools.cache(self._make_outbox)
        self._sums: dict[Place, int] = {}

    def is_even(self) -> bool:
        """Whether every chunk is as large as the one that it becomes."""
        return all(
            self._range(action.sent.place).numel == self._range(action.into).numel
            for script in self._written
            for action in script
            if isinstance(action, Take) and action.sent is not None
        )

    def table(self, rank: int) -> Table:
        """Return the table of a rank."""
        script = self._written[rank]
        return Table(
            slice_bytes=self._slice_bytes,
            num_slices=-(-self._chunk_bytes // self._slice_bytes),
            last=self._last,
            rows=[row for action in script for row in self._rows(action)],
            outbox_bytes=self._outbox(rank)[1],
            always_stages=any(isinstance(action, Stage) and action.sent.always_staged for action in script),
            sums_bytes=len(self._sums) * self._slice_bytes,
            reduces=any(isinstance(action, Take) and (action.how or action.in_sums) for action in script),
        )

    def _rows(self, action: Action) -> Iterator[Sequence[int]]:
        """Yield the row of an action, unless it is about nothing."""
        match action:
            case Tell(far):
                yield _row(schedule_words.TELL, goal=far)
            case Wait(peer, goal, conditions):
                yield _row(schedule_words.WAIT, peer, goal, conditions=self._conditions(conditions))
            case _ if length := self._range(action.sent.place if action.sent else action.into).numel * self._itemsize:
                yield self._move(action, length)

    def _move(self, action: Stage | Put | Take, length: int) -> Sequence[int]:
        conditions = self._conditions(action.conditions)
        match action:
            case Stage(sent):
                memory = self._memory(sent.place)
                return _row(schedule_words.STAGE_IT, 0, 0, memory, self._staged_at(sent), (0, 0), length, conditions)
            case Put(sent, into):
                memory = self._memory(sent.place)
                return _row(schedule_words.PUT, into.rank, 0, memory, 0, self._memory(into), length, conditions)
            case Take():
                return self._take(action, length, conditions)

    def _take(self, take: Take, length: int, conditions: Sequence[int]) -> Sequence[int]:
        into = self._memory_of_sums(take.into) if take.in_sums else self._memory(take.into)
        sent = take.sent
        if sent is None:
            return _row(take.how, 0, 0, self._memory_of_sums(take.into), 0, into, length, conditions)
        region, place = self._memory(sent.place)
        memory = schedule_words.ALWAYS_STAGED if sent.always_staged else region, place
        return _row(take.how, sent.place.rank, 0, memory, self._staged_at(sent), into, length, conditions)

    def _conditions(self, conditions: Sequence[If]) -> list[int]:
        known = [(each.place.rank, self._range(each.place).region, int(each.is_shared)) for each in conditions]
        none = [(desk.EVERYBODY, 0, 0)] * (2 - len(known))
        return [word for condition in (*known, *none) for word in condition]

    def _range(self, place: Place) -> Range:
        return self._chunks[place.rank][place.chunk]

    def _memory(self, place: Place) -> Memory:
        found = self._range(place)
        return found.region, found.start * self._itemsize

    def _memory_of_sums(self, place: Place) -> Memory:
        return schedule_words.SUMS_OF_OWN, self._sums.setdefault(place, len(self._sums) * self._slice_bytes)

    def _staged_at(self, sent: Sent) -> int:
        return self._outbox(sent.place.rank)[0][sent]

    def _make_outbox(self, rank: int) -> tuple[dict[Sent, int], int]:
        """Return where in the outbox of a rank lies what it sends, and how large that is."""
        places: dict[int, dict[Sent, int]] = {}
        for action in self._written[rank]:
            if isinstance(action, Stage):
                of_step = places.setdefault(action.sent.step, {})
                of_step[action.sent] = len(of_step)
        half = max(map(len, places.values()), default=0)
        numbers = {sent: step % 2 * half + number for step, some in places.items() for sent, number in some.items()}
        return {sent: number * self._slice_bytes for sent, number in numbers.items()}, 2 * half * self._slice_bytes


def _row(
    how: int,
    peer: int = 0,
    goal: int = 0,
    source: Memory = (0, 0),
    staged_at: int = 0,
    into: Memory = (0, 0),
    length: int = 0,
    conditions: Sequence[int] = (),
) -> Sequence[int]:
    row = [how, peer, goal, *source, staged_at, *into, length, *conditions]
    return row + [0] * (schedule_words.ROW_BYTES // 8 - len(row))


def _lines(nbytes: int) -> int:
    """Round up to whole lines of the cache."""
    return -(-nbytes // LINE_BYTES) * LINE_BYTES
