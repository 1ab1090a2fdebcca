"""All other collectives as one kernel: who offers what, and who reads which of it, stands in the plan."""

from __future__ import annotations

from backends.shm.compiled.copies import stream
from backends.shm.compiled.desk import (
    ARRIVALS,
    BASES,
    DONE,
    ITEMSIZE,
    NBYTES,
    NUM_PIECES,
    NUM_READS,
    RANK,
    READS,
    ROOT,
    ROUND,
    SIGNATURE,
    SOURCES,
    TARGETS,
    WAY,
    WORLD_SIZE,
)
from backends.shm.compiled.machine import inner, kernel, load, store
from backends.shm.compiled.meeting import entry, heap, meet, offset_of
from backends.shm.compiled.ways import (
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


@inner
def read_all(desk: int, plan: int, stride: int, target: int, nbytes: int) -> None:
    """Combine parts of what lies at the bases, ``stride`` bytes from piece to piece, into the blocks of the target."""
    read = plan + READS
    for _ in range(load(plan + NUM_READS)):
        num_parts = load(read + 8)
        for index in range(num_parts):
            part = read + 16 + 16 * index
            base = load(entry(desk, BASES, load(part)))
            store(entry(desk, SOURCES, index), base + load(part + 8) * stride)
        store(entry(desk, TARGETS, 0), target + load(read))
        if num_parts == 1:
            move(target + load(read), load(entry(desk, SOURCES, 0)), nbytes)
        else:
            combine(desk, plan, num_parts, 1, nbytes // load(plan + ITEMSIZE))
        read += 16 + 16 * num_parts


@inner
def share_inline(desk: int, plan: int, source: int, target: int) -> int:
    place = inline_place(desk)
    nbytes = load(plan + NBYTES)
    if load(desk + ARRIVALS) == 0 and source != 0:
        stream(heap(desk, load(desk + RANK)) + place, source, nbytes * load(plan + NUM_PIECES))
    status = meet(desk, 0, load(plan + SIGNATURE), NOWHERE)
    if status == DONE:
        for rank in range(load(desk + WORLD_SIZE)):
            store(entry(desk, BASES, rank), heap(desk, rank) + place)
        read_all(desk, plan, nbytes, target, nbytes)
    return status


@inner
def read_in_place(desk: int, plan: int, target: int) -> None:
    for rank in range(load(desk + WORLD_SIZE)):
        store(entry(desk, BASES, rank), offered(desk, rank))
    read_all(desk, plan, load(plan + NBYTES), target, load(plan + NBYTES))


@inner
def stage_pieces(desk: int, plan: int, source: int, block: int, step: int) -> None:
    nbytes = load(plan + NBYTES)
    num_pieces = load(plan + NUM_PIECES)
    length = min(step, nbytes - block * step)
    for piece in range(num_pieces):
        place = staged(desk, load(desk + RANK), block, step, num_pieces, piece)
        stream(place, source + piece * nbytes + block * step, length)


@inner
def read_staged(desk: int, plan: int, target: int, block: int, step: int) -> None:
    for rank in range(load(desk + WORLD_SIZE)):
        store(entry(desk, BASES, rank), staged(desk, rank, block, step, load(plan + NUM_PIECES), 0))
    read_all(desk, plan, step, target + block * step, min(step, load(plan + NBYTES) - block * step))


@inner
def share_staged(desk: int, plan: int, source: int, target: int) -> int:
    nbytes = load(plan + NBYTES)
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


@kernel
def share(desk: int, plan: int, source: int, target: int) -> int:
    """Offer ``source``, 0 for nothing, and read what the others offer into ``target``."""
    if load(plan + NBYTES) * load(plan + NUM_PIECES) <= INLINE_BYTES:
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


@kernel
def barrier(desk: int, plan: int, source: int, target: int) -> int:
    """Meet."""
    return finish(desk, meet(desk, 0, MEETING, NOWHERE))
