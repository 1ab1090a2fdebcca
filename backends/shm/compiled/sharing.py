"""All other collectives as one kernel: who offers what, and who reads which of it, stands in the plan."""

from __future__ import annotations

from numba import njit

from backends.shm.compiled.copies import stream
from backends.shm.compiled.desk import (
    ARRIVALS,
    DONE,
    ITEMSIZE,
    NUM_PIECES,
    NUM_READS,
    NUMEL,
    RANK,
    READS,
    ROOT,
    ROUND,
    SIGNATURE,
    SOURCES,
    TARGETS,
    WAY,
)
from backends.shm.compiled.machine import load, store
from backends.shm.compiled.meeting import entry, heap, meet, offset_of
from backends.shm.compiled.ways import (
    KERNEL,
    LAG,
    MEETING,
    STAGED,
    block_bytes,
    combine,
    decide,
    end_round,
    finish,
    inline_place,
    move,
    next_round,
    offered,
    staged,
)
from backends.shm.layout import INLINE_BYTES, NOWHERE


@njit
def after(read: int) -> int:
    """Return the next read of a plan."""
    return read + 16 + 16 * load(read + 8)


@njit
def read_parts(desk: int, plan: int, num_parts: int, target: int, nbytes: int) -> None:
    """Combine the sources into one target."""
    if num_parts == 1:
        move(target, load(entry(desk, SOURCES, 0)), nbytes)
    else:
        store(entry(desk, TARGETS, 0), target)
        combine(desk, plan, num_parts, 1, nbytes // load(plan + ITEMSIZE))


@njit
def share_inline(desk: int, plan: int, source: int, target: int) -> int:
    place = inline_place(desk)
    nbytes = load(plan + NUMEL) * load(plan + ITEMSIZE)
    if load(desk + ARRIVALS) == 0 and source != 0:
        stream(heap(desk, load(desk + RANK)) + place, source, nbytes * load(plan + NUM_PIECES))
    status = meet(desk, 0, load(plan + SIGNATURE), NOWHERE)
    if status == DONE:
        read = plan + READS
        for _ in range(load(plan + NUM_READS)):
            for part in range(load(read + 8)):
                rank = load(read + 16 + 16 * part)
                piece = load(read + 24 + 16 * part)
                store(entry(desk, SOURCES, part), heap(desk, rank) + place + piece * nbytes)
            read_parts(desk, plan, load(read + 8), target + load(read), nbytes)
            read = after(read)
    return status


@njit
def read_in_place(desk: int, plan: int, target: int) -> None:
    nbytes = load(plan + NUMEL) * load(plan + ITEMSIZE)
    read = plan + READS
    for _ in range(load(plan + NUM_READS)):
        for part in range(load(read + 8)):
            rank = load(read + 16 + 16 * part)
            piece = load(read + 24 + 16 * part)
            store(entry(desk, SOURCES, part), offered(desk, rank) + piece * nbytes)
        read_parts(desk, plan, load(read + 8), target + load(read), nbytes)
        read = after(read)


@njit
def stage_pieces(desk: int, plan: int, source: int, block: int, step: int) -> None:
    nbytes = load(plan + NUMEL) * load(plan + ITEMSIZE)
    num_pieces = load(plan + NUM_PIECES)
    length = min(step, nbytes - block * step)
    for piece in range(num_pieces):
        place = staged(desk, load(desk + RANK), block, step, num_pieces, piece)
        stream(place, source + piece * nbytes + block * step, length)


@njit
def read_staged(desk: int, plan: int, target: int, block: int, step: int) -> None:
    length = min(step, load(plan + NUMEL) * load(plan + ITEMSIZE) - block * step)
    num_pieces = load(plan + NUM_PIECES)
    read = plan + READS
    for _ in range(load(plan + NUM_READS)):
        for part in range(load(read + 8)):
            rank = load(read + 16 + 16 * part)
            piece = load(read + 24 + 16 * part)
            store(entry(desk, SOURCES, part), staged(desk, rank, block, step, num_pieces, piece))
        read_parts(desk, plan, load(read + 8), target + load(read) + block * step, length)
        read = after(read)


@njit
def share_staged(desk: int, plan: int, source: int, target: int) -> int:
    nbytes = load(plan + NUMEL) * load(plan + ITEMSIZE)
    step = block_bytes(load(plan + NUM_PIECES), nbytes)
    num_blocks = -(-nbytes // step)
    while load(desk + ROUND) < num_blocks + LAG:
        status = next_round(desk)
        if status != DONE:
            return status
        k = load(desk + ROUND)
        if k < num_blocks and source != 0:
            stage_pieces(desk, plan, source, k, step)
        if k >= LAG:
            read_staged(desk, plan, target, k - LAG, step)
        end_round(desk)
    return DONE


@njit(KERNEL, nogil=True, cache=True)
def share(desk: int, plan: int, source: int, target: int) -> int:
    """Offer ``source``, 0 for nothing, and read what the others offer into ``target``."""
    if load(plan + NUMEL) * load(plan + ITEMSIZE) * load(plan + NUM_PIECES) <= INLINE_BYTES:
        return finish(desk, share_inline(desk, plan, source, target))
    status = meet(desk, 0, load(plan + SIGNATURE), offset_of(desk, source))
    if status != DONE:
        return status
    decide(desk, load(plan + ROOT))
    if load(desk + WAY) == STAGED:
        return finish(desk, share_staged(desk, plan, source, target))
    if load(desk + ARRIVALS) == 1:
        read_in_place(desk, plan, target)
    return finish(desk, meet(desk, 1, MEETING, NOWHERE))


@njit(KERNEL, nogil=True, cache=True)
def barrier(desk: int, plan: int, source: int, target: int) -> int:
    """Meet."""
    return finish(desk, meet(desk, 0, MEETING, NOWHERE))
