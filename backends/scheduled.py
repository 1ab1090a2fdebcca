"""Runs schedules on tensors, over nothing but a send and a receive.

`ScheduledCommunicator` is the base of every backend: with `_isend` and `_irecv` alone all collectives
work. The executor takes a schedule step by step. It posts the receives and the sends of a step
together, each chunk cut into *segments*, and combines a segment that has arrived while the next ones
are still on their way::

    step      | irecv s0 s1 s2 | isend s0 s1 s2 | wait s0, add s0 | wait s1, add s1 | ...

Received segments wait in scratch memory that is kept between calls, because fresh pages cost more than
the copy into them. Where it is safe, the receives of the next step are posted before this one has ended.
Chunks without elements (fewer elements than ranks) are skipped on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from backends import schedules
from backends.reductions import COMBINE
from backends.scratch import Scratch
from minidist import checks
from minidist.communicator import Communicator, ReduceOp, Work
from minidist.schedule import Recv, Reduce, Send, Step

TAG = 2**15 - 1
"""The tag of all messages of schedules; users' tags are below it."""
Received = tuple[Work, Tensor, Tensor]


class ScheduledCommunicator(Communicator):
    """Every collective as a schedule over `_isend` and `_irecv`, which a backend has to bring.

    Args:
        rank, world_size, timeout_s: see `Communicator`.
        segment_bytes: the largest message; what is larger travels in segments. The same on all ranks.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float = 300.0, segment_bytes: int = 2**22) -> None:
        super().__init__(rank, world_size, timeout_s)
        self.segment_bytes = checks.segment_bytes(segment_bytes)
        self._scratch, self._turn = Scratch(), 0

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
        tokens = self._scratch.take("barrier", 2, torch.uint8, self.device_type)
        self._execute(steps, [tokens[:1], tokens[1:]], ReduceOp.SUM, timeout_s)

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        from backends.group import group_of  # a group is itself a ScheduledCommunicator

        return group_of(self, groups)

    # The executor -----------------------------------------------------------------------------

    def _run_all_gather(self, steps: Iterator[Step], output: Tensor, input: Tensor, timeout_s: float) -> None:
        chunks = self._cut(output)
        if chunks[self.rank].data_ptr() != input.data_ptr():
            chunks[self.rank].copy_(input.view(-1))
        self._execute(steps, chunks, ReduceOp.SUM, timeout_s)

    def _run_reduce_scatter(
        self, steps: Iterator[Step], output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float
    ) -> None:
        chunks = self._cut(self._scratch.copy_of("input", input))
        self._execute(steps, chunks, op, timeout_s)
        output.view(-1).copy_(chunks[self.rank])

    def _execute(self, steps: Iterator[Step], chunks: Sequence[Tensor], op: ReduceOp, timeout_s: float) -> None:
        """Run this rank's ``steps`` on the memory in ``chunks``; each chunk is 1-d and contiguous."""
        deadline = time.monotonic() + timeout_s
        step, early = next(steps, None), None
        while step is not None:
            remaining = max(deadline - time.monotonic(), 1e-3)
            received = self._post_receives(step, chunks, remaining) if early is None else early
            sent = self._post_sends(step, chunks, remaining)
            following, early = next(steps, None), None
            if following is not None and _can_be_early(following, step, len(sent)):
                for work in sent:
                    work.wait()
                early = self._post_receives(following, chunks, remaining)
            for work, piece, segment in received:
                work.wait()
                if piece.data_ptr() != segment.data_ptr():
                    COMBINE[op](segment, piece, out=segment)
            for work in sent:
                work.wait()
            step = following

    def _post_receives(self, step: Step, chunks: Sequence[Tensor], timeout_s: float) -> list[Received]:
        """Return what to wait for, the memory that it comes into, and the segment that it belongs into."""
        received: list[Received] = []
        arrivals = [transfer for transfer in step if not isinstance(transfer, Send)]
        reduced = [chunks[arrival.chunk] for arrival in arrivals if isinstance(arrival, Reduce)]
        self._turn = 1 - self._turn  # what arrives early must not overwrite what is being reduced
        scratch = self._scratch.pieces(f"reduce{self._turn}", reduced)
        for arrival in arrivals:
            chunk = chunks[arrival.chunk]
            target = chunk if isinstance(arrival, Recv) else next(scratch)
            for piece, segment in zip(self._segments(target), self._segments(chunk), strict=True):
                received.append((self._irecv(piece, arrival.peer, self._tag(TAG), timeout_s), piece, segment))
        return received

    def _post_sends(self, step: Step, chunks: Sequence[Tensor], timeout_s: float) -> list[Work]:
        sends = [transfer for transfer in step if isinstance(transfer, Send)]
        segments = [(segment, send.peer) for send in sends for segment in self._segments(chunks[send.chunk])]
        for segment, _ in segments:
            self.traffic.count(segment.nbytes)
        return [self._isend(segment, peer, self._tag(TAG), timeout_s) for segment, peer in segments]

    def _segments(self, chunk: Tensor) -> Sequence[Tensor]:
        if chunk.nbytes <= self.segment_bytes:
            return [chunk] if chunk.numel() else []
        return torch.split(chunk, self.segment_bytes // chunk.element_size())

    def _cut(self, tensor: Tensor) -> Sequence[Tensor]:
        """Cut into world_size chunks, the first ones larger by one element where it does not divide."""
        return torch.tensor_split(tensor.view(-1), self.world_size)

    def _root_chunks(self, many: Tensor | None, one: Tensor) -> Sequence[Tensor]:
        return [one.view(-1)] * self.world_size if many is None else self._cut(many)


def _can_be_early(following: Step, step: Step, num_sent: int) -> bool:
    """Whether the receives of ``following`` can be posted before ``step`` has ended, but for its sends.

    A peer's send then finds its receive waiting, which saves a message over most transports. Not where a chunk
    travels in segments: to wait for the sends first would leave no transfer to hide the reduction behind.
    """
    arriving = {transfer.chunk for transfer in step if not isinstance(transfer, Send)}
    overwritten = {transfer.chunk for transfer in following if isinstance(transfer, Recv)}
    return num_sent <= sum(isinstance(transfer, Send) for transfer in step) and not arriving & overwritten
