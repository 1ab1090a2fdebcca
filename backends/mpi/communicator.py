"""MPI through mpi4py: native collectives on the tensors' own memory.

Everything runs as a nonblocking operation that is polled, because a blocking MPI call can neither time out
nor hear that another rank has failed. MPI reduces neither bfloat16 nor, everywhere, float16; those, and
more than 2**31 - 1 elements, go through the schedules over MPI's send and receive.

A rank that aborts says so to all others on a second communicator. A rank that dies is the launcher's business:
mpirun ends the job. Of a host out of reach neither says anything, but a lifeline does, over which the ranks also ask
each other how far they have come, see `backends.mpi.reach`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from backends import cores
from backends.deadline import Deadline
from backends.mpi import process
from backends.mpi.reach import reach
from backends.scheduled import ScheduledCommunicator
from minidist import launch
from minidist.communicator import Communicator, ReduceOp, Work
from minidist.contract.place import Place
from minidist.contract.rank import ANY_SOURCE
from minidist.contract.standing import Standing
from minidist.errors import BackendUnavailableError, CommError, MismatchError, PeerLostError

MAX_COUNT = 2**31 - 1
BACKGROUND_SPIN_S = 1e-4
"""How long to test without a pause where an operation runs beside other work of its rank."""
PAUSE_S = 1e-5
GRACE_S = 0.5
"""How long an operation may go on after a rank has left. News travel on a communicator of their own, and MPI keeps the
order of messages within one only: a farewell may overtake what was sent before it."""

Request = Any  # mpi4py is imported only where it is used


class MpiCommunicator(ScheduledCommunicator):
    """MPI, for tensors in host memory.

    Args:
        timeout_s, segment_bytes: see `ScheduledCommunicator`.
        mpi_comm: an mpi4py communicator to take over; None for a duplicate of COMM_WORLD.
        place: makes one of the ranks of a place, which alone have to call it; the first one of a process is of all.

    Raises:
        BackendUnavailableError: see `check_available`.
    """

    launcher: ClassVar[str] = "mpirun"
    checks_sizes = receives_from_any = True

    def __init__(
        self, timeout_s: float = 300.0, segment_bytes: int = 2**22, mpi_comm: Any = None, place: Place | None = None
    ) -> None:
        if place is None:
            self.check_available()
        MPI = self._MPI = process.initialised()
        if place is not None:
            mpi_comm = _comm_of(MPI, place)
        self._comm = MPI.COMM_WORLD.Dup() if mpi_comm is None else mpi_comm
        process.ensure_own_launcher(MPI.COMM_WORLD.size)
        super().__init__(self._comm.rank, self._comm.size, timeout_s, segment_bytes)
        self._notices = process.notices()
        self._key = self._comm.bcast(secrets.token_hex(8))
        self._notices.watch(self._key)
        # Every rank is in it before one can be out of it, so all of them watch by now.
        self._reach = reach(MPI)
        if self._reach is not None:
            self._reach.watch(self._key, self._standing)
        self._spin_s = cores.SPIN_S if self._cores_per_rank() else 0.0
        world_group = MPI.COMM_WORLD.Get_group()
        self._world_ranks = list(self._comm.Get_group().Translate_ranks(None, world_group))
        self._ops = _ops(MPI)
        self._types = _reduced_types(MPI)
        # What is only moved goes as anything of its size, and so in any dtype.
        self._types_by_size = {1: MPI.BYTE, 2: MPI.INT16_T, 4: MPI.INT32_T, 8: MPI.INT64_T, 16: MPI.C_DOUBLE_COMPLEX}
        process.open_communicators.add(self)

    def _cores_per_rank(self) -> int:
        return cores.per_rank(self._comm.allgather(cores.here()), self.rank, launch.detect().local_world_size)

    @classmethod
    def check_available(cls) -> None:
        if launch.detect().launcher == "torchrun":
            raise BackendUnavailableError(
                "mpi was started by torchrun, where every process is an MPI world of its own and would train alone; "
                "start with mpirun -n 2 python ..., or use comm=gloo"
            )
        process.load()

    # Point to point ---------------------------------------------------------------------------

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        requests = [self._comm.Isend(self._moved(part), dst, tag) for part in _parts(tensor)]
        return _MpiMessage(self, requests, tensor, dst, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        requests = [_Receive(self, part, src, tag) for part in _parts(tensor)]
        return _MpiMessage(self, requests, tensor, src, timeout_s)

    # Collectives ------------------------------------------------------------------------------

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        if not self._reduces(tensor):
            return super()._all_reduce(tensor, op, timeout_s)
        request = self._comm.Iallreduce(self._MPI.IN_PLACE, self._reduced(tensor), self._ops[op])
        self._finish(request, tensor, timeout_s)

    def _reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        if not self._reduces(tensor):
            return super()._reduce(tensor, dst, op, timeout_s)
        memory = self._reduced(tensor)
        buffers = (self._MPI.IN_PLACE, memory) if self.rank == dst else (memory, None)
        self._finish(self._comm.Ireduce(*buffers, self._ops[op], dst), tensor, timeout_s)

    def _broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        if tensor.numel() > MAX_COUNT:
            return super()._broadcast(tensor, src, timeout_s)
        self._finish(self._comm.Ibcast(self._moved(tensor), src), tensor, timeout_s)

    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        if output.numel() > MAX_COUNT:
            return super()._all_gather(output, input, timeout_s)
        if output.data_ptr() + self.rank * input.nbytes == input.data_ptr():
            # MPI takes no input that lies in its output; IN_PLACE would do, but only if all ranks said it.
            input = self._executor.scratch.copy_of("input", input)
        request = self._comm.Iallgather(self._moved(input), self._moved(output, input.numel()))
        self._finish(request, input, timeout_s)

    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        if not self._reduces(input):
            return super()._reduce_scatter(output, input, op, timeout_s)
        memory = self._executor.scratch.copy_of("input", input)
        request = self._comm.Ireduce_scatter_block(
            self._reduced(memory, output.numel()), self._reduced(output), self._ops[op]
        )
        self._finish(request, input, timeout_s)

    def _gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        if input.numel() * self.world_size > MAX_COUNT:
            return super()._gather(output, input, dst, timeout_s)
        target = None if output is None else self._moved(output, input.numel())
        self._finish(self._comm.Igather(self._moved(input), target, dst), input, timeout_s)

    def _scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        if output.numel() * self.world_size > MAX_COUNT:
            return super()._scatter(output, input, src, timeout_s)
        source = None if input is None else self._moved(input, output.numel())
        self._finish(self._comm.Iscatter(source, self._moved(output), src), input, timeout_s)

    def _all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        if input.numel() > MAX_COUNT:
            return super()._all_to_all(output, input, timeout_s)
        count = input.numel() // self.world_size
        request = self._comm.Ialltoall(self._moved(input, count), self._moved(output, count))
        self._finish(request, input, timeout_s)

    def _barrier(self, timeout_s: float) -> None:
        self._finish(self._comm.Ibarrier(), None, timeout_s)

    def _reduces(self, tensor: Tensor) -> bool:
        return tensor.dtype in self._types and tensor.numel() <= MAX_COUNT

    def _reduced(self, tensor: Tensor, count: int | None = None) -> Any:
        return self._memory_of(tensor, count, self._types[tensor.dtype])

    def _moved(self, tensor: Tensor, count: int | None = None) -> Any:
        return self._memory_of(tensor, count, self._types_by_size[tensor.element_size()])

    def _memory_of(self, tensor: Tensor, count: int | None, datatype: Any) -> Any:
        """Return a tensor's memory as MPI takes it, in blocks of ``count`` elements."""
        memory = self._MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
        return [memory, tensor.numel() if count is None else count, datatype]

    def _finish(self, request: Request, tensor: Tensor | None, timeout_s: float) -> None:
        self.traffic.count(0 if tensor is None else tensor.nbytes)
        self._wait(request, Deadline(timeout_s))

    def _wait(self, request: Request, deadline: Deadline, peer: int | None = None) -> None:
        # Test does not only look: MPI moves data inside of its calls and at no other time, so a rank that waits repeats
        # this one, and a rank that computes while a collective is under way has a thread that does. That thread soon
        # pauses between two tests, as it would keep the core from the computation.
        spin_until = time.perf_counter() + (BACKGROUND_SPIN_S if self._progress.serving else self._spin_s)
        while time.perf_counter() < spin_until:
            if request.Test():
                return
        while not request.Test():
            if error := self.why_hopeless(peer, deadline):
                raise error
            time.sleep(PAUSE_S)

    def why_hopeless(self, peer: int | None, deadline: Deadline) -> CommError | None:
        """Return why to wait for ``peer``, see `Notices.needed`, any longer is hopeless, if it is."""
        if self._closed:
            return CommError(self._closed)
        if self._out_of_reach():
            return self._lost()
        if gone := self._notices.needed(self._key, peer, self.world_size - 1, GRACE_S):
            # A rank that only left told nobody that it was needed, and this rank is about to fail because of it. Who
            # waits for this one shall hear of that cause, and hears it first: MPI keeps the order between two ranks.
            self._tell(*gone)
            return PeerLostError(f"rank {gone[0]} is gone: {gone[1]}", (gone[0],))
        return deadline.missed_by(peer)

    # Life -------------------------------------------------------------------------------------

    def _tell(self, rank: int, why: str | None) -> None:
        self._notices.tell(self._key, rank, why, self._world_ranks)

    @property
    def failed(self) -> bool:
        """Whether this rank aborted, or an operation of it failed."""
        return bool(self._closed or self._failure)

    def _gone(self) -> Mapping[int, str]:
        return {**self._notices.failed(self._key), **self._out_of_reach()}

    def _standings(self, channel: int, timeout_s: float) -> Mapping[int, Standing]:
        found = {} if self._reach is None else self._reach.standings(self._key, channel, timeout_s)
        return {self._world_ranks.index(rank): standing for rank, standing in found.items()}

    def _out_of_reach(self) -> dict[int, str]:
        lost = {} if self._reach is None else self._reach.lost
        return {self._world_ranks.index(rank): why for rank, why in lost.items() if rank in self._world_ranks}

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        index, ranks = next(((i, g) for i, g in enumerate(groups) if self.rank in g), (None, []))
        if index is None:
            self._comm.Split(self._MPI.UNDEFINED)
            return None
        child = self._comm.Split(index, ranks.index(self.rank))
        return MpiCommunicator(self.timeout_s, self.segment_bytes, child)

    def _close(self) -> None:
        if not self._out_of_reach():  # else the farewell would wait for ranks that never come to theirs
            process.open_communicators.discard(self)
        self._tell(self.rank, None)
        self._notices.forget(self._key)
        # After a failure messages may still be on their way, and MPI would give them to the next communicator that gets
        # the identity of this one.
        if self._failure is None:
            self._comm.Free()

    def _abort(self, reason: str) -> None:
        self._tell(self.rank, reason)


