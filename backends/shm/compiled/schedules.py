"""A whole schedule as one kernel: it does what the rows of its plan say, see backends/shm/script.py."""

from __future__ import annotations

from backends.shm.compiled.copies import copy, stream
from backends.shm.compiled.desk import (
    ALWAYS_STAGED,
    ARRIVALS,
    BASE,
    DONE,
    GOAL_OF,
    HOW,
    INTO,
    INTO_PLACE,
    ITEMSIZE,
    LENGTH,
    NUM_REGIONS,
    NUM_ROWS,
    OUTBOX,
    PEER_OF,
    PLACE,
    PUT,
    RANK,
    REGION,
    ROUND,
    ROW_BYTES,
    ROWS,
    SIGNATURE,
    SOURCES,
    STAGED_AT,
    SUMS,
    SUMS_OF_OWN,
    TAKE_COPY,
    TAKE_FIRST,
    TARGETS,
    TELL,
    WAIT_IF_SHARED,
    WAIT_IF_STAGED,
)
from backends.shm.compiled.machine import inner, kernel, load, store, store_release
from backends.shm.compiled.meeting import entry, heap, meet, offset_of, own, ring, wait_for
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
def is_staged(desk: int, rank: int, region: int) -> bool:
    """Return whether what a rank sends of a region is taken from its outbox."""
    return region == ALWAYS_STAGED or published(desk, rank, 8 * region) == NOWHERE


@inner
def source_of(desk: int, row: int, memory: int) -> int:
    """Return where in this process lies what is taken."""
    peer = load(row + PEER_OF)
    region = load(row + REGION)
    if region == SUMS_OF_OWN:
        return load(memory + SUMS) + load(row + PLACE)
    if is_staged(desk, peer, region):
        return heap(desk, peer) + published(desk, peer, OUTBOX) + load(row + STAGED_AT)
    return heap(desk, peer) + published(desk, peer, 8 * region) + load(row + PLACE)


@inner
def take(desk: int, plan: int, row: int, memory: int) -> None:
    """Store what another rank sends."""
    source = source_of(desk, row, memory)
    into = load(row + INTO)
    target = load(memory + (SUMS if into == SUMS_OF_OWN else 8 * into)) + load(row + INTO_PLACE)
    if load(row + HOW) == TAKE_COPY:
        copy(target, source, load(row + LENGTH))
        return
    comes_first = load(row + HOW) == TAKE_FIRST
    store(entry(desk, SOURCES, 0), source if comes_first else target)
    store(entry(desk, SOURCES, 1), target if comes_first else source)
    store(entry(desk, TARGETS, 0), target)
    combine(desk, plan, 2, 1, load(row + LENGTH) // load(plan + ITEMSIZE))


@inner
def put(desk: int, row: int, memory: int) -> None:
    """Copy into the outbox what others cannot take from where it is."""
    into = load(row + INTO)
    if is_staged(desk, load(desk + RANK), load(row + REGION)):
        place = load(memory + OUTBOX) + load(row + STAGED_AT)
        stream(place, load(memory + 8 * into) + load(row + PLACE), load(row + LENGTH))


@inner
def tell(desk: int, row: int) -> None:
    """Say how far this rank has come."""
    store_release(own(desk, PROGRESS), load(desk + BASE) + load(row + GOAL_OF))
    ring(desk)


@inner
def wait(desk: int, row: int) -> int:
    """Wait for a rank, where it has to be."""
    how = load(row + HOW)
    in_outbox = is_staged(desk, load(desk + RANK), load(row + REGION))
    if (how == WAIT_IF_SHARED and in_outbox) or (how == WAIT_IF_STAGED and not in_outbox):
        return DONE
    return wait_for(desk, load(row + PEER_OF), PROGRESS, load(desk + BASE) + load(row + GOAL_OF))


@inner
def follow(desk: int, plan: int, row: int, memory: int) -> int:
    """Do what a row says."""
    how = load(row + HOW)
    if how < TELL:
        take(desk, plan, row, memory)
    elif how == TELL:
        tell(desk, row)
    elif how == PUT:
        put(desk, row, memory)
    else:
        return wait(desk, row)
    return DONE


@kernel
def schedule(desk: int, plan: int, memory: int, target: int) -> int:
    """Run a schedule; ``target`` is not used."""
    if load(desk + ARRIVALS) == 0:
        publish(desk, memory)
        store(desk + BASE, load(own(desk, PROGRESS)))
    status = meet(desk, 0, load(plan + SIGNATURE), NOWHERE)
    while status == DONE and load(desk + ROUND) < load(plan + NUM_ROWS):
        status = follow(desk, plan, plan + ROWS + ROW_BYTES * load(desk + ROUND), memory)
        if status == DONE:
            store(desk + ROUND, load(desk + ROUND) + 1)
    return finish(desk, status)
