"""A whole schedule as one kernel: it does what the rows of its plan say, see backends/shm/compiled/table.py.

It goes through all rows with the first slice of every chunk, then with the next one, and so on.
"""

from __future__ import annotations

from backends.shm.compiled.copies import copy, stream
from backends.shm.compiled.desk import (
    ARRIVALS,
    BASE,
    DONE,
    EVERYBODY,
    ITEMSIZE,
    RANK,
    ROUND,
    SIGNATURE,
    SOURCES,
    TARGETS,
)
from backends.shm.compiled.machine import inner, kernel, load, store, store_release
from backends.shm.compiled.meeting import entry, heap, meet, offset_of, own, ring, wait_for
from backends.shm.compiled.schedule_words import (
    ALWAYS_STAGED,
    CONDITIONS,
    FROM,
    FROM_PLACE,
    GOAL_OF,
    HOW,
    INTO,
    INTO_PLACE,
    LAST,
    LENGTH,
    NUM_REGIONS,
    NUM_ROWS,
    NUM_SLICES,
    OUTBOX,
    PUT,
    ROW_BYTES,
    ROWS,
    SLICE_BYTES,
    STAGED_AT,
    SUMS,
    SUMS_OF_OWN,
    TAKE_COPY,
    TAKE_FIRST,
    TELL,
    WAIT,
    WHO,
)
from backends.shm.compiled.ways import combine, finish, inline_place
from backends.shm.layout import NOWHERE, PROGRESS


@inner
def publish(desk: int, memory: int) -> None:
    """Write where the regions of this rank and its outbox lie, for the others to read after the meeting."""
    table = heap(desk, load(desk + RANK)) + inline_place(desk)
    for region in range(NUM_REGIONS + 1):
        store(table + 8 * region, offset_of(desk, load(memory + 8 * region)))


@inner
def published(desk: int, rank: int, index: int) -> int:
    """Return where in the heap of a rank a region lies, or its outbox."""
    return load(heap(desk, rank) + inline_place(desk) + index)


@inner
def is_shared(desk: int, rank: int, region: int) -> bool:
    """Return whether others see a region of a rank."""
    return published(desk, rank, 8 * region) != NOWHERE


@inner
def applies(desk: int, row: int) -> bool:
    """Return whether the conditions of a row are met."""
    for condition in range(row + CONDITIONS, row + ROW_BYTES, 24):
        rank = load(condition)
        if rank != EVERYBODY and is_shared(desk, rank, load(condition + 8)) != (load(condition + 16) == 1):
            return False
    return True


@inner
def sent(desk: int, row: int, memory: int, first: int) -> int:
    """Return where in this process lies what is taken, from byte ``first`` of its chunk on."""
    rank = load(row + WHO)
    region = load(row + FROM)
    if region == SUMS_OF_OWN:
        return load(memory + SUMS) + load(row + FROM_PLACE)
    if region == ALWAYS_STAGED or not is_shared(desk, rank, region):
        return heap(desk, rank) + published(desk, rank, OUTBOX) + load(row + STAGED_AT)
    return heap(desk, rank) + published(desk, rank, 8 * region) + load(row + FROM_PLACE) + first


@inner
def own_chunk(memory: int, region: int, place: int, first: int) -> int:
    """Return where memory of this rank lies, from byte ``first`` of its chunk on."""
    if region == SUMS_OF_OWN:
        return load(memory + SUMS) + place
    return load(memory + 8 * region) + place + first


@inner
def take(desk: int, plan: int, row: int, memory: int, first: int, length: int) -> None:
    """Store what another rank sends."""
    source = sent(desk, row, memory, first)
    target = own_chunk(memory, load(row + INTO), load(row + INTO_PLACE), first)
    if load(row + HOW) == TAKE_COPY:
        copy(target, source, length)
        return
    comes_first = load(row + HOW) == TAKE_FIRST
    store(entry(desk, SOURCES, 0), source if comes_first else target)
    store(entry(desk, SOURCES, 1), target if comes_first else source)
    store(entry(desk, TARGETS, 0), target)
    combine(desk, plan, 2, 1, length // load(plan + ITEMSIZE))


@inner
def give(desk: int, row: int, memory: int, first: int, length: int) -> None:
    """Put what this rank sends into its outbox, or into the memory of another one."""
    source = own_chunk(memory, load(row + FROM), load(row + FROM_PLACE), first)
    if load(row + HOW) == PUT:
        rank = load(row + WHO)
        place = published(desk, rank, 8 * load(row + INTO)) + load(row + INTO_PLACE)
        copy(heap(desk, rank) + place + first, source, length)
    else:
        stream(load(memory + OUTBOX) + load(row + STAGED_AT), source, length)


@inner
def tell(desk: int, count: int) -> None:
    """Say how far this rank has come."""
    store_release(own(desk, PROGRESS), load(desk + BASE) + count)
    ring(desk)


@inner
def follow(desk: int, plan: int, row: int, memory: int, piece: int) -> int:
    """Do what a row says, for one slice of all chunks."""
    how = load(row + HOW)
    count = load(row + GOAL_OF) + piece * load(plan + LAST)
    if how == TELL:
        tell(desk, count)
        return DONE
    if not applies(desk, row):
        return DONE
    if how == WAIT:
        return wait_for(desk, load(row + WHO), PROGRESS, load(desk + BASE) + count)
    first = piece * load(plan + SLICE_BYTES)
    length = min(load(plan + SLICE_BYTES), load(row + LENGTH) - first)
    if length > 0 and how < TELL:
        take(desk, plan, row, memory, first, length)
    elif length > 0:
        give(desk, row, memory, first, length)
    return DONE


@kernel
def schedule(desk: int, plan: int, memory: int, target: int) -> int:
    """Run a schedule; ``target`` is not used."""
    if load(desk + ARRIVALS) == 0:
        publish(desk, memory)
        store(desk + BASE, load(own(desk, PROGRESS)))
    status = meet(desk, 0, load(plan + SIGNATURE), NOWHERE)
    num_rows = load(plan + NUM_ROWS)
    while status == DONE and load(desk + ROUND) < num_rows * load(plan + NUM_SLICES):
        piece = load(desk + ROUND) // num_rows
        row = plan + ROWS + ROW_BYTES * (load(desk + ROUND) - piece * num_rows)
        status = follow(desk, plan, row, memory, piece)
        if status == DONE:
            store(desk + ROUND, load(desk + ROUND) + 1)
    return finish(desk, status)