class _Receive:
    """The request of a receive that minds the size of what has come."""

    def __init__(self, comm: MpiCommunicator, tensor: Tensor, src: int, tag: int) -> None:
        self._MPI = comm._MPI
        self._numel = tensor.numel()
        self._src = src
        self._buffer = comm._moved(tensor)
        self._request = comm._comm.Irecv(self._buffer, comm._MPI.ANY_SOURCE if src == ANY_SOURCE else src, tag)
        self._status = comm._MPI.Status()
        self._is_done = False

    @property
    def source(self) -> int:
        """Whom it has come from, once it has."""
        source: int = self._status.Get_source()
        return source

    def Test(self) -> bool:
        """Return whether it has come."""
        if not self._is_done:
            try:
                self._is_done = self._request.Test(self._status)
            except self._MPI.Exception as error:
                if error.Get_error_class() != self._MPI.ERR_TRUNCATE:
                    raise
                raise self._mismatch("more") from error
            if self._is_done and self._status.Get_count(self._buffer[2]) != self._numel:
                raise self._mismatch("less")
        return self._is_done

    def _mismatch(self, what: str) -> MismatchError:
        return MismatchError(f"rank {self._src} sends {what} than the {self._numel} elements that this rank receives")


class _MpiMessage(Work):
    def __init__(
        self, comm: MpiCommunicator, requests: list[Request], tensor: Tensor, peer: int, timeout_s: float
    ) -> None:
        self._comm = comm
        self._requests = requests
        self._tensor = tensor
        self._peer = peer
        self._deadline = Deadline(timeout_s)
        self._error: Exception | None = None

    def wait(self) -> None:
        if self._error is not None:
            raise self._error
        for request in self._requests:
            self._comm._wait(request, self._deadline, self._peer)
        if self._peer == ANY_SOURCE and self._requests:
            self.peer = self._requests[0].source  # the only one: what is large comes from who is known by then
        self._requests = []

    def is_done(self) -> bool:
        return self._has_ended() or self._comm.why_hopeless(self._peer, self._deadline) is not None

    def _has_ended(self) -> bool:
        try:
            return all(request.Test() for request in self._requests)
        except (MismatchError, self._comm._MPI.Exception) as error:  # kept for who waits
            self._error = error
            return True

    def exception(self) -> BaseException | None:
        return self._error


