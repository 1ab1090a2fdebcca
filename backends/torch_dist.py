"""Gloo and NCCL through torch.distributed's process groups, with their native collectives.

The process groups are made directly, without torch's global default group, so that several can exist
one after the other in one process. Gloo itself reports at most that some connection closed, and goes on
waiting for ranks that wait for the dead one; which rank is gone the lifeline of `ProcessCommunicator` knows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from backends.processes import Place, ProcessCommunicator
from minidist import launch
from minidist.communicator import ReduceOp, Work
from minidist.errors import BackendUnavailableError, CommError, CommTimeoutError

OPS = {
    ReduceOp.SUM: dist.ReduceOp.SUM,
    ReduceOp.MIN: dist.ReduceOp.MIN,
    ReduceOp.MAX: dist.ReduceOp.MAX,
    ReduceOp.PRODUCT: dist.ReduceOp.PRODUCT,
}
NEWS_S = 3.0
"""How long to wait for the name of the rank that is gone, after the data path broke."""


class TorchDistCommunicator(ProcessCommunicator):
    """What the process groups of torch.distributed have in common."""

    def __init__(self, timeout_s: float = 300.0, segment_bytes: int = 2**22, place: Place | None = None) -> None:
        self._group: Any = None  # a rank can be lost before it is made
        super().__init__(timeout_s, segment_bytes, place)
        self._group = self._make_group(dist.PrefixStore("group", self._store))

    def _make_group(self, store: dist.Store) -> Any:
        raise NotImplementedError

    def _finish(self, work: Any, tensor: Tensor | None, timeout_s: float) -> None:
        """Wait for a collective to which this rank contributed ``tensor``."""
        self.traffic.count(0 if tensor is None else tensor.nbytes)
        self._wait(work, timeout_s)

    def _wait(self, work: Any, timeout_s: float) -> None:
        raise NotImplementedError

    # Collectives ------------------------------------------------------------------------------

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        options = _options(c10d.AllreduceOptions(), timeout_s, reduceOp=OPS[op])
        self._finish(self._group.allreduce([_reducible(tensor)], options), tensor, timeout_s)

    def _reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        options = _options(c10d.ReduceOptions(), timeout_s, reduceOp=OPS[op], rootRank=dst)
        self._finish(self._group.reduce([_reducible(tensor)], options), tensor, timeout_s)

    def _broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        options = _options(c10d.BroadcastOptions(), timeout_s, rootRank=src)
        self._finish(self._group.broadcast([_bytes(tensor)], options), tensor, timeout_s)

    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        options = _options(c10d.AllgatherOptions(), timeout_s)
        self._finish(self._group._allgather_base(_bytes(output), _bytes(input), options), input, timeout_s)

    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        options = _options(c10d.ReduceScatterOptions(), timeout_s, reduceOp=OPS[op])
        work = self._group._reduce_scatter_base(_reducible(output), _reducible(input), options)
        self._finish(work, input, timeout_s)

    def _gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        options = _options(c10d.GatherOptions(), timeout_s, rootRank=dst)
        outputs = [] if output is None else [list(_bytes(output).view(self.world_size, -1))]
        self._finish(self._group.gather(outputs, [_bytes(input)], options), input, timeout_s)

    def _scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        options = _options(c10d.ScatterOptions(), timeout_s, rootRank=src)
        inputs = [] if input is None else [list(_bytes(input).view(self.world_size, -1))]
        self._finish(self._group.scatter([_bytes(output)], inputs, options), input, timeout_s)

    def _all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        options = _options(c10d.AllToAllOptions(), timeout_s)
        work = self._group.alltoall_base(_bytes(output), _bytes(input), [], [], options)
        self._finish(work, input, timeout_s)

    def _barrier(self, timeout_s: float) -> None:
        self._finish(self._group.barrier(_options(c10d.BarrierOptions(), timeout_s)), None, timeout_s)

    # Life -------------------------------------------------------------------------------------

    def _close(self) -> None:
        super()._close()
        self._group = None

    def _translate(self, error: Exception) -> CommError:
        """Name the rank behind a broken connection; the lifeline hears of it within moments."""
        if not isinstance(error, RuntimeError):
            return super()._translate(error)
        self._lifeline.wait_for_news(NEWS_S)
        self._report_left()
        if self._lifeline.lost:
            return self._lost()
        return super()._translate(error)


class GlooCommunicator(TorchDistCommunicator):
    """Gloo over TCP, for tensors in host memory."""

    def _make_group(self, store: dist.Store) -> Any:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        # The host name of a machine need not lead back to it, so on one host it is not used.
        device = gloo.create_device(hostname="127.0.0.1") if self._meeting.one_host else gloo.create_default_device()
        options._devices = [device]
        options._threads = 1  # operations finish in the order in which they were started
        options._timeout = timedelta(seconds=self.timeout_s)
        return gloo(store, self.rank, self.world_size, options)

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        return _GlooMessage(self, self._group.send([_bytes(tensor)], dst, tag), tensor, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        return _GlooMessage(self, self._group.recv([_bytes(tensor)], src, tag), tensor, timeout_s)

    def _wait(self, work: Any, timeout_s: float) -> None:
        started = time.monotonic()
        try:
            work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            # A rank whose time is up closes its connections, which can reach us before our own time is up.
            if time.monotonic() - started > 0.8 * timeout_s:
                raise CommTimeoutError(f"no answer within {timeout_s:g} s; a rank did not take part") from error
            raise

    def _interrupt(self) -> None:
        """Break this rank's connections: a receive that times out is all that makes Gloo do so."""
        group = self._group
        if group is not None and self.world_size > 1:
            peer = (self.rank + 1) % self.world_size
            try:
                group.recv([torch.empty(1, device="cpu")], peer, 2**31 - 1).wait(timedelta(milliseconds=1))
            except RuntimeError:
                return  # as intended


