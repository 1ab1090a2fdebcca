"""The vocabulary of algorithms: what one rank does in one step of a collective.

A schedule is a generator, written once per collective::

    def ring_all_gather(rank, world_size):
        for step in range(world_size - 1):
            yield Send(next_rank, chunk=...), Recv(prev_rank, chunk=...)

It says who sends which chunk to whom, and nothing about tensors, networks or threads. The same generator is executed on
tensors (backends/scheduled.py), proved (minidist/analysis/prove.py), run on a virtual clock
(minidist/analysis/simulate.py), drawn (experiments/draw.py) and counted in the tests.

Nomenclature: a *chunk* is one of the parts into which a collective cuts its memory, by index. A *step* is the set of
transfers that a rank posts together, so no order of sends and receives inside of a step can deadlock:

- what a step sends is what was there before it, so a chunk can be sent and reduced in one step;
- the reductions of one step into one chunk are taken in the order of their ranks, the own value at its own place, so
  ranks that combine the same values get the same bits;
- a transfer names one chunk or several (``range(2, 6)``, ``[0, 3]``), which travel as one message.

Which memory the chunks name is fixed per collective; n is the world size:

| collective | chunks |
|---|---|
| all_reduce, reduce, broadcast | equal parts of the tensor: n for all_reduce and one for the others, or
``@num_chunks`` |
| all_gather | 0 .. n-1: the n blocks of the output; chunk ``rank`` holds the input at the start |
| reduce_scatter | 0 .. n-1: the n blocks of a copy of the input; chunk ``rank`` is the result |
| gather, scatter | 0 .. n-1: the n blocks at the root; elsewhere only chunk ``rank`` exists |
| all_to_all | 0 .. n-1: the n blocks of the input; n .. 2n-1: those of the output, its own filled; then scratch |
| barrier | 0: a byte to send, 1: a byte to receive; they carry nothing |

What is the caller's input stays as it is: the root's chunks in a scatter, the others' in a gather, chunks 0 .. n-1 in
an all_to_all. What each chunk holds at the start and must hold at the end is in `minidist.collective`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minidist.collective import COLLECTIVES

Chunks = int | Sequence[int]


@dataclass(frozen=True, slots=True)
class Transfer:
    """One end of a message.

    Attributes:
        peer: the rank at the other end.
        chunk: what the message is: one chunk, or several.
    """

    peer: int
    chunk: Chunks

    def __post_init__(self) -> None:
        if isinstance(self.chunk, list):  # which its schedule may go on to use
            object.__setattr__(self, "chunk", tuple(self.chunk))


@dataclass(frozen=True, slots=True)
class Send(Transfer):
    """Send chunks to rank ``peer``."""


@dataclass(frozen=True, slots=True)
class Recv(Transfer):
    """Receive chunks from rank ``peer`` and overwrite those that are there; none of them is sent in this step."""


@dataclass(frozen=True, slots=True)
class Reduce(Transfer):
    """Receive chunks from rank ``peer`` and combine them with those that are there."""


Step = tuple[Transfer, ...]
Schedule = Callable[..., Iterator[Step]]
"""``schedule(rank, world_size)`` yields the steps of that rank; ``(rank, world_size, root)`` where there is a root."""


class _Described:
    """A schedule, and what it says of itself.

    Attributes:
        num_chunks: the number of chunks by the world size; None for the usual one.
        alike: whether all ranks step alike.
    """

    def __init__(self, steps: Schedule, num_chunks: Callable[[int], int] | None, alike: bool) -> None:
        functools.update_wrapper(self, steps)  # its name and its docstring, and what another one says of itself
        self.steps = steps
        self.num_chunks = num_chunks
        self.alike = alike

    def __call__(self, *args: int, **settings: Any) -> Iterator[Step]:
        return self.steps(*args, **settings)


def num_chunks(count: int | Callable[[int], int]) -> Callable[[Schedule], Schedule]:
    """Say into how many chunks a schedule cuts the tensor: a number, or a function of the world size.

    For all_to_all it is the number of all chunks; those from 2n on are scratch, each as large as a block.
    """
    by_size = count if callable(count) else lambda world_size: count
    return lambda steps: _Described(steps, by_size, steps_alike(steps))


def alike(steps: Schedule) -> Schedule:
    """Say that all ranks step alike: each sends one message and receives one in every step.

    The simulator then asks for the steps of all ranks at once, with an array of numpy as ``rank``, whose arithmetic is
    that of numbers, and gets through thousands of ranks in seconds. Ranks may be added and multiplied, not compared.
    """
    described = _description(steps)
    return _Described(steps, described.num_chunks if described else None, alike=True)


def steps_alike(schedule: Schedule) -> bool:
    """Whether the schedule says that all ranks step alike."""
    described = _description(schedule)
    return described is not None and described.alike


def chunks_of(schedule: Schedule, collective: str, world_size: int) -> int:
    """Return how many chunks there are when ``schedule`` runs ``collective`` on ``world_size`` ranks."""
    described = _description(schedule)
    if described is not None and described.num_chunks is not None:
        return described.num_chunks(world_size)
    return default_chunks(collective, world_size)


def _description(schedule: Schedule) -> _Described | None:
    while isinstance(schedule, functools.partial):
        schedule = schedule.func
    return schedule if isinstance(schedule, _Described) else None


def default_chunks(collective: str, world_size: int) -> int:
    """Return how many chunks there are where the schedule does not say."""
    promise = COLLECTIVES[collective]
    return promise.chunks + promise.chunks_per_rank * world_size


def indices(chunk: Chunks) -> Sequence[int]:
    """Return the chunks that a transfer names, always as a sequence."""
    return chunk if isinstance(chunk, range | list | tuple) else (chunk,)


def among(steps: Iterator[Step], ranks: Sequence[int], chunks: Sequence[Chunks]) -> Iterator[Step]:
    """Run a schedule on other ranks and chunks: its rank r becomes ``ranks[r]``, its chunk c ``chunks[c]``."""
    for step in steps:
        yield tuple(replace(move, peer=ranks[move.peer], chunk=_renamed(move.chunk, chunks)) for move in step)


def _renamed(chunk: Chunks, chunks: Sequence[Chunks]) -> Chunks:
    if isinstance(chunk, int):
        return chunks[chunk]
    return [index for one in chunk for index in indices(chunks[one])]
