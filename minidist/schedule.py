"""The vocabulary of algorithms: what one rank does in one step of a collective.

A schedule is a generator, written once per collective::

    def ring_all_gather(rank, world_size):
        for step in range(world_size - 1):
            yield Send(next_rank, chunk=...), Recv(prev_rank, chunk=...)

It says who sends which chunk to whom, and nothing about tensors, networks or threads. The same
generator is executed on tensors (backends/scheduled.py), proved (minidist/prove.py) and counted in the tests.

Nomenclature: a *step* is the set of transfers that a rank posts together, so no order of sends and
receives inside a step can deadlock; a *chunk* is one of the parts into which the collective cuts its
memory, by index. Which memory the chunks name is fixed per collective:

| collective | chunks |
|---|---|
| all_reduce, reduce, broadcast | ``num_chunks`` equal parts of the tensor |
| all_gather | 0 .. n-1: the n blocks of the output; chunk ``rank`` holds the input at the start |
| reduce_scatter | 0 .. n-1: the n blocks of a copy of the input; chunk ``rank`` is the result |
| gather, scatter | 0 .. n-1: the n blocks at the root; elsewhere only chunk ``rank`` exists |
| all_to_all | 0 .. n-1: the n blocks of the input; n .. 2n-1: the n blocks of the output |
| barrier | 0: a byte to send, 1: a byte to receive; they carry nothing |
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Send:
    """Send a chunk to rank ``peer``; it must not change in this step."""

    peer: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Recv:
    """Receive a chunk from rank ``peer`` and overwrite it."""

    peer: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Reduce:
    """Receive a chunk from rank ``peer`` and combine it with the one that is there."""

    peer: int
    chunk: int


Transfer = Send | Recv | Reduce
Step = tuple[Transfer, ...]
Schedule = Callable[[int, int], Iterator[Step]]
"""``schedule(rank, world_size)`` yields the steps of that rank."""
RootedSchedule = Callable[[int, int, int], Iterator[Step]]
"""``schedule(rank, world_size, root)``, for broadcast, reduce, gather and scatter."""
