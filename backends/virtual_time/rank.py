"""A rank whose operations take virtual time: what a virtual communicator and its splits have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from backends.deadline import Deadline
from backends.thread import ThreadCommunicator
from backends.virtual_time.clock import Hand, Times, VirtualClock
from backends.virtual_time.meeting import Meeting, Part
from backends.virtual_time.turn import Turns
from backends.wrapper import Wrapper
from minidist.collective import Run
from minidist.communicator import Communicator, ReduceOp, Traffic, Work
from minidist.contract.rank import ANY_SOURCE


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        line: what all ranks of the process talk over.
        ranks: the numbers there of the ranks of this communicator.
        meeting: where those meet.
        clock: this rank's.
        turns: who may compute.
    """

    line: ThreadCommunicator
    ranks: Sequence[int]
    meeting: Meeting
    clock: VirtualClock
    turns: Turns


class VirtualRank(Wrapper):
    """A rank of threads on a clock of its own; `backends.virtual.VirtualCommunicator` makes those of a whole process.

    Args:
        inner: what moves its messages.
        place: where it is.

    Attributes:
        place: see above.
        free_at: when all that this rank has started has ended.
    """

    def __init__(self, inner: Communicator, place: Place) -> None:
        super().__init__(inner)
        self.place = place
        self.clock = place.clock
        self.traffic = Traffic()  # whose seconds are virtual
        self.free_at: Times = np.zeros_like(place.clock.own.at)
        self._splits: list[VirtualRank] = []

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Let what is inside take no virtual time, after what is on its way has been sent. All ranks do it together."""
        for one in self._with_splits():
            with self.place.turns.let_go():
                super(VirtualRank, one)._dispatch(_nothing, False)
        hand = self.place.clock.computed()
        before = hand.at, hand.waited
        free = [(one, one.free_at) for one in self._with_splits()]
        try:
            yield
        finally:
            hand.leave_out()
            hand.at, hand.waited = before
            for one, free_at in free:
                one.free_at = free_at

    def _with_splits(self) -> Iterator[VirtualRank]:
        yield self
        for split in self._splits:
            yield from split._with_splits()

    def _collective(self, name: str) -> Callable[..., None]:
        num_tensors = 0 if name == "barrier" else 1 if name in ("all_reduce", "reduce", "broadcast") else 2

        def run(*given: object) -> None:
            tensors = [tensor for tensor in given[:num_tensors] if isinstance(tensor, Tensor)]
            rest = given[num_tensors:]
            root = next((value for value in rest[:-1] if isinstance(value, int)), 0)
            op = next((value for value in rest if isinstance(value, ReduceOp)), ReduceOp.SUM)
            self._meet(Run(name, self.world_size, root), op, tensors, float(rest[-1]))  # type: ignore[arg-type]

        return run

    def _meet(self, run: Run, op: ReduceOp, tensors: Sequence[Tensor], timeout_s: float) -> None:
        hand = self.place.clock.computed()
        part = Part(run, op, tensors, hand.at)
        deadline = Deadline(timeout_s)

        def wait(missing: int) -> None:
            if error := self.place.line.why_hopeless(self.place.ranks[missing], deadline):
                raise error
            self.place.line.board.changed.wait(deadline.left_s)

        with self.place.turns.let_go():
            ends = self.place.meeting.join(self.rank, part, wait)
        messages, numel = self.place.meeting.costs.sent(run, self.rank, part.numel)
        self.traffic.count(numel * (tensors[0].element_size() if tensors else 1), messages)
        hand.leave_out()
        hand.wait_until(ends)

    def _dispatch(self, run: Callable[[], None], async_op: bool) -> Work:
        if self._progress.in_job:  # a part of the operation that runs, at its time
            return super()._dispatch(run, async_op)
        if async_op:
            self.place.clock.starts()
        operation = _Operation(self, run)
        work = _Waited(
            self, super()._dispatch(operation.run, async_op), operation, None if async_op else operation.begins
        )
        if not async_op:
            work.wait()
        return work

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        at = self.place.meeting.send(self.rank, dst, tag, tensor.nbytes, self.place.clock.computed().at)
        return _Message(self, super()._isend(tensor, dst, tag, timeout_s), lambda: at)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        work = super()._irecv(tensor, src, tag, timeout_s)

        def arrives() -> Times:
            peer = work.peer if src == ANY_SOURCE else src
            assert peer is not None  # a message has come, and from somebody
            return self.place.meeting.receive(peer, self.rank, tag)

        return _Message(self, work, arrives)

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        meetings = self.place.meeting.split(self.rank, groups)
        child = self._inner.split(groups)
        if child is None:
            return None
        index = next(index for index, group in enumerate(groups) if self.rank in group)
        ranks = [self.place.ranks[rank] for rank in groups[index]]
        self._splits.append(VirtualRank(child, replace(self.place, ranks=ranks, meeting=meetings[index])))
        return self._splits[-1]

    def _abort(self, reason: str) -> None:
        self.place.turns.end()
        super()._abort(reason)


def _nothing() -> None:
    return


class _Operation:
    """One operation: it begins when its rank has started it and the one before it has ended.

    Attributes:
        begins, ends: when; it ends when `run` has.
    """

    def __init__(self, comm: VirtualRank, run: Callable[[], None]) -> None:
        self._comm = comm
        self._run = run
        self.begins = self.ends = comm.place.clock.computed().at

    def run(self) -> None:
        """Run it here, on the rank's own hand, or on another one in the thread for what goes on in the background."""
        clock = self._comm.place.clock
        if self._comm._progress.serving:
            clock.lay_hand(Hand(self.begins))
        hand = clock.computed()
        hand.wait_until(self._comm.free_at)
        try:
            self._run()
        finally:
            self.ends = self._comm.free_at = clock.computed().at


