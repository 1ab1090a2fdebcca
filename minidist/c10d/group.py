"""A process group of torch.distributed as a communicator, for programs that have made one already."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from minidist.communicator import Communicator, ReduceOp, Work
from minidist.contract.carriers import bytes_of
from minidist.contract.library_wait import waits_in_library
from minidist.errors import CommClosedError, CommError, CommTimeoutError

OPS = {
    ReduceOp.SUM: dist.ReduceOp.SUM,
    ReduceOp.MIN: dist.ReduceOp.MIN,
    ReduceOp.MAX: dist.ReduceOp.MAX,
    ReduceOp.PRODUCT: dist.ReduceOp.PRODUCT,
    ReduceOp.BAND: dist.ReduceOp.BAND,
    ReduceOp.BOR: dist.ReduceOp.BOR,
    ReduceOp.BXOR: dist.ReduceOp.BXOR,
}


def from_process_group(group: dist.ProcessGroup | None = None, timeout_s: float | None = None) -> Communicator:
    """Return a communicator over a process group of torch.distributed, whatever its backend.

    All ranks of the group call it. It borrows the group: closing it leaves the group open, and it ends with the
    group when that is destroyed.

    Args:
        group: None for the default one.
        timeout_s: of its operations; None for the group's own.

    Raises:
        ValueError: this process is not in the group, or there is no default group.
    """
    found: Any = c10d._get_default_group() if group is None else group
    if dist.get_rank(found) < 0:
        raise ValueError("this process is not in the process group; call from_process_group on its ranks alone")
    return ProcessGroupCommunicator(found, timeout_s)


class ProcessGroupCommunicator(Communicator):
    """The collectives and messages of a process group; see `from_process_group`."""

    def __init__(self, group: Any, timeout_s: float | None = None) -> None:
        own = (
            c10d._get_pg_default_timeout(group) if hasattr(c10d, "_get_pg_default_timeout") else c10d.default_pg_timeout
        )
        super().__init__(group.rank(), group.size(), own.total_seconds() if timeout_s is None else timeout_s)
        self.recorder.ranks = tuple(dist.get_process_group_ranks(group))
        kinds = {device.type for device in group._device_types}
        self.device_type = "cpu" if "cpu" in kinds else next(iter(kinds))  # type: ignore[misc]  # the class's is only the default
        # Not held: a group that torch has destroyed would live on, and its threads meet the end of the interpreter.
        self._borrowed = weakref.ref(group)

    @property
    def _group(self) -> Any:
        group = self._borrowed()
        if group is None:
            raise CommClosedError("its process group was destroyed; call from_process_group on a new one")
        return group

    def _collective(self, name: str) -> Callable[..., None]:
        hook: Callable[..., None] = getattr(self, f"_{name}")
        return hook

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        options = _options(c10d.AllreduceOptions(), timeout_s, reduceOp=OPS[op])
        self._finish(self._group.allreduce([_reducible(tensor)], options), tensor)

    def _reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        options = _options(c10d.ReduceOptions(), timeout_s, reduceOp=OPS[op], rootRank=dst)
        self._finish(self._group.reduce([_reducible(tensor)], options), tensor)

    def _broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        options = _options(c10d.BroadcastOptions(), timeout_s, rootRank=src)
        self._finish(self._group.broadcast([bytes_of(tensor)], options), tensor)

    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        options = _options(c10d.AllgatherOptions(), timeout_s)
        self._finish(self._group._allgather_base(bytes_of(output), bytes_of(input), options), input)

    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        options = _options(c10d.ReduceScatterOptions(), timeout_s, reduceOp=OPS[op])
        self._finish(self._group._reduce_scatter_base(_reducible(output), _reducible(input), options), input)

    def _gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        options = _options(c10d.GatherOptions(), timeout_s, rootRank=dst)
        outputs = [] if output is None else [list(bytes_of(output).view(self.world_size, -1))]
        self._finish(self._group.gather(outputs, [bytes_of(input)], options), input)

    def _scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        options = _options(c10d.ScatterOptions(), timeout_s, rootRank=src)
        inputs = [] if input is None else [list(bytes_of(input).view(self.world_size, -1))]
        self._finish(self._group.scatter([bytes_of(output)], inputs, options), input)

    def _all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        options = _options(c10d.AllToAllOptions(), timeout_s)
        self._finish(self._group.alltoall_base(bytes_of(output), bytes_of(input), [], [], options), input)

    def _barrier(self, timeout_s: float) -> None:
        self._finish(self._group.barrier(_options(c10d.BarrierOptions(), timeout_s)), None)

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        return _Message(self._group.send([bytes_of(tensor)], dst, tag), tensor, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        return _Message(self._group.recv([bytes_of(tensor)], src, tag), tensor, timeout_s)

    def _finish(self, work: Any, tensor: Tensor | None) -> None:
        self.traffic.count(0 if tensor is None else tensor.nbytes)
        work.wait()

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        for ranks in groups:
            if self.rank in ranks:
                members = [dist.get_global_rank(self._group, rank) for rank in ranks]
                # Only the members call it: the ranks of this group need not be all of the world.
                child = dist.new_group(members, use_local_synchronization=True, sort_ranks=False)
                return ProcessGroupCommunicator(child, self.timeout_s)
        return None

    def _close(self) -> None:
        """Nothing to do: the group is its maker's."""

    def _translate(self, error: Exception) -> CommError:
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            return CommTimeoutError(str(error))
        return super()._translate(error)


class _Message(Work):
    """A send or receive of the group. Gloo tells only those who wait, so who polls has a thread that waits."""

    def __init__(self, work: Any, tensor: Tensor, timeout_s: float) -> None:
        self._work = work
        self._tensor = tensor
        self._timeout = timedelta(seconds=timeout_s)
        self._done = False
        self._ended: Future[None] | None = None

    def wait(self) -> None:
        if self._ended is not None:
            self._ended.result()
        elif not self._done:
            self._work.wait(self._timeout)
            self._done = True

    def is_done(self) -> bool:
        if self._done:
            return True
        if self._ended is None:
            self._ended = ended = Future[None]()
            waits_in_library(threading.Thread(target=self._await, args=(ended,), daemon=True)).start()
        return self._ended.done()

    def _await(self, ended: Future[None]) -> None:
        try:
            self._work.wait(self._timeout)
        except BaseException as error:  # whatever it is belongs to the one who waits
            ended.set_exception(error)
        else:
            ended.set_result(None)

    def exception(self) -> BaseException | None:
        return self._ended.exception() if self._ended is not None and self._ended.done() else None


def _options(options: Any, timeout_s: float, **values: object) -> Any:
    options.timeout = timedelta(seconds=timeout_s)
    for name, value in values.items():
        setattr(options, name, value)
    return options


def _reducible(tensor: Tensor) -> Tensor:
    """A tensor as every backend reduces it: 1-d, complex as real, and bool as bytes, which have the same order."""
    if tensor.is_complex():
        return torch.view_as_real(tensor).view(-1)
    return bytes_of(tensor) if tensor.dtype == torch.bool else tensor.view(-1)