class _GlooMessage(Work):
    """A send or receive. Gloo says only to one who waits whether it has ended, so who polls has a thread that waits."""

    def __init__(self, comm: GlooCommunicator, work: Any, tensor: Tensor, timeout_s: float) -> None:
        self._comm, self._work, self._tensor = comm, work, tensor
        self._deadline, self._timeout_s = time.monotonic() + timeout_s, timeout_s
        self._ended: Future[None] | None = None

    def wait(self) -> None:
        if self._ended is None:
            self._ended = Future()
            self._await(self._ended)
        self._ended.result()

    def _await(self, ended: Future[None]) -> None:
        try:
            self._comm._wait(self._work, max(self._deadline - time.monotonic(), 1e-3))
        except BaseException as error:  # whatever it is belongs to the one who waits
            ended.set_exception(error)
        else:
            ended.set_result(None)

    def is_done(self) -> bool:
        if self._ended is None:
            self._ended = Future()
            threading.Thread(target=self._await, args=(self._ended,), daemon=True).start()
        return self._ended.done()

    def exception(self) -> BaseException | None:
        return self._ended.exception() if self._ended is not None and self._ended.done() else None


class NcclCommunicator(TorchDistCommunicator):
    """NCCL, for CUDA tensors, one GPU per rank.

    Operations run on streams of their own. ``wait()`` blocks the host until the result is there, because only
    the host can tell that an operation failed; until then the host is free.
    """

    device_type: ClassVar[str] = "cuda"

    def __init__(self, timeout_s: float = 300.0, segment_bytes: int = 2**22, place: Place | None = None) -> None:
        self.check_available()
        torch.cuda.set_device(launch.detect().local_rank)
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._running: list[Any] = []
        self._batch = _Batch(self)
        super().__init__(timeout_s, segment_bytes, place)

    @classmethod
    def check_available(cls) -> None:
        num_gpus, num_ranks = torch.cuda.device_count(), launch.detect().local_world_size
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
        caller = torch.cuda.current_stream()
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            run()
            work = _StreamWork(self, run, self._running, self._stream.record_event())
        self._running = []
        if not async_op:
            work.wait()
        return work

    def _wait(self, work: Any, timeout_s: float) -> None:
        work.wait()  # only the current stream waits
        self._running.append((work, timeout_s))

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        return self._batch.add(self._group.send, tensor, dst, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        return self._batch.add(self._group.recv, tensor, src, timeout_s)

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
        self._comm, self._run, self._works, self._event = comm, run, works, done
        self._error: CommError | None = None

    def wait(self) -> None:
        started = time.perf_counter()
        try:
            while self._works:
                work, timeout_s = self._works[0]
                work.wait(timedelta(seconds=timeout_s))
                del self._works[0]
        except RuntimeError as error:
            self._comm._fail("wait", error)
        finally:
            self._comm.traffic.add_blocked(time.perf_counter() - started)
        torch.cuda.current_stream().wait_event(self._event)
        self._run = _nothing

    def is_done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def exception(self) -> BaseException | None:
        return self._error


class _Batch(Work):
    """Messages that are posted together at the first wait.

    NCCL runs the messages of a pair of ranks in the order in which they were posted, so two ranks that both
    send first would wait for each other; in one group they do not. It matches by order, not by tag.
    """

    def __init__(self, comm: NcclCommunicator) -> None:
        self._comm = comm
        self._messages: list[tuple[Callable[..., Any], Tensor, int]] = []
        self._posted = False
        self._timeout_s = 0.0

    def add(self, start: Callable[..., Any], tensor: Tensor, peer: int, timeout_s: float) -> Work:
        self._messages.append((start, _bytes(tensor), peer))
        self._timeout_s = max(self._timeout_s, timeout_s)
        return self

    def wait(self) -> None:
        if self._posted:
            return
        self._posted = True
        self._comm._batch = _Batch(self._comm)
        group, device = self._comm._group, torch.device("cuda", torch.cuda.current_device())
        group._start_coalescing(device)
        for start, tensor, peer in self._messages:
            start([tensor], peer, 0)
        self._comm._wait(group._end_coalescing(device), self._timeout_s)

    def is_done(self) -> bool:
        return self._posted

    def exception(self) -> BaseException | None:
        return None


def _nothing() -> None: ...


def _options(options: Any, timeout_s: float, **values: object) -> Any:
    options.timeout = timedelta(seconds=timeout_s)
    for name, value in values.items():
        setattr(options, name, value)
    return options


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor that is only moved, whatever its dtype is."""
    return tensor.view(-1).view(torch.uint8)


def _reducible(tensor: Tensor) -> Tensor:
    """A tensor as the library reduces it: in one dimension, and bool as bytes, which have the same order."""
    return tensor.view(-1).view(torch.uint8) if tensor.dtype == torch.bool else tensor.view(-1)
