"""Ranks as threads of one process: for tests, notebooks and teaching.

::

    def job(comm):
        tensor = torch.ones(3)
        comm.all_reduce(tensor)
        return tensor

    results = run_threads(job, world_size=4)

A message goes straight from the sender's tensor to the receiver's: whoever comes second copies.
Generators of random numbers, and all else that belongs to a process, are shared by the ranks.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from backends.contact import LEFT, ContactLostError, contact_lost
from backends.deadline import Deadline
from backends.scheduled import ScheduledCommunicator
from minidist.communicator import Work
from minidist.contract.envelope import received, to
from minidist.contract.rank import ANY_SOURCE
from minidist.contract.standing import Standing
from minidist.errors import BackendUnavailableError, CommError, MismatchError, PeerLostError
from minidist.launch import detect

T = TypeVar("T")
_this_thread = threading.local()  # its world and its rank, set by run_threads


class ThreadWorld:
    """The ranks of one process: hands out what their communicators share."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._lock = threading.Lock()
        self._boards: list[_Board] = []
        self._num_made = [0] * world_size

    def next_board(self, rank: int) -> _Board:
        """Return the board of the communicator that ``rank`` makes now; its k-th meets all k-th ones."""
        with self._lock:
            index = self._num_made[rank]
            self._num_made[rank] += 1
            if index == len(self._boards):
                self._boards.append(_Board(self.world_size))
            return self._boards[index]

    def leave(self, rank: int, why: str | None) -> None:
        """Tell every communicator that the thread of ``rank`` ended; ``why`` it failed, if it did."""
        with self._lock:
            for board in self._boards:
                board.leave(rank, why)


class _Board:
    """Where the halves of one communicator's messages find each other.

    Attributes:
        changed: notified of each message that is complete and of each rank that goes.
        left: ranks that are gone, for whatever reason.
        lost: those of them that failed and why, the first one first.
        standing_on: what tells how far a rank has come on a channel, by rank.
    """

    def __init__(self, world_size: int) -> None:
        self._ranks = range(world_size)
        self.standing_on: dict[int, Callable[[int], Standing | None]] = {}
        self.changed = threading.Condition()
        self.left: set[int] = set()
        self.lost: dict[int, str] = {}
        self._waiting: dict[tuple[int, int, int, bool], deque[_Half]] = defaultdict(deque)
        self._num_waited = 0
        self._made: Any = None

    def leave(self, rank: int, why: str | None) -> None:
        with self.changed:
            # The thread of a rank that closed its communicator may fail later: that is nothing to this communicator.
            if rank not in self.left and why is not None:
                self.lost[rank] = why
            self.left.add(rank)
            self.changed.notify_all()

    def once(self, make: Callable[[], T]) -> T:
        with self.changed:
            if self._made is None:
                self._made = make()
            made: T = self._made
            return made

    def post(self, half: _Half, src: int, dst: int, tag: int, is_send: bool) -> None:
        """Copy if the other half is there already, else leave this one to be found."""
        with self.changed:
            sources = (src, ANY_SOURCE) if is_send else self._ranks if src == ANY_SOURCE else (src,)
            other = self._take_first([(source, dst, tag, not is_send) for source in sources])
            if other is None:
                half.number = self._num_waited = self._num_waited + 1
                self._waiting[src, dst, tag, is_send].append(half)
                return
        # Both halves are in nobody else's hands now, so the copy needs no lock: other messages go on beside it.
        send, recv = (half, other) if is_send else (other, half)
        if send.tensor.numel() == recv.tensor.numel() and send.tensor.dtype == recv.tensor.dtype:
            recv.tensor.view(-1).copy_(send.tensor.view(-1))
        else:
            send.error, recv.error = _mismatch(send.tensor, recv.tensor, send.rank, dst)
        recv.peer = send.rank
        with self.changed:  # the copy, or the error, is there before either of them is done
            half.done = other.done = True
            self.changed.notify_all()

    def _take_first(self, keys: Iterable[tuple[int, int, int, bool]]) -> _Half | None:
        """Take what has waited longest under one of the keys, if anything has."""
        queues = [queue for key in keys if (queue := self._waiting.get(key))]
        return min(queues, key=lambda queue: queue[0].number).popleft() if queues else None


def _mismatch(source: Tensor, target: Tensor, src: int, dst: int) -> tuple[MismatchError, MismatchError]:
    """Return what the sender and what the receiver are told."""
    sent, expected = (source.numel(), source.dtype), (target.numel(), target.dtype)
    return MismatchError(to(dst, *sent, *expected)), MismatchError(received(src, *sent, *expected))


