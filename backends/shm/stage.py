"""The way through shared memory for tensors that do not lie in it: piece by piece, in rounds.

What one part of the work has written into the stage, the next one reads in the round after it, so that all ranks meet
once per round::

    round               0        1        2        3        4
    stage chunks in     block 0  block 1  block 2
    reduce own chunk             block 0  block 1  block 2
    copy results out                      block 0  block 1  block 2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from backends.deadline import Deadline
from backends.processes.signature import MEETING
from backends.shm.arena import Arena
from backends.shm.layout import NOWHERE, STAGE_BYTES


class Stage:
    """The stages of all ranks, cut into ``num_pieces`` pieces of ``numel`` elements, twice."""

    def __init__(self, arena: Arena, num_pieces: int, dtype: torch.dtype) -> None:
        self._arena = arena
        self._dtype = dtype
        self.numel = STAGE_BYTES // num_pieces // 64 * 64 // dtype.itemsize

    def pieces_of(self, chunk: Tensor) -> Sequence[Tensor]:
        """Cut a chunk into what is staged in one round each."""
        if chunk.numel() <= self.numel:
            return [chunk] if chunk.numel() else []
        return torch.split(chunk, self.numel)

    def piece(self, rank: int, k: int, index: int, like: Tensor) -> Tensor:
        """Return a piece of ``rank``'s stage for block ``k``, as long as ``like``."""
        offset = self._arena.stage(k & 1) + index * self.numel * self._dtype.itemsize
        return self._arena.view(rank, offset, like.numel(), self._dtype)


def run_rounds(arena: Arena, num_blocks: int, parts: Sequence[Callable[[int], None]], deadline: Deadline) -> None:
    """Run each part of the work on ``num_blocks`` blocks, each one round behind the part before it.

    A part may read in round k what the one before it wrote in round k - 1. Blocks use the two copies of the stage in
    turn, so what is written for block k + 2 replaces what was written for block k: two rounds, and so two meetings,
    later, when it has been read.
    """
    last = num_blocks + len(parts) - 2
    for k in range(last + 1):
        for lag, run in enumerate(parts):
            if 0 <= k - lag < num_blocks:
                run(k - lag)
        # None after the last round, in which the others' stages are read: nobody writes into a stage again before the
        # meeting that every collective begins with.
        if k < last:
            arena.meet(MEETING, NOWHERE, deadline)