def _reduced_types(MPI: Any) -> dict[torch.dtype, Any]:
    """Return what MPI calls the dtypes that it reduces; of bool it takes MIN and MAX, which bytes have, too."""
    return {
        torch.float64: MPI.DOUBLE,
        torch.float32: MPI.FLOAT,
        torch.int64: MPI.INT64_T,
        torch.int32: MPI.INT32_T,
        torch.uint8: MPI.UINT8_T,
        torch.bool: MPI.UINT8_T,
        torch.complex64: MPI.C_FLOAT_COMPLEX,
        torch.complex128: MPI.C_DOUBLE_COMPLEX,
    }


def _ops(MPI: Any) -> dict[ReduceOp, Any]:
    return {
        ReduceOp.SUM: MPI.SUM,
        ReduceOp.MIN: MPI.MIN,
        ReduceOp.MAX: MPI.MAX,
        ReduceOp.PRODUCT: MPI.PROD,
        ReduceOp.BAND: MPI.BAND,
        ReduceOp.BOR: MPI.BOR,
        ReduceOp.BXOR: MPI.BXOR,
    }


def _parts(tensor: Tensor) -> list[Tensor]:
    return [tensor] if tensor.numel() <= MAX_COUNT else list(torch.split(tensor.view(-1), 2**30))


def _comm_of(MPI: Any, place: Place) -> Any:
    """Return an MPI communicator of the ranks of ``place``, in their order."""
    world = MPI.COMM_WORLD
    store = dist.PrefixStore("mpi", place.store)
    store.set(str(place.rank), str(world.rank))
    ranks = [int(store.get(str(rank))) for rank in range(place.world_size)]
    if len(set(ranks)) < place.world_size:
        raise BackendUnavailableError(
            f"mpi was given {place.world_size} ranks, of which each is an MPI world of its own; start them with "
            "mpirun -n 2 python -m minidist.c10d script.py"
        )
    return world.Create_group(world.Get_group().Incl(ranks))
