"""What all kernels have in common; each is one call for all meetings of its collective.

A collective goes one of three ways, as on the path of torch (backends/shm/all_reduce.py, sharing.py): *inline* if it is
small, *in place* if what is offered lies in shared memory on all ranks, and else through the *stage*, in rounds. Every
element is combined by one rank, or by all in one order, so all ranks hold the same bits. The order: small tensors by
rank; else the rank that owns the element comes first, then the others by rank.

In a round a rank does a part of three blocks: it stages one, reduces one that all had staged LAG rounds before, and
copies out one that was reduced LAG rounds before that. So it may be LAG rounds ahead of the others, and the stage holds
2 x LAG blocks. With p rounds done, blocks below p are staged, below p - LAG reduced and below p - 2 LAG copied out; all
three parts of round k want the same of the others, p > k - LAG, also those that overwrite block k - 2 LAG.
"""

from __future__ import annotations

from backends.shm.compiled.copies import copy
from backends.shm.compiled.desk import (
    ARRIVALS,
    DONE,
    EVERYBODY,
    INLINE,
    RANK,
    REDUCER,
    ROUND,
    SCRATCH,
    SOURCES,
    STAGE,
    TARGETS,
    WAY,
    WORLD_SIZE,
)
from backends.shm.compiled.machine import call_reducer, inner, load, store
from backends.shm.compiled.meeting import advance, entry, heap, own, ticket, wait_for_all
from backends.shm.layout import COUNT, INLINE_BYTES, LINE_BYTES, NOWHERE, PROGRESS, STAGE_BYTES

LAG = 2
BLOCK_BYTES = 2**16
"""What goes through the stage at a time: so that the stage of two ranks stays in the second cache of a core."""
MEETING = 0
UNDECIDED, IN_PLACE, STAGED = range(3)


@inner
def finish(desk: int, status: int) -> int:
    """Make the desk ready for the next collective if this one is done."""
    if status == DONE:
        store(desk + ARRIVALS, 0)
        store(desk + WAY, UNDECIDED)
        store(desk + ROUND, 0)
    return status


@inner
def move(target: int, source: int, nbytes: int) -> None:
    """Copy, unless it is there."""
    if target != source:
        copy(target, source, nbytes)


@inner
def combine(desk: int, plan: int, num_sources: int, num_targets: int, count: int) -> None:
    """Combine what the tables name."""
    sources = entry(desk, SOURCES, 0)
    targets = entry(desk, TARGETS, 0)
    call_reducer(load(plan + REDUCER), sources, num_sources, targets, num_targets, count, load(desk + SCRATCH))


@inner
def own_first(desk: int, rank: int) -> int:
    """Return the place of a rank where this one comes first, then the others by rank."""
    me = load(desk + RANK)
    return 0 if rank == me else rank + 1 if rank < me else rank


@inner
def inline_place(desk: int) -> int:
    """Return where in the heaps small tensors lie in the meeting of this collective."""
    turn = (load(own(desk, COUNT)) - load(desk + ARRIVALS)) & 1
    return load(desk + INLINE) + turn * INLINE_BYTES


@inner
def decide(desk: int, root: int) -> None:
    """Choose the way of all ranks, who see the same tickets; once, as they may be gone later."""
    if load(desk + WAY) != UNDECIDED:
        return
    count = load(own(desk, COUNT))
    way = IN_PLACE
    for rank in range(load(desk + WORLD_SIZE)):
        if root in (EVERYBODY, rank) and load(ticket(desk, rank, count) + 8) == NOWHERE:
            way = STAGED
    store(desk + WAY, way)


@inner
def offered(desk: int, rank: int) -> int:
    """Return where in this process a rank's tensor lies, after the first meeting and before the second."""
    return heap(desk, rank) + load(ticket(desk, rank, load(own(desk, COUNT))) + 8)


@inner
def block_bytes(num_pieces: int, nbytes: int) -> int:
    """Return how much of each piece goes through the stage in a round; small ones still take several."""
    most = min(BLOCK_BYTES, STAGE_BYTES // (num_pieces * LAG) // LINE_BYTES * LINE_BYTES)
    least = -(-nbytes // (4 * LINE_BYTES)) * LINE_BYTES
    return min(most, max(least, 8192))


@inner
def staged(desk: int, rank: int, block: int, size: int, num_pieces: int, piece: int) -> int:
    """Return where a piece of a block lies in the stage of a rank."""
    slot = (block % (2 * LAG)) * num_pieces + piece
    return heap(desk, rank) + load(desk + STAGE) + slot * size


@inner
def next_round(desk: int) -> int:
    """Wait until the next round may begin."""
    return wait_for_all(desk, PROGRESS, load(own(desk, PROGRESS)) - LAG + 1)


@inner
def end_round(desk: int) -> None:
    """Count a round, here and for the others."""
    store(desk + ROUND, load(desk + ROUND) + 1)
    advance(desk)
