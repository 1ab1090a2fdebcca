"""How ranks meet inside of a kernel: the protocol of backends/shm/arena.py, on the same words.

No wait is without end. A rank with a core of its own looks for a while; one without gives its core away between looks.
"""

from __future__ import annotations

from backends.shm.compiled.desk import (
    ARRIVALS,
    AWAY,
    CHIME,
    DISAGREED,
    DONE,
    GOAL,
    HEAPS,
    NUM_FIELDS,
    PATIENCE_NS,
    PEER,
    RANK,
    SIZE,
    SPINS,
    WORD,
    WORDS,
    WORLD_SIZE,
)
from backends.shm.compiled.machine import (
    fence,
    give_core_away,
    inner,
    load,
    load_acquire,
    now_ns,
    pause,
    store,
    store_release,
    wake,
)
from backends.shm.layout import BELL, COUNT, NOWHERE, PROGRESS, TICKET


@inner
def entry(desk: int, table: int, rank: int) -> int:
    """Return the address of a rank's word in a table of the desk."""
    return desk + 8 * (NUM_FIELDS + table * load(desk + WORLD_SIZE) + rank)


@inner
def heap(desk: int, rank: int) -> int:
    """Return where this process has the heap of a rank."""
    return load(entry(desk, HEAPS, rank))


@inner
def word(desk: int, rank: int, index: int) -> int:
    """Return the address of a word of a rank."""
    return load(entry(desk, WORDS, rank)) + 8 * index


@inner
def own(desk: int, index: int) -> int:
    """Return the address of a word of this rank."""
    return word(desk, load(desk + RANK), index)


@inner
def ticket(desk: int, rank: int, count: int) -> int:
    """Return the address of a rank's ticket of a meeting: its signature, and then its offset."""
    return word(desk, rank, TICKET + 2 * ((count - 1) & 1))


@inner
def offset_of(desk: int, address: int) -> int:
    """Return where in this rank's heap something lies."""
    offset = address - heap(desk, load(desk + RANK))
    return offset if 0 <= offset < load(desk + SIZE) else NOWHERE


@inner
def ring(desk: int) -> None:
    """Wake the ranks that sleep; see backends/shm/doorbell.py."""
    fence()  # a rank that says "asleep" now either sees what was written, or is seen here
    for peer in range(load(desk + WORLD_SIZE)):
        bell = word(desk, peer, BELL)
        if load_acquire(bell + 8) and peer != load(desk + RANK):
            chime = load(desk + CHIME) + 2 * load(desk + WORLD_SIZE)
            store(desk + CHIME, chime)
            store_release(bell, chime)
            wake(bell)


@inner
def arrive(desk: int, signature: int, offset: int) -> None:
    """Come to the next meeting."""
    count = load(own(desk, COUNT)) + 1
    mine = ticket(desk, load(desk + RANK), count)
    store(mine, signature)
    store(mine + 8, offset)
    store_release(own(desk, COUNT), count)
    ring(desk)


@inner
def advance(desk: int) -> None:
    """Count a round as done."""
    store_release(own(desk, PROGRESS), load(own(desk, PROGRESS)) + 1)
    ring(desk)


@inner
def reaches(desk: int, address: int, goal: int) -> bool:
    """Return whether a word becomes as high as ``goal`` in a while."""
    for _ in range(load(desk + SPINS)):
        if load_acquire(address) >= goal:
            return True
        pause()
    until = now_ns() + load(desk + PATIENCE_NS)
    while load_acquire(address) < goal:
        if now_ns() > until:
            return False
        give_core_away()
    return True


@inner
def wait_for(desk: int, peer: int, index: int, goal: int) -> int:
    """Wait for a word of a rank."""
    if load_acquire(word(desk, peer, index)) >= goal or reaches(desk, word(desk, peer, index), goal):
        return DONE
    store(desk + PEER, peer)
    store(desk + WORD, index)
    store(desk + GOAL, goal)
    return AWAY


@inner
def wait_for_all(desk: int, index: int, goal: int) -> int:
    """Wait for a word of every other rank."""
    for peer in range(load(desk + WORLD_SIZE)):
        if peer != load(desk + RANK) and wait_for(desk, peer, index, goal) == AWAY:
            return AWAY
    return DONE


@inner
def meet(desk: int, number: int, signature: int, offset: int) -> int:
    """Come to meeting ``number`` of this collective, from 0 on, and wait until all have; do nothing if they had."""
    if load(desk + ARRIVALS) == number:
        arrive(desk, signature, offset)
        store(desk + ARRIVALS, number + 1)
    if load(desk + ARRIVALS) > number + 1:
        return DONE
    count = load(own(desk, COUNT))
    if wait_for_all(desk, COUNT, count) == AWAY:
        return AWAY
    for peer in range(load(desk + WORLD_SIZE)):
        if load(ticket(desk, peer, count)) != signature:
            store(desk + PEER, peer)
            return DISAGREED
    return DONE
