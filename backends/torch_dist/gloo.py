"""torch.distributed's process groups with their native collectives, and Gloo; NCCL is in nccl.py.

The process groups are made directly, without torch's global default group, so that several can exist
one after the other in one process. Gloo itself reports at most that some connection closed, and goes on
waiting for ranks that wait for the dead one; which rank is gone the lifeline of `ProcessCommunicator` knows.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from backends.contact import ContactLostError
from backends.deadline import Deadline, timed_out
from backends.processes.agreement import Agreement
from backends.processes.communicator import ProcessCommunicator
from backends.processes.lifeline import OUTAGE_S
from backends.processes.offer import Offer
from backends.processes.signature import MEETING, pack
from backends.torch_dist.gloo_messages import GlooMessage, GlooSend
from minidist.communicator import ReduceOp, Work
from minidist.contract.addresses import LOOPBACK
from minidist.contract.carriers import bytes_of
from minidist.contract.forks import kept_in_forks, never_destroy
from minidist.contract.place import Place, from_everyone
from minidist.errors import CommClosedError, CommError, CommTimeoutError

OPS = {
    ReduceOp.SUM: dist.ReduceOp.SUM,
    ReduceOp.MIN: dist.ReduceOp.MIN,
    ReduceOp.MAX: dist.ReduceOp.MAX,
    ReduceOp.PRODUCT: dist.ReduceOp.PRODUCT,
}
"""What both libraries have; the others run as schedules."""
NEWS_S = 3.0
"""How long to wait for the name of the rank that is gone, after the data path broke."""
GRACE_S = 1.0
"""How long what waits may take to end by itself, after the connections were broken or the time was up."""


class TorchDistCommunicator(ProcessCommunicator):
    """What the process groups of torch.distributed have in common."""

    def __init__(
        self,
        timeout_s: float = 300.0,
        segment_bytes: int = 2**22,
        place: Place | None = None,
        outage_s: float = OUTAGE_S,
    ) -> None:
        self._group: Any = None  # a rank can be lost before it is made
        super().__init__(timeout_s, segment_bytes, place, outage_s)
        try:
            self._connect()
        except RuntimeError as error:
            self._fail("connect", error)
        # A rank that closed at once would break the connections of one that is still making its own.
        connected = dist.PrefixStore("connected", self._store)
        from_everyone(connected, self.rank, self.world_size, "", self._start.left_s, self._gone())

    def _connect(self) -> None:
        self._group = kept_in_forks(self._make_group(dist.PrefixStore("group", self._store)))

    def _make_group(self, store: dist.Store) -> Any:
        raise NotImplementedError

    def _finish(self, work: Any, tensor: Tensor | None, timeout_s: float) -> None:
        """Wait for a collective to which this rank contributed ``tensor``."""
        self.traffic.count(0 if tensor is None else tensor.nbytes)
        self.wait_for(work, timeout_s)

    def wait_for(self, work: Any, timeout_s: float) -> None:
        """Wait for what the library has started, no longer than that."""
        raise NotImplementedError

    # Collectives ------------------------------------------------------------------------------

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        if op not in OPS:
            return super()._all_reduce(tensor, op, timeout_s)
        options = _options(c10d.AllreduceOptions(), timeout_s, reduceOp=OPS[op])
        self._finish(self._group.allreduce([_reducible(tensor)], options), tensor, timeout_s)

    def _reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        if op not in OPS:
            return super()._reduce(tensor, dst, op, timeout_s)
        options = _options(c10d.ReduceOptions(), timeout_s, reduceOp=OPS[op], rootRank=dst)
        self._finish(self._group.reduce([_reducible(tensor)], options), tensor, timeout_s)

    def _broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        options = _options(c10d.BroadcastOptions(), timeout_s, rootRank=src)
        self._finish(self._group.broadcast([bytes_of(tensor)], options), tensor, timeout_s)

    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        options = _options(c10d.AllgatherOptions(), timeout_s)
        self._finish(self._group._allgather_base(bytes_of(output), bytes_of(input), options), input, timeout_s)

    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        if op not in OPS:
            return super()._reduce_scatter(output, input, op, timeout_s)
        options = _options(c10d.ReduceScatterOptions(), timeout_s, reduceOp=OPS[op])
        work = self._group._reduce_scatter_base(_reducible(output), _reducible(input), options)
        self._finish(work, input, timeout_s)

    def _gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        options = _options(c10d.GatherOptions(), timeout_s, rootRank=dst)
        outputs = [] if output is None else [list(bytes_of(output).view(self.world_size, -1))]
        self._finish(self._group.gather(outputs, [bytes_of(input)], options), input, timeout_s)

    def _scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        options = _options(c10d.ScatterOptions(), timeout_s, rootRank=src)
        inputs = [] if input is None else [list(bytes_of(input).view(self.world_size, -1))]
        self._finish(self._group.scatter([bytes_of(output)], inputs, options), input, timeout_s)

    def _all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        options = _options(c10d.AllToAllOptions(), timeout_s)
        work = self._group.alltoall_base(bytes_of(output), bytes_of(input), [], [], options)
        self._finish(work, input, timeout_s)

    def _barrier(self, timeout_s: float) -> None:
        self._finish(self._group.barrier(_options(c10d.BarrierOptions(), timeout_s)), None, timeout_s)

    # Life -------------------------------------------------------------------------------------

    def _close(self) -> None:
        super()._close()
        self._group = None

    def _translate(self, error: Exception) -> CommError:
        """Name the rank behind a broken connection; the lifeline hears of it within moments."""
        if not isinstance(error, RuntimeError | ContactLostError):
            return super()._translate(error)
        peer = error.peer if isinstance(error, ContactLostError) else None
        self._lifeline.wait_for_news(NEWS_S, peer)
        self._report_left(peer)
        if self._lifeline.lost:
            return self._lost()
        return super()._translate(error)


class GlooCommunicator(TorchDistCommunicator):
    """Gloo over TCP, for tensors in host memory.

    Gloo ends the process where ranks disagree, so that they compare first what they mean to do; see `Agreement`.
    """

    def __init__(
        self,
        timeout_s: float = 300.0,
        segment_bytes: int = 2**22,
        place: Place | None = None,
        outage_s: float = OUTAGE_S,
    ) -> None:
        self.waited_for: weakref.WeakSet[GlooMessage] = weakref.WeakSet()
        self._is_interrupted = False
        super().__init__(timeout_s, segment_bytes, place, outage_s)
        self._runs_apart = self.world_size > 1  # what hangs in Gloo is left behind, see `_give_up`
        self._agreement = Agreement(self, self._schedule_tag)  # in one order with the messages of schedules
        self._everyone = [(rank, 0) for rank in range(self.world_size)]

    def _make_group(self, store: dist.Store) -> Any:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        # Not Gloo's default device: the name of a host need not lead to where the others reach it.
        address = LOOPBACK if self._place.one_host else self._place.address
        options._devices = [gloo.create_device(hostname=address)]
        options._threads = 1  # operations finish in the order in which they were started
        options._timeout = timedelta(seconds=self.timeout_s)
        return gloo(store, self.rank, self.world_size, options)

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        return GlooSend(self, self._group.send([bytes_of(tensor)], dst, tag), tensor, dst, tag, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        return GlooMessage(self, self._group.recv([bytes_of(tensor)], src, tag), tensor, src, tag, timeout_s)

    @property
    def left(self) -> set[int]:
        """The ranks that have left in good order."""
        return self._lifeline.left

    def wait_for(self, work: Any, timeout_s: float, peer: int | None = None) -> None:
        started = time.monotonic()
        try:
            work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            # A rank whose time is up closes its connections, which can reach us before our own time is up.
            if time.monotonic() - started > 0.8 * timeout_s:
                raise timed_out(timeout_s, peer) from error
            raise

    # Collectives ------------------------------------------------------------------------------

    def _agree(
        self, collective: str, numel: int, dtype: torch.dtype, op: ReduceOp, root: int, timeout_s: float
    ) -> float:
        deadline = Deadline(timeout_s)
        self._agreement.compare(pack(collective, numel, dtype, op, root), deadline)
        return deadline.left_s

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        reads = [(tensor, self._everyone)]
        if left := self._agreement.settle(Offer("all_reduce", tensor, tensor, op=op), reads, timeout_s):
            super()._all_reduce(tensor, op, left)

    def _reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        reads = [(tensor, self._everyone)] if self.rank == dst else []
        if left := self._agreement.settle(Offer("reduce", tensor, tensor, op=op, root=dst), reads, timeout_s):
            super()._reduce(tensor, dst, op, left)

    def _broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        reads = [] if self.rank == src else [(tensor, [(src, 0)])]
        if left := self._agreement.settle(Offer("broadcast", tensor, tensor, root=src), reads, timeout_s):
            super()._broadcast(tensor, src, left)

    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        reads = zip(self._executor.blocks(output), self._each(0), strict=True)
        if left := self._agreement.settle(Offer("all_gather", input, input), reads, timeout_s):
            super()._all_gather(output, input, left)

    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        reads = [(output, [(rank, self.rank) for rank in range(self.world_size)])]
        if left := self._agreement.settle(
            Offer("reduce_scatter", output, input, self.world_size, op), reads, timeout_s
        ):
            super()._reduce_scatter(output, input, op, left)

    def _gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        reads = [] if output is None else zip(self._executor.blocks(output), self._each(0), strict=True)
        if left := self._agreement.settle(Offer("gather", input, input, root=dst), reads, timeout_s):
            super()._gather(output, input, dst, left)

    def _scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        reads = [(output, [(src, self.rank)])]
        if left := self._agreement.settle(Offer("scatter", output, input, self.world_size, root=src), reads, timeout_s):
            super()._scatter(output, input, src, left)

    def _all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        chunks = self._executor.blocks(output)
        reads = zip(chunks, self._each(self.rank), strict=True)
        if left := self._agreement.settle(Offer("all_to_all", chunks[0], input, self.world_size), reads, timeout_s):
            super()._all_to_all(output, input, left)

    def _barrier(self, timeout_s: float) -> None:
        self.traffic.count(0)
        self._agreement.compare(MEETING, Deadline(timeout_s))

    def _each(self, piece: int) -> list[list[tuple[int, int]]]:
        """Return, for each rank, a piece of its tensor alone."""
        return [[(rank, piece)] for rank in range(self.world_size)]

    # Life -------------------------------------------------------------------------------------

    def _connect(self) -> None:
        too_late = _later(self._start.left_s + GRACE_S, self._give_up)
        try:
            self._progress.submit(super()._connect).wait()
        finally:
            too_late.cancel()

    def _interrupt(self) -> None:
        """Break this rank's connections: a receive that times out is all that makes Gloo do so."""
        if not self._is_interrupted:
            self._is_interrupted = True
            _later(GRACE_S, self._give_up)
        group = self._group
        if group is not None and self.world_size > 1:
            peer = (self.rank + 1) % self.world_size
            try:
                group.recv([torch.empty(1, device="cpu")], peer, 2**31 - 1).wait(timedelta(milliseconds=1))
            except RuntimeError:
                return  # as intended

    def _give_up(self) -> None:
        """End what still waits, and leave its threads behind: Gloo tells a message that has come in part of no error.

        What is left behind holds the tensors that Gloo may still write into, and ends with its own timeout.
        """
        self._progress.give_up(self._given_up)
        for message in list(self.waited_for):
            message.give_up(self._why_hopeless())
        if self._progress.is_left_behind:
            never_destroy(self._group)

    def _given_up(self) -> CommError:
        """Return what to tell who waits for a collective; while they connect, there is none yet."""
        entry = self.recorder.waits_in
        return self._why_hopeless() if entry is None else self._failed(entry.operation, self._why_hopeless(), entry)

    def _why_hopeless(self) -> CommError:
        if self._closed:
            return CommClosedError(self._closed)
        return self._lost() if self._gone() else CommTimeoutError(f"not every rank came within {self.timeout_s:g} s")


def _later(seconds: float, action: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    return timer


def _options(options: Any, timeout_s: float, **values: object) -> Any:
    options.timeout = timedelta(seconds=timeout_s)
    for name, value in values.items():
        setattr(options, name, value)
    return options


def _reducible(tensor: Tensor) -> Tensor:
    """A tensor as the library reduces it: 1-d, complex as real, and bool as bytes, which have the same order."""
    if tensor.is_complex():
        return torch.view_as_real(tensor).view(-1)
    return bytes_of(tensor) if tensor.dtype == torch.bool else tensor.view(-1)
