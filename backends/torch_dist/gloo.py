"""torch.distributed's process groups with their native collectives, and Gloo; NCCL is in nccl.py.

The process groups are made directly, without torch's global default group, so that several can exist
one after the other in one process. Gloo itself reports at most that some connection closed, and goes on
waiting for ranks that wait for the dead one; which rank is gone the lifeline of `ProcessCommunicator` knows.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
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
from backends.processes.offer import Offer
from backends.processes.signature import MEETING, pack
from minidist.communicator import ReduceOp, Work
from minidist.contract.carriers import bytes_of
from minidist.contract.forks import kept_in_forks
from minidist.contract.place import Place, from_everyone
from minidist.errors import CommError

OPS = {
    ReduceOp.SUM: dist.ReduceOp.SUM,
    ReduceOp.MIN: dist.ReduceOp.MIN,
    ReduceOp.MAX: dist.ReduceOp.MAX,
    ReduceOp.PRODUCT: dist.ReduceOp.PRODUCT,
}
"""What both libraries have; the others run as schedules."""
GRACE_S = 0.5
"""How long a message may go on after its receiver has left."""
NEWS_S = 3.0
"""How long to wait for the name of the rank that is gone, after the data path broke."""


class TorchDistCommunicator(ProcessCommunicator):
    """What the process groups of torch.distributed have in common."""

    def __init__(self, timeout_s: float = 300.0, segment_bytes: int = 2**22, place: Place | None = None) -> None:
        self._group: Any = None  # a rank can be lost before it is made
        super().__init__(timeout_s, segment_bytes, place)
        try:
            self._group = kept_in_forks(self._make_group(dist.PrefixStore("group", self._store)))
        except RuntimeError as error:
            self._fail("connect", error)
        # A rank that closed at once would break the connections of one that is still making its own.
        connected = dist.PrefixStore("connected", self._store)
        from_everyone(connected, self.rank, self.world_size, "", timeout_s, self._gone())

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

    def __init__(self, timeout_s: float = 300.0, segment_bytes: int = 2**22, place: Place | None = None) -> None:
        super().__init__(timeout_s, segment_bytes, place)
        self._agreement = Agreement(self, self._schedule_tag)  # in one order with the messages of schedules
        self._everyone = [(rank, 0) for rank in range(self.world_size)]

    def _make_group(self, store: dist.Store) -> Any:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        # The host name of a machine need not lead back to it, so on one host it is not used.
        device = gloo.create_device(hostname="127.0.0.1") if self._place.one_host else gloo.create_default_device()
        options._devices = [device]
        options._threads = 1  # operations finish in the order in which they were started
        options._timeout = timedelta(seconds=self.timeout_s)
        return gloo(store, self.rank, self.world_size, options)

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        return _GlooSend(self, self._group.send([bytes_of(tensor)], dst, tag), tensor, dst, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        return _GlooMessage(self, self._group.recv([bytes_of(tensor)], src, tag), tensor, src, timeout_s)

    @property
    def left(self) -> set[int]:
        """The ranks that have left in good order."""
        return self._lifeline.left

    def _wait(self, work: Any, timeout_s: float) -> None:
        started = time.monotonic()
        try:
            work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            # A rank whose time is up closes its connections, which can reach us before our own time is up.
            if time.monotonic() - started > 0.8 * timeout_s:
                raise timed_out(timeout_s) from error
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

    def __init__(self, comm: GlooCommunicator, work: Any, tensor: Tensor, peer: int, timeout_s: float) -> None:
        self._comm = comm
        self._work = work
        self._tensor = tensor
        self._peer = peer
        self._deadline = Deadline(timeout_s)
        self._timeout_s = timeout_s
        self._done = False
        self._ended: Future[None] | None = None

    def wait(self) -> None:
        if self._ended is not None:
            self._ended.result()
        elif not self._done:
            self._finish()

    def _finish(self) -> None:
        try:
            self._comm._wait(self._work, self._deadline.left_s)
        except CommError:
            raise
        except RuntimeError as error:
            raise ContactLostError(self._peer) from error
        self._done = True

    def _await(self, ended: Future[None]) -> None:
        try:
            self._finish()
        except BaseException as error:  # whatever it is belongs to the one who waits
            ended.set_exception(error)
        else:
            ended.set_result(None)

    def is_done(self) -> bool:
        if self._done:
            return True
        if self._ended is None:
            self._ended = Future()
            threading.Thread(target=self._await, args=(self._ended,), daemon=True).start()
        return self._ended.done()

    def exception(self) -> BaseException | None:
        return self._ended.exception() if self._ended is not None and self._ended.done() else None


class _GlooSend(_GlooMessage):
    """Gloo lets a sender wait for a receiver that has left; who polls is told so by the lifeline."""

    _hopeless_from: float | None = None

    def is_done(self) -> bool:
        return super().is_done() or self._is_hopeless()

    def exception(self) -> BaseException | None:
        return ContactLostError(self._peer) if self._is_hopeless() else super().exception()

    def _is_hopeless(self) -> bool:
        """Whether the receiver left some time ago and this has not ended: the news may overtake the end of it."""
        if self._done or self._peer not in self._comm.left or (self._ended is not None and self._ended.done()):
            return False
        if self._hopeless_from is None:
            self._hopeless_from = time.monotonic() + GRACE_S
        return time.monotonic() > self._hopeless_from


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
