"""NCCL through torch.distributed's process group."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from backends.deadline import timed_out
from backends.processes.lifeline import OUTAGE_S
from backends.processes.rendezvous import meet
from backends.torch_dist.gloo import TorchDistCommunicator
from minidist import launch
from minidist.communicator import Work
from minidist.contract.carriers import bytes_of
from minidist.contract.envelope import is_piece
from minidist.contract.place import Place
from minidist.errors import BackendUnavailableError, CommError


class NcclCommunicator(TorchDistCommunicator):
    """NCCL, for CUDA tensors, one GPU per rank.

    Operations run on streams of their own. ``wait()`` blocks the host until the result is there, because only
    the host can tell that an operation failed; until then the host is free.
    """

    device_type: ClassVar[str] = "cuda"

    def __init__(
        self,
        timeout_s: float = 300.0,
        segment_bytes: int = 2**22,
        place: Place | None = None,
        outage_s: float = OUTAGE_S,
    ) -> None:
        if place is None:
            self.check_available()
            torch.cuda.set_device(meet(timeout_s).world.local_rank)
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._running: list[Any] = []
        # The pieces of a message are posted after its envelope was seen: NCCL itself does not tell a wrong size.
        self._batches = [_Batch(self, 0), _Batch(self, 1)]
        super().__init__(timeout_s, segment_bytes, place, outage_s)

    @classmethod
    def check_available(cls) -> None:
        num_gpus = torch.cuda.device_count()
        num_ranks = launch.detect().local_world_size
        if not torch.cuda.is_available() or not dist.is_nccl_available():
            raise BackendUnavailableError(
                "nccl needs an NVIDIA GPU that torch can use, and here is none; use comm=gloo"
            )
        if num_ranks > num_gpus:
            raise BackendUnavailableError(
                f"nccl needs one GPU per rank, but this host has {num_gpus} for {num_ranks} ranks; "
                "start fewer, or use comm=gloo"
            )

    def _make_group(self, store: dist.Store) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        # NCCL's watchdog ends the process; it is the last resort, behind the timeouts of _StreamWork.
        options._timeout = timedelta(seconds=2 * self.timeout_s + 60)
        return dist.ProcessGroupNCCL(store, self.rank, self.world_size, options)

    def _dispatch(self, run: Callable[[], None], async_op: bool) -> Work:
        for batch in list(self._batches):  # a peer may need them to come to this operation
            batch.post()
        caller = torch.cuda.current_stream()
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            run()
            work = _StreamWork(self, run, self._running, self._stream.record_event())
        self._running = []
        if not async_op:
            work.wait()
        return work

    def wait_for(self, work: Any, timeout_s: float) -> None:
        work.wait()  # only the current stream waits
        self._running.append((work, timeout_s))

    def wait_on_host(self, work: Any, timeout_s: float) -> None:
        """Block until ``work`` is done."""
        started = time.monotonic()
        try:
            work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            if time.monotonic() - started < timeout_s:
                raise
            raise timed_out(timeout_s) from error

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        return self._batches[is_piece(self, tag)].add(self._group.send, tensor, dst, tag, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        return self._batches[is_piece(self, tag)].add(self._group.recv, tensor, src, tag, timeout_s)

    def _interrupt(self) -> None:
        if self._group is not None:
            self._group.abort()

    def _close(self) -> None:
        group = self._group
        super()._close()
        group.shutdown()


class _StreamWork(Work):
    """Operations that were handed to the GPU."""

    def __init__(
        self, comm: NcclCommunicator, run: Callable[[], None], works: list[tuple[Any, float]], done: torch.cuda.Event
    ) -> None:
        self._comm = comm
        self._run = run
        self._works = works
        self._event = done
        self._error: CommError | None = None

    def wait(self) -> None:
        if self._error is not None:
            raise self._error
        started = time.perf_counter()
        try:
            self._wait_for_all()
        except CommError as error:
            self._error = error
            raise
        finally:
            self._comm.traffic.add_blocked(time.perf_counter() - started)
        torch.cuda.current_stream().wait_event(self._event)
        self._run = _nothing

    def _wait_for_all(self) -> None:
        try:
            while self._works:
                self._comm.wait_on_host(*self._works[0])
                del self._works[0]
        except RuntimeError as error:
            self._comm._fail("wait", error)

    def is_done(self) -> bool:
        return self._error is not None or bool(self._comm._gone()) or bool(self._event.query())  # type: ignore[no-untyped-call]

    def exception(self) -> BaseException | None:
        if self._error is None and self._works and self.is_done():
            with contextlib.suppress(CommError):  # kept by wait
                self.wait()
        return self._error


class _Batch(Work):
    """Messages that are posted together, when the first of them is waited or asked for.

    NCCL runs the messages of a pair of ranks in the order in which they were posted, so two ranks that both
    send first would wait for each other; in one group they do not. It matches by order, not by tag.
    """

    def __init__(self, comm: NcclCommunicator, place: int) -> None:
        self._comm = comm
        self._place = place
        self._messages: list[tuple[Callable[..., Any], Tensor, int]] = []
        self._timeout_s = 0.0
        self.work: Any = None

    def add(self, start: Callable[..., Any], tensor: Tensor, peer: int, tag: int, timeout_s: float) -> Work:
        """Take a message in; only the stream waits for those of a schedule, the host for a user's."""
        self._messages.append((start, bytes_of(tensor), peer))
        self._timeout_s = max(self._timeout_s, timeout_s)
        is_scheduled = (tag + 1) % (1 << self._comm.tag_bits) == 0
        return self if is_scheduled else _NcclMessage(self._comm, self, timeout_s)

    def post(self) -> None:
        """Start all messages that were added; later ones go into the next batch."""
        if self.work is not None or not self._messages:
            return
        self._comm._batches[self._place] = _Batch(self._comm, self._place)
        group = self._comm._group
        device = torch.device("cuda", torch.cuda.current_device())
        group._start_coalescing(device)
        for start, tensor, peer in self._messages:
            start([tensor], peer, 0)
        self.work = group._end_coalescing(device)

    def wait(self) -> None:
        if self.work is None:
            self.post()
            self._comm.wait_for(self.work, self._timeout_s)

    def is_done(self) -> bool:
        self.post()
        return bool(self.work.is_completed())

    def exception(self) -> BaseException | None:
        return None


class _NcclMessage(Work):
    """A message of the user: who waits for it waits until it has come, or until its time is up."""

    def __init__(self, comm: NcclCommunicator, batch: _Batch, timeout_s: float) -> None:
        self._comm = comm
        self._batch = batch
        self._deadline = time.monotonic() + timeout_s
        self._error: Exception | None = None

    def wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._batch.post()
        try:
            self._comm.wait_on_host(self._batch.work, max(self._deadline - time.monotonic(), 1e-3))
        except RuntimeError as error:
            self._error = error
            raise

    def is_done(self) -> bool:
        return self._error is not None or self._batch.is_done() or time.monotonic() > self._deadline

    def exception(self) -> BaseException | None:
        return self._error


def _nothing() -> None: ...
