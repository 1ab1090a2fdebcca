"""Runs schedules on tensors, over nothing but a send and a receive.

`ScheduledCommunicator` is the base of every backend: with `_isend` and `_irecv` alone all collectives
work. The executor takes a schedule step by step. It posts the receives and the sends of a step
together, each chunk cut into *segments*, and combines a segment that has arrived while the next ones
are still on their way::

    step      | irecv s0 s1 s2 | isend s0 s1 s2 | wait s0, add s0 | wait s1, add s1 | ...

Received segments wait in scratch memory that is kept between calls, because fresh pages cost more than
the copy into them. Chunks without elements (fewer elements than ranks) are skipped on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from backends import schedules
from minidist.communicator import Communicator, ReduceOp, Work
from minidist.schedule import Recv, Reduce, Send, Step

TAG = 2**15 - 1
"""The tag of all messages of schedules; users' tags are below it."""
COMBINE: dict[ReduceOp, Callable[..., Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.PRODUCT: torch.mul,
}


class ScheduledCommunicator(Communicator):
    """Every collective as a schedule over `_isend` and `_irecv`, which a backend has to bring.

    Args:
        rank, world_size, timeout_s: see `Communicator`.
        segment_bytes: the largest message; what is larger travels in segments. The same on all ranks.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float = 300.0, segment_bytes: int = 2**22) -> None:
        super().__init__(rank, world_size, timeout_s)
        if segment_bytes < 16:
            raise ValueError(f"segment_bytes must be at least 16, got {segment_bytes}")
        self.segment_bytes = segment_bytes
        self._scratch: dict[str, Tensor] = {}

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        steps = schedules.direct_all_reduce(self.rank, self.world_size)
        self._execute(steps, self._cut(tensor), op, timeout_s)

    def _reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        steps = schedules.binomial_reduce(self.rank, self.world_size, dst)
        self._execute(steps, [tensor.view(-1)], op, timeout_s)

    def _broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        steps = schedules.binomial_broadcast(self.rank, self.world_size, src)
        self._execute(steps, [tensor.view(-1)], ReduceOp.SUM, timeout_s)

    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        self._run_all_gather(schedules.direct_all_gather(self.rank, self.world_size), output, input, timeout_s)

    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        steps = schedules.direct_reduce_scatter(self.rank, self.world_size)
        self._run_reduce_scatter(steps, output, input, op, timeout_s)

    def _gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        chunks = self._root_chunks(output, input)
        if output is not None:
            chunks[self.rank].copy_(input.view(-1))
        steps = schedules.direct_gather(self.rank, self.world_size, dst)
        self._execute(steps, chunks, ReduceOp.SUM, timeout_s)

    def _scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        chunks = self._root_chunks(input, output)
        steps = schedules.direct_scatter(self.rank, self.world_size, src)
        self._execute(steps, chunks, ReduceOp.SUM, timeout_s)
        if input is not None:
            output.view(-1).copy_(chunks[self.rank])

    def _all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        sent, received = self._cut(input), self._cut(output)
        received[self.rank].copy_(sent[self.rank])
        steps = schedules.direct_all_to_all(self.rank, self.world_size)
        self._execute(steps, [*sent, *received], ReduceOp.SUM, timeout_s)

    def _barrier(self, timeout_s: float) -> None:
        steps = schedules.dissemination_barrier(self.rank, self.world_size)
        tokens = self._memory("barrier", 2, torch.uint8)
        self._execute(steps, [tokens[:1], tokens[1:]], ReduceOp.SUM, timeout_s)

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        from backends.group import GroupCommunicator  # a group is itself a ScheduledCommunicator

        channel = self._new_channel()
        ranks = next((group for group in groups if self.rank in group), None)
        return None if ranks is None else GroupCommunicator(self, ranks, channel)

    # The executor -----------------------------------------------------------------------------

    def _run_all_gather(self, steps: Iterator[Step], output: Tensor, input: Tensor, timeout_s: float) -> None:
        chunks = self._cut(output)
        if chunks[self.rank].data_ptr() != input.data_ptr():
            chunks[self.rank].copy_(input.view(-1))
        self._execute(steps, chunks, ReduceOp.SUM, timeout_s)

    def _run_reduce_scatter(
        self, steps: Iterator[Step], output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float
    ) -> None:
        chunks = self._cut(self._memory("input", input.numel(), input.dtype).copy_(input.view(-1)))
        self._execute(steps, chunks, op, timeout_s)
        output.view(-1).copy_(chunks[self.rank])

    def _execute(self, steps: Iterable[Step], chunks: Sequence[Tensor], op: ReduceOp, timeout_s: float) -> None:
        """Run this rank's ``steps`` on the memory in ``chunks``; each chunk is 1-d and contiguous."""
        deadline = time.monotonic() + timeout_s
        for step in steps:
            self._execute_step(step, chunks, op, max(deadline - time.monotonic(), 1e-3))

    def _execute_step(self, step: Step, chunks: Sequence[Tensor], op: ReduceOp, timeout_s: float) -> None:
        received: list[tuple[Work, Tensor, Tensor]] = []
        sent: list[Work] = []
        arrivals = [transfer for transfer in step if not isinstance(transfer, Send)]
        scratch = self._memories([chunks[a.chunk] for a in arrivals if isinstance(a, Reduce)])
        for arrival in arrivals:
            chunk = chunks[arrival.chunk]
            target = chunk if isinstance(arrival, Recv) else next(scratch)
            for piece, segment in zip(self._segments(target), self._segments(chunk), strict=True):
                received.append((self._irecv(piece, arrival.peer, self._tag(TAG), timeout_s), piece, segment))
        for transfer in step:
            if isinstance(transfer, Send):
                for segment in self._segments(chunks[transfer.chunk]):
                    sent.append(self._isend(segment, transfer.peer, self._tag(TAG), timeout_s))
                    self.traffic.count(segment.nbytes)
        for work, piece, segment in received:
            work.wait()
            if piece.data_ptr() != segment.data_ptr():
                COMBINE[op](segment, piece, out=segment)
        for work in sent:
            work.wait()

    def _segments(self, chunk: Tensor) -> Sequence[Tensor]:
        if chunk.nbytes <= self.segment_bytes:
            return [chunk] if chunk.numel() else []
        return torch.split(chunk, self.segment_bytes // chunk.element_size())

    def _cut(self, tensor: Tensor) -> Sequence[Tensor]:
        """Cut into world_size chunks, the first ones larger by one element where it does not divide."""
        return torch.tensor_split(tensor.view(-1), self.world_size)

    def _root_chunks(self, many: Tensor | None, one: Tensor) -> Sequence[Tensor]:
        return [one.view(-1)] * self.world_size if many is None else self._cut(many)

    def _memories(self, chunks: Sequence[Tensor]) -> Iterator[Tensor]:
        """Scratch memory of the sizes of ``chunks``, which have one dtype."""
        if chunks:
            sizes = [chunk.numel() for chunk in chunks]
            yield from torch.split(self._memory("reduce", sum(sizes), chunks[0].dtype), sizes)

    def _memory(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """Scratch memory that is kept, and grows, between calls."""
        nbytes = numel * dtype.itemsize
        if name not in self._scratch or self._scratch[name].numel() < nbytes:
            self._scratch[name] = torch.empty(nbytes, dtype=torch.uint8, device=self.device_type)
        return self._scratch[name][:nbytes].view(dtype)
