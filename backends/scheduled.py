"""Runs schedules on tensors, over nothing but a send and a receive.

`ScheduledCommunicator` is the base of every backend: with `_isend` and `_irecv` alone all collectives
work. The executor takes a schedule step by step. It posts the receives and the sends of a step
together, each message cut into *segments*, and combines a segment that has arrived while the next ones
are still on their way::

    step      | irecv s0 s1 s2 | isend s0 s1 s2 | wait s0, add s0 | wait s1, add s1 | ...

Chunks that lie side by side are one piece of memory; others that travel together are packed where they are small, and
go one by one where they are not. What is not received in place waits in scratch memory that is kept between calls,
because fresh pages cost more than the copy into them. Where it is safe, the receives of the next step are posted before
this one has ended. Chunks without elements (fewer elements than chunks) are skipped on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from backends.contact import LEFT, ContactLostError
from backends.executor.messages import Arrival, messages, take
from backends.executor.scratch import Scratch
from backends.schedules import DEFAULTS
from minidist.communicator import Communicator, ReduceOp, Work
from minidist.contract import checks
from minidist.errors import CommError, PeerLostError
from minidist.schedule import Recv, Reduce, Schedule, Send, Step, Transfer, chunks_of, indices

TAG = 2**15 - 1
"""The tag of all messages of schedules; users' tags are below it."""


class ScheduledCommunicator(Communicator):
    """Every collective as a schedule over `_isend` and `_irecv`, which a backend has to bring.

    Args:
        rank, world_size, timeout_s: see `Communicator`.
        segment_bytes: the largest message; what is larger travels in segments. The same on all ranks.

    Attributes:
        schedules: which schedule a collective runs.
    """

    schedules: Mapping[str, Schedule] = DEFAULTS

    def __init__(self, rank: int, world_size: int, timeout_s: float = 300.0, segment_bytes: int = 2**22) -> None:
        super().__init__(rank, world_size, timeout_s)
        self.segment_bytes = checks.segment_bytes(segment_bytes)
        self._scratch, self._turn = Scratch(), 0

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        self._execute("all_reduce", self._cut("all_reduce", tensor), op, timeout_s)

    def _reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        self._execute("reduce", self._cut("reduce", tensor), op, timeout_s, dst)

    def _broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        self._execute("broadcast", self._cut("broadcast", tensor), ReduceOp.SUM, timeout_s, src)

    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        blocks = self._blocks_of(output)
        if blocks[self.rank].data_ptr() != input.data_ptr():
            blocks[self.rank].copy_(input.view(-1))
        self._execute("all_gather", blocks, ReduceOp.SUM, timeout_s)

    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        blocks = self._blocks_of(self._scratch.copy_of("input", input))
        self._execute("reduce_scatter", blocks, op, timeout_s)
        output.view(-1).copy_(blocks[self.rank])

    def _gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        blocks = self._root_blocks(output, input)
        if output is not None:
            blocks[self.rank].copy_(input.view(-1))
        self._execute("gather", blocks, ReduceOp.SUM, timeout_s, dst)

    def _scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        blocks = self._root_blocks(input, output)
        self._execute("scatter", blocks, ReduceOp.SUM, timeout_s, src)
        if input is not None:
            output.view(-1).copy_(blocks[self.rank])

    def _all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        sent, received = self._blocks_of(input), self._blocks_of(output)
        received[self.rank].copy_(sent[self.rank])
        num_extra = chunks_of(self.schedules["all_to_all"], "all_to_all", self.world_size) - 2 * self.world_size
        extra = self._scratch.pieces("extra", [sent[0].numel()] * num_extra, input)
        self._execute("all_to_all", [*sent, *received, *extra], ReduceOp.SUM, timeout_s)

    def _barrier(self, timeout_s: float) -> None:
        tokens = self._scratch.take("barrier", 2, torch.uint8, self.device_type)
        self._execute("barrier", [tokens[:1], tokens[1:]], ReduceOp.SUM, timeout_s)

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        channel = self._new_channel()
        ranks = next((group for group in groups if self.rank in group), None)
        return None if ranks is None else GroupCommunicator(self, ranks, channel)

    def _cut(self, collective: str, tensor: Tensor) -> Sequence[Tensor]:
        """Cut into chunks, the first ones larger by one element where it does not divide."""
        count = chunks_of(self.schedules[collective], collective, self.world_size)
        return torch.tensor_split(tensor.view(-1), count) if count > 1 else (tensor.view(-1),)

    def _blocks_of(self, tensor: Tensor) -> Sequence[Tensor]:
        return torch.tensor_split(tensor.view(-1), self.world_size)

    def _root_blocks(self, many: Tensor | None, one: Tensor) -> Sequence[Tensor]:
        return [one.view(-1)] * self.world_size if many is None else self._blocks_of(many)

    # The executor -----------------------------------------------------------------------------

    def _steps(self, collective: str, *root: int) -> Iterator[Step]:
        return self.schedules[collective](self.rank, self.world_size, *root)

    def _execute(self, collective: str, chunks: Sequence[Tensor], op: ReduceOp, timeout_s: float, *root: int) -> None:
        """Run this rank's steps on the memory in ``chunks``; each chunk is 1-d and contiguous."""
        steps, deadline = self._steps(collective, *root), time.monotonic() + timeout_s
        step, early = next(steps, None), None
        while step is not None:
            remaining = max(deadline - time.monotonic(), 1e-3)
            arrivals = self._post_receives(step, chunks, remaining) if early is None else early
            sent = self._post_sends(step, chunks, remaining)
            following, early = next(steps, None), None
            is_early = following is not None and _can_be_early(following, step, len(sent))
            if is_early or _touched(step, Send) & _touched(step, Reduce):
                for work in sent:
                    work.wait()
            if following is not None and is_early:
                early = self._post_receives(following, chunks, remaining)
            take(arrivals, self.rank, op)
            for work in sent:
                work.wait()
            step = following

    def _post_receives(self, step: Step, chunks: Sequence[Tensor], timeout_s: float) -> list[Arrival]:
        coming = [
            (m, runs) for m in step if not isinstance(m, Send) for runs in messages(chunks, m, self.segment_bytes)
        ]
        staged = [sum(run.numel() for run in runs) for m, runs in coming if isinstance(m, Reduce) or len(runs) > 1]
        self._turn = 1 - self._turn  # what arrives early must not overwrite what is being reduced
        scratch = self._scratch.pieces(f"arriving{self._turn}", staged, chunks[0])
        arrivals = []
        for move, runs in coming:
            in_place = isinstance(move, Recv) and len(runs) == 1
            message = runs[0] if in_place else next(scratch)
            work = self._irecv(message, move.peer, self._tag(TAG), timeout_s)
            arrivals.append(Arrival(work, move, message, () if in_place else runs))
        return arrivals

    def _post_sends(self, step: Step, chunks: Sequence[Tensor], timeout_s: float) -> list[Work]:
        sends = [
            (m.peer, runs) for m in step if isinstance(m, Send) for runs in messages(chunks, m, self.segment_bytes)
        ]
        packed = [(peer, runs[0] if len(runs) == 1 else torch.cat(runs)) for peer, runs in sends]
        for _, message in packed:
            self.traffic.count(message.nbytes)
        return [self._isend(message, peer, self._tag(TAG), timeout_s) for peer, message in packed]


