"""What runs a schedule as one call of a kernel: its table for each op, and the memory that it works with."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from backends.processes.signature import pack, schedule_on
from backends.shm.arena import Arena
from backends.shm.compiled import schedule_words
from backends.shm.compiled.loading import Kernels
from backends.shm.compiled.table import Table
from backends.shm.compiled.words import Words
from backends.shm.layout import NOWHERE, STAGE_BYTES
from minidist.communicator import ReduceOp


class Whole:
    """A schedule on tensors of one shape.

    Args:
        table: what this rank does.
        kind, numel, dtype, root, channel: what all ranks have to mean alike; see `pack`.
        kernels: of this process.
    """

    def __init__(
        self, table: Table, kind: str, numel: int, dtype: torch.dtype, root: int, channel: int, kernels: Kernels
    ) -> None:
        self.table = table
        self._what = kind, numel, dtype
        self._where = root, schedule_on(channel)
        self._kernels = kernels
        self.words = functools.cache(self._make_words)

    def _make_words(self, op: ReduceOp) -> Words:
        """Return the plan; see backends/shm/compiled/schedule_words.py."""
        kind, numel, dtype = self._what
        table = self.table
        reducer = self._kernels.reducer(dtype, op) if table.reduces else 0
        itemsize = self._kernels.itemsize(dtype) if table.reduces else 1
        signature = pack(kind, numel, dtype, op, *self._where)
        rows = [word for row in table.rows for word in row]
        head = (signature, reducer, table.slice_bytes, itemsize, table.num_slices, table.last, len(table.rows))
        return Words([*head, *rows])


class WholeMemory:
    """The memory of one rank's schedules: where their regions lie, the outbox and the sums, which are kept.

    Args:
        arena: an outbox that is no larger than the stage lies there.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._stage = arena.heap.base + arena.places.stage
        self._outbox: Tensor | None = None
        self._sums = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._words = Words([0] * (schedule_words.NUM_REGIONS + 2))

    def of(self, table: Table, regions: Sequence[Tensor]) -> int:
        """Return the address of the words that name the memory of a call."""
        words = self._words.view
        has_staged = table.always_stages
        for index in range(schedule_words.NUM_REGIONS):
            is_there = index < len(regions) and regions[index].numel() > 0
            words[index] = regions[index].data_ptr() if is_there else 0
            has_staged |= is_there and self._arena.heap.offset_of(regions[index]) == NOWHERE
        words[schedule_words.OUTBOX // 8] = self._outbox_of(table.outbox_bytes) if has_staged else 0
        if table.sums_bytes > self._sums.numel():
            self._sums = torch.empty(table.sums_bytes, dtype=torch.uint8, device="cpu")
        words[schedule_words.SUMS // 8] = self._sums.data_ptr()
        return self._words.address

    def _outbox_of(self, nbytes: int) -> int:
        if nbytes <= 2 * STAGE_BYTES:
            return self._stage
        if self._outbox is None or self._outbox.numel() < nbytes:
            self._outbox = None  # gives its memory back before more is taken
            self._outbox = self._arena.heap.allocate(nbytes, torch.uint8, "the outbox of a schedule")
        return self._outbox.data_ptr()