class _Half(Work):
    """A send, or a receive, that finishes when it has met its other half."""

    def __init__(self, comm: ThreadCommunicator, tensor: Tensor, peer: int, timeout_s: float) -> None:
        self._comm = comm
        self.rank = comm.rank
        self.number = 0
        self.tensor = tensor
        self._peer = peer
        self._deadline = Deadline(timeout_s)
        self.done = False
        self.error: MismatchError | None = None

    def wait(self) -> None:
        changed = self._comm.board.changed
        with changed:
            while not self.done:
                if error := self._comm.why_hopeless(self._peer, self._deadline):
                    raise error
                changed.wait(self._deadline.left_s)
        if self.error is not None:
            raise self.error

    def is_done(self) -> bool:
        return self.done or self._comm.why_hopeless(self._peer, self._deadline) is not None

    def exception(self) -> BaseException | None:
        return self.error


class ThreadCommunicator(ScheduledCommunicator):
    """One rank per thread of `run_threads`; a world of its own outside of it.

    Args:
        timeout_s, segment_bytes: see `ScheduledCommunicator`.
    """

    launcher: ClassVar[str] = "thread"
    checks_sizes = checks_dtypes = receives_from_any = True
    tag_bits = 31

    def __init__(self, timeout_s: float = 300.0, segment_bytes: int = 2**22) -> None:
        place = getattr(_this_thread, "place", None)
        if place is None:
            self.check_available()
        world, rank = place or (ThreadWorld(1), 0)
        super().__init__(rank, world.world_size, timeout_s, segment_bytes)
        self.board = world.next_board(rank)
        self.board.standing_on[rank] = self._standing

    @classmethod
    def check_available(cls) -> None:
        world = detect()
        if world.world_size > 1:
            raise BackendUnavailableError(
                f"thread has its ranks in one process, but {world.launcher} started {world.world_size}, and each would "
                "train alone; start with python, or choose comm=gloo or another that communicates"
            )

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        half = _Half(self, tensor, dst, timeout_s)
        self.board.post(half, self.rank, dst, tag, is_send=True)
        return half

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        half = _Half(self, tensor, src, timeout_s)
        self.board.post(half, src, self.rank, tag, is_send=False)
        return half

    def shared(self, make: Callable[[], T]) -> T:
        """Return one object for all ranks, which the first one to ask makes; every rank asks with the same ``make``."""
        return self.board.once(make)

    def why_hopeless(self, peer: int, deadline: Deadline) -> Exception | None:
        """Return why to wait for ``peer`` any longer is hopeless, if it is."""
        if self.board.lost:
            return self._lost()
        return contact_lost(peer, self.board.left, self.world_size) or deadline.missed_by(peer)

    def _close(self) -> None:
        self._leave(None)

    def _abort(self, reason: str) -> None:
        self._leave(reason)

    def _leave(self, reason: str | None) -> None:
        standings = {channel: self._standing(channel) for channel in self._channels}
        self.board.standing_on[self.rank] = standings.get  # the board may outlive the communicator
        self.board.leave(self.rank, reason)

    def _standings(self, channel: int, timeout_s: float) -> Mapping[int, Standing]:
        """All are in this process, so that none needs to be asked."""
        found = {rank: standing_on(channel) for rank, standing_on in self.board.standing_on.copy().items()}
        return {rank: standing for rank, standing in found.items() if standing is not None}

    def _gone(self) -> Mapping[int, str]:
        return self.board.lost

    def _translate(self, error: Exception) -> CommError:
        if isinstance(error, ContactLostError):
            return PeerLostError(f"rank {error.peer} is gone: {LEFT}", (error.peer,))
        return super()._translate(error)


def run_threads(job: Callable[[ThreadCommunicator], T], world_size: int, timeout_s: float = 300.0) -> list[T]:
    """Run ``job(comm)`` on ``world_size`` ranks, each in a thread, and return what they return, by rank.

    Raises:
        Exception: what the first rank to fail raised; the others are told, and end.
    """
    return spawn_threads(lambda: _with_communicator(job, timeout_s), world_size)


def _with_communicator(job: Callable[[ThreadCommunicator], T], timeout_s: float) -> T:
    with ThreadCommunicator(timeout_s) as comm:
        return job(comm)


def spawn_threads(job: Callable[[], T], world_size: int) -> list[T]:
    """Like `run_threads`, for a ``job()`` that makes its `ThreadCommunicator` itself."""
    world = ThreadWorld(world_size)
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        _this_thread.place = (world, rank)
        try:
            results[rank] = job()
        except BaseException as error:  # raised again below, in the thread of the caller
            failures.append(error)
            world.leave(rank, f"{type(error).__name__}: {error}")
        else:
            world.leave(rank, None)

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank{rank}", daemon=True) for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(world_size)]