def _touched(step: Step, *kinds: type[Transfer]) -> set[int]:
    return {index for move in step if isinstance(move, kinds) for index in indices(move.chunk)}


def _can_be_early(following: Step, step: Step, num_sent: int) -> bool:
    """Whether the receives of ``following`` can be posted before ``step`` has ended, but for its sends.

    A peer's send then finds its receive waiting, which saves a message over most transports. Not where a message
    travels in segments: to wait for the sends first would leave no transfer to hide the reduction behind.
    """
    is_whole = num_sent <= sum(isinstance(move, Send) for move in step)
    return is_whole and not _touched(step, Recv, Reduce) & _touched(following, Recv)


class GroupCommunicator(ScheduledCommunicator):
    """Some ranks of a communicator as a communicator: the split of backends that have none of their own.

    The ranks ``ranks`` of ``parent``, in that order, on a channel of their own.

    It borrows the parent: closing it leaves the parent open, and the parent has to outlive it.
    """

    def __init__(self, parent: ScheduledCommunicator, ranks: list[int], channel: int) -> None:
        super().__init__(ranks.index(parent.rank), len(ranks), parent.timeout_s, parent.segment_bytes)
        self._parent, self._ranks = parent, ranks
        self._root, self._channel = parent._root, channel
        self.checks_sizes = parent.checks_sizes  # not the dtypes: its errors would name the ranks of the parent

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        return self._parent._isend(tensor, self._ranks[dst], tag, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        return self._parent._irecv(tensor, self._ranks[src], tag, timeout_s)

    def _abort(self, reason: str) -> None:
        self._parent.abort(reason)

    def _gone(self) -> Mapping[int, str]:
        gone = self._parent._gone()
        return {self._ranks.index(rank): why for rank, why in gone.items() if rank in self._ranks}

    def _translate(self, error: Exception) -> CommError:
        failure = self._parent._translate(error)
        if isinstance(error, ContactLostError) and isinstance(failure, PeerLostError):
            peers = tuple(self._ranks.index(rank) for rank in failure.peers if rank in self._ranks)
            return PeerLostError(f"rank {peers[0]} is gone: {LEFT}", peers) if peers else failure
        return failure