class _Timed(Work):
    """What its rank waits for in real time, and then in virtual time."""

    def __init__(self, comm: VirtualRank, work: Work) -> None:
        self._comm = comm
        self._work = work

    def _wait_beneath(self) -> Hand:
        """Wait in real time, which takes no virtual time, while others may compute; return this rank's hand."""
        place = self._comm.place
        hand = place.clock.computed()
        with place.turns.let_go():
            self._work.wait()
        hand.leave_out()
        return hand

    def is_done(self) -> bool:
        if not self._work.is_done():
            self._comm.place.turns.pass_on()
        return self._work.is_done()

    def exception(self) -> BaseException | None:
        return self._work.exception()


class _Waited(_Timed):
    """An operation that takes its rank the time until it ends, or what is left of it.

    Args:
        comm: whose it is.
        work: it, beneath.
        operation: when it ends.
        blocked_since: from when on its rank waits; None if not before it says so.
    """

    def __init__(self, comm: VirtualRank, work: Work, operation: _Operation, blocked_since: Times | None) -> None:
        super().__init__(comm, work)
        self._operation = operation
        self._blocked_since = blocked_since

    def wait(self) -> None:
        hand = self._wait_beneath()
        before = hand.at if self._blocked_since is None else self._blocked_since
        hand.wait_until(self._operation.ends)
        self._blocked_since = None
        self._comm.traffic.blocked_seconds += float((hand.at - before)[0])

    def on_done(self, callback: Callable[[], None]) -> None:
        self._work.on_done(callback)


class _Message(_Timed):
    """A message that takes its rank the time until it arrives."""

    def __init__(self, comm: VirtualRank, work: Work, arrives: Callable[[], Times]) -> None:
        super().__init__(comm, work)
        self._arrives = arrives
        self._at: Times | None = None

    def wait(self) -> None:
        hand = self._wait_beneath()
        self.peer = self._work.peer
        if self._at is None:
            self._at = self._arrives()
        hand.wait_until(self._at)
