"""The collectives of shared memory on torch's operations, for processes that have no numba to compile better ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from backends.deadline import Deadline
from backends.processes.offer import Offer
from backends.processes.signature import MEETING
from backends.shm import roles
from backends.shm.all_reduce import AllReduce, add_and_write
from backends.shm.arena import Arena
from backends.shm.layout import NOWHERE
from backends.shm.roles import Call
from backends.shm.sharing import share
from minidist.collective import Run
from minidist.communicator import ReduceOp
from minidist.schedule import Schedule


class TorchCollectives:
    """See `backends.shm.compiled.collectives.CompiledCollectives`, which does the same."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._all_reduces = AllReduce(arena)

    def all_reduce(self, flat: Tensor, op: ReduceOp, timeout_s: float) -> None:
        self._all_reduces.run(flat, op, Deadline(timeout_s))

    def share(self, call: Call, timeout_s: float) -> None:
        n = self._arena.world_size
        blocks = () if call.target is None else torch.split(call.target, call.numel)
        piece = call.like[: call.numel]
        offer = Offer(call.kind, piece, call.source, roles.num_pieces(call.kind, n), call.op, call.root)
        reads = [(blocks[block], parts) for block, parts in roles.reads(call.kind, self._arena.rank, n, call.root)]
        share(self._arena, offer, reads, Deadline(timeout_s))

    def barrier(self, timeout_s: float) -> None:
        self._arena.meet(MEETING, NOWHERE, Deadline(timeout_s))

    def whole(self, schedule: Schedule, run: Run, numel: int, dtype: torch.dtype, channel: int) -> None:
        """Leave schedules to messages."""

    def run_whole(self, whole: object, regions: Sequence[Tensor], op: ReduceOp, timeout_s: float) -> NoReturn:
        raise AssertionError("there is none")

    def without_meetings(self, tensor: Tensor, timeout_s: float) -> Callable[[], None]:
        blocks = self._all_reduces.blocks(tensor, Deadline(timeout_s))
        return lambda: add_and_write(blocks, ReduceOp.SUM)
