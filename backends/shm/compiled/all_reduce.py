"""The all-reduce as a kernel; see backends/shm/compiled/ways.py."""

from __future__ import annotations

from backends.shm.compiled.copies import copy, stream
from backends.shm.compiled.desk import (
    ARRIVALS,
    DONE,
    EVERYBODY,
    ITEMSIZE,
    NBYTES,
    RANK,
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
    next_round,
    offered,
    own_first,
    staged,
)
from backends.shm.layout import INLINE_BYTES, LINE_BYTES, NOWHERE


@inner
def share_bytes(desk: int, plan: int) -> int:
    """Return how many bytes a rank owns; the last one may own fewer. See backends/shm/layout.py."""
    lines = -(-load(plan + NBYTES) // LINE_BYTES)
    return -(-lines // load(desk + WORLD_SIZE)) * LINE_BYTES


@inner
def reduce_inline(desk: int, plan: int, target: int) -> int:
    place = inline_place(desk)
    nbytes = load(plan + NBYTES)
    if load(desk + ARRIVALS) == 0:
        stream(heap(desk, load(desk + RANK)) + place, target, nbytes)
    status = meet(desk, 0, load(plan + SIGNATURE), NOWHERE)
    if status == DONE:
        for rank in range(load(desk + WORLD_SIZE)):
            store(entry(desk, SOURCES, rank), heap(desk, rank) + place)
        store(entry(desk, TARGETS, 0), target)
        combine(desk, plan, load(desk + WORLD_SIZE), 1, load(plan + NBYTES) // load(plan + ITEMSIZE))
    return status


@inner
def combine_share(desk: int, plan: int) -> None:
    size = share_bytes(desk, plan)
    left = load(plan + NBYTES) - load(desk + RANK) * size
    count = min(size, left) // load(plan + ITEMSIZE)
    if count > 0:
        combine(desk, plan, load(desk + WORLD_SIZE), load(desk + WORLD_SIZE), count)


@inner
def reduce_in_place(desk: int, plan: int) -> None:
    me = load(desk + RANK)
    start = me * share_bytes(desk, plan)
    for rank in range(load(desk + WORLD_SIZE)):
        place = own_first(desk, rank)
        store(entry(desk, SOURCES, place), offered(desk, rank) + start)
        store(entry(desk, TARGETS, place), offered(desk, rank) + start)
    combine_share(desk, plan)


@inner
def length_of_block(desk: int, plan: int, rank: int, block: int, step: int) -> int:
    """Return how many bytes of a rank's share are in a block; 0 where its share has ended."""
    size = share_bytes(desk, plan)
    of_share = min(size, load(plan + NBYTES) - rank * size)
    return max(0, min(step, of_share - block * step))


@inner
def stage_shares(desk: int, plan: int, target: int, block: int, step: int) -> None:
    n = load(desk + WORLD_SIZE)
    me = load(desk + RANK)
    for rank in range(n):
        if rank != me:
            source = target + rank * share_bytes(desk, plan) + block * step
            stream(staged(desk, me, block, step, n, rank), source, length_of_block(desk, plan, rank, block, step))


@inner
def reduce_block(desk: int, plan: int, target: int, block: int, step: int) -> None:
    n = load(desk + WORLD_SIZE)
    me = load(desk + RANK)
    mine = target + me * share_bytes(desk, plan) + block * step
    for rank in range(n):
        place = own_first(desk, rank)
        store(entry(desk, SOURCES, place), mine if rank == me else staged(desk, rank, block, step, n, me))
    store(entry(desk, TARGETS, 0), mine)
    length = length_of_block(desk, plan, me, block, step)
    combine(desk, plan, n, 1, length // load(plan + ITEMSIZE))
    stream(staged(desk, me, block, step, n, me), mine, length)


@inner
def copy_results(desk: int, plan: int, target: int, block: int, step: int) -> None:
    n = load(desk + WORLD_SIZE)
    for rank in range(n):
        if rank != load(desk + RANK):
            result = target + rank * share_bytes(desk, plan) + block * step
            copy(result, staged(desk, rank, block, step, n, rank), length_of_block(desk, plan, rank, block, step))


@inner
def reduce_staged(desk: int, plan: int, target: int) -> int:
    size = share_bytes(desk, plan)
    step = block_bytes(load(desk + WORLD_SIZE), size)
    num_blocks = -(-size // step)
    while load(desk + ROUND) < num_blocks + 2 * LAG:
        status = next_round(desk)
        if status != DONE:
            return status
        k = load(desk + ROUND)
        if k < num_blocks:
            stage_shares(desk, plan, target, k, step)
        if LAG <= k < num_blocks + LAG:
            reduce_block(desk, plan, target, k - LAG, step)
        if k >= 2 * LAG:
            copy_results(desk, plan, target, k - 2 * LAG, step)
        end_round(desk)
    return DONE


@kernel
def all_reduce(desk: int, plan: int, source: int, target: int) -> int:
    """Combine the tensors of all ranks, in place; ``source`` is not used."""
    if load(plan + NBYTES) <= INLINE_BYTES:
        return finish(desk, reduce_inline(desk, plan, target))
    status = meet(desk, 0, load(plan + SIGNATURE), offset_of(desk, target))
    if status != DONE:
        return status
    decide(desk, EVERYBODY)
    if load(desk + WAY) == STAGED:
        return finish(desk, reduce_staged(desk, plan, target))
    if load(desk + ARRIVALS) == 1:
        reduce_in_place(desk, plan)
    return finish(desk, meet(desk, 1, MEETING, NOWHERE))


@kernel
def reduce_share(desk: int, plan: int, source: int, target: int) -> int:
    """Do what an all-reduce in place does between its meetings, with the tables as the last one left them."""
    combine_share(desk, plan)
    return DONE
