"""The script of a schedule on tensors of one shape, as a table of words that a kernel follows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from backends.executor.layout import Range, layout
from backends.shm.compiled import desk
from backends.shm.layout import LINE_BYTES
from backends.shm.script import Action, Place, Script, Stage, Take, Tell, Wait, scripts
from minidist.collective import Run
from minidist.schedule import Schedule, chunks_of

NOTHING = desk.ALWAYS_STAGED


@dataclass(frozen=True)
class Table:
    """What a rank does.

    Attributes:
        rows: see backends/shm/compiled/desk.py.
        outbox_bytes: how large its outbox is.
        always_stages: whether it needs the outbox even where all of its memory is shared.
        sums_bytes: how large its sums are.
        reduces: whether it combines anything.
    """

    rows: Sequence[int]
    outbox_bytes: int
    always_stages: bool
    sums_bytes: int
    reduces: bool


def table(schedule: Schedule, run: Run, rank: int, numel: int, itemsize: int) -> Table | None:
    """Return what ``rank`` does on tensors, or blocks, of ``numel`` elements; None where messages have to do it.

    All ranks get a table, or none does.
    """
    written = scripts(schedule, run)
    if written is None:
        return None
    num_chunks = chunks_of(schedule, run.name, run.world_size)
    maker = _Maker(run, num_chunks, numel, itemsize, written)
    return maker.table(rank) if maker.is_even() else None


class _Maker:
    def __init__(self, run: Run, num_chunks: int, numel: int, itemsize: int, written: Sequence[Script]) -> None:
        self._itemsize = itemsize
        self._written = written
        self._chunks = [layout(run, rank, num_chunks, numel) for rank in range(run.world_size)]
        self._outbox = functools.cache(self._make_outbox)
        self._rank = 0
        self._sums: dict[int, int] = {}
        self._sums_bytes = 0

    def is_even(self) -> bool:
        """Whether every chunk is as large as the one that it becomes."""
        return all(
            self._range(action.source).numel == self._chunks[rank][action.chunk].numel
            for rank, script in enumerate(self._written)
            for action in script
            if isinstance(action, Take) and action.source is not None
        )

    def table(self, rank: int) -> Table:
        """Return the table of a rank."""
        self._rank = rank
        script = self._written[rank]
        rows = [word for action in script for row in self._rows(action) for word in row]
        places = [action.place for action in script if isinstance(action, Stage)]
        reduces = any(isinstance(action, Take) and (action.how or action.in_sums) for action in script)
        outbox_bytes = self._outbox(rank)[1]
        return Table(rows, outbox_bytes, any(p.always_staged for p in places), self._sums_bytes, reduces)

    def _rows(self, action: Action) -> Iterator[Sequence[int]]:
        """Yield the row of an action, unless it is about nothing."""
        match action:
            case Tell(far):
                yield self._row(desk.TELL, goal=far)
            case Wait(peer, goal, None):
                yield self._row(desk.WAIT, peer, goal)
            case Wait(peer, goal, Place() as place, in_place):
                how = desk.WAIT_IF_SHARED if in_place else desk.WAIT_IF_STAGED
                yield self._row(how, peer, goal, region=self._region(place))
            case Stage(place):
                if numel := self._range(place).numel:
                    yield self._row(
                        desk.PUT,
                        region=self._region(place),
                        place=self._start(place),
                        staged_at=self._outbox(place.rank)[0][place],
                        into=self._range(place).region,
                        length=numel * self._itemsize,
                    )
            case Take():
                if self._chunks[self._rank][action.chunk].numel:
                    yield self._take(action)

    def _take(self, action: Take) -> Sequence[int]:
        target = self._chunks[self._rank][action.chunk]
        length = target.numel * self._itemsize
        sums = self._sums_of(action.chunk, length) if action.in_sums or action.source is None else 0
        into, into_place = (
            (desk.SUMS_OF_OWN, sums) if action.in_sums else (target.region, target.start * self._itemsize)
        )
        if action.source is None:
            return self._row(action.how, 0, 0, desk.SUMS_OF_OWN, sums, 0, into, into_place, length)
        place = action.source
        staged_at = self._outbox(place.rank)[0][place]
        region = self._region(place)
        return self._row(action.how, place.rank, 0, region, self._start(place), staged_at, into, into_place, length)

    def _row(
        self,
        how: int,
        peer: int = 0,
        goal: int = 0,
        region: int = NOTHING,
        place: int = 0,
        staged_at: int = 0,
        into: int = 0,
        into_place: int = 0,
        length: int = 0,
    ) -> Sequence[int]:
        return how, peer, goal, region, place, staged_at, into, into_place, length

    def _range(self, place: Place) -> Range:
        return self._chunks[place.rank][place.chunk]

    def _region(self, place: Place) -> int:
        return desk.ALWAYS_STAGED if place.always_staged else self._range(place).region

    def _start(self, place: Place) -> int:
        return self._range(place).start * self._itemsize

    def _sums_of(self, chunk: int, length: int) -> int:
        """Return where the sums for a chunk lie."""
        if chunk not in self._sums:
            self._sums[chunk] = self._sums_bytes
            self._sums_bytes += _lines(length)
        return self._sums[chunk]

    def _make_outbox(self, rank: int) -> tuple[dict[Place, int], int]:
        """Return where in the outbox of a rank lies what it sends, and how large that is."""
        steps: dict[int, int] = {}
        offsets: dict[Place, int] = {}
        for action in self._written[rank]:
            if isinstance(action, Stage):
                place = action.place
                offsets[place] = steps.setdefault(place.step, 0)
                steps[place.step] += _lines(self._range(place).numel * self._itemsize)
        half = max(steps.values(), default=0)
        return {place: offset + place.step % 2 * half for place, offset in offsets.items()}, 2 * half


def _lines(nbytes: int) -> int:
    """Round up to whole lines of the cache."""
    return -(-nbytes // LINE_BYTES) * LINE_BYTES
