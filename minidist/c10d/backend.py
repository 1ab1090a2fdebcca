"""A communicator as a backend of torch.distributed: what torch calls, and nothing else.

Each operation of torch is one operation of the communicator, in the order of the calls, whatever steps it takes
(`minidist.c10d.moves`, `minidist.c10d.reductions`). What torch waits for at once runs in the caller's thread; all else
runs in the communicator's own, as torch computes meanwhile.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Backend

from minidist.c10d import moves
from minidist.c10d.barrier import monitored_barrier
from minidist.c10d.choice import Choice
from minidist.c10d.reductions import OPS, Reduction, is_plain
from minidist.c10d.work import TorchWork
from minidist.communicator import Communicator, Work
from minidist.contract import records
from minidist.contract.call_site import uncaught
from minidist.contract.forks import only_here
from minidist.errors import CommError

MakeChild = Callable[[dist.Store, int, int, timedelta], "MinidistBackend"]


class MinidistBackend(Backend):
    """``comm`` as torch.distributed calls it.

    Args:
        comm: of the ranks of the group; it is taken over, and closed with the group.
        store: of the group.
        options: torch's, with the timeout.
        make_child: makes the backend of some of the ranks, called by those alone.
        choice: what groups of other ranks are to run on; None for the fastest.
    """

    # Torch asks for these of the object; those of its own class would ask the object again, without an end.
    supports_splitting = True
    supports_coalescing = False
    supports_shrinking = False
    supports_reconfigure = False
    supports_window = False
    _supports_time_estimate = False

    def __init__(
        self,
        comm: Communicator,
        store: dist.Store,
        options: Any,
        make_child: MakeChild,
        choice: Choice | None = None,
    ) -> None:
        super().__init__(comm.rank, comm.world_size)
        self.comm = comm
        self._store = store
        self._options = options
        self._make_child = make_child
        self.choice = choice
        self._sequence = 0
        self._num_barriers = 0
        # Torch's debug mode holds its C++ half alone, so until the end of the group or of the process this holds it.
        self._at_exit = only_here(self._end)
        atexit.register(self._at_exit)

    @property
    def options(self) -> Any:
        """What torch made it with."""
        return self._options

    def getBackendName(self) -> str:
        return str(self._options.backend)

    # Reductions -------------------------------------------------------------------------------

    def allreduce(self, tensors: list[Tensor], opts: Any) -> TorchWork:
        if len(tensors) == 1 and is_plain(opts.reduceOp, tensors[0]):
            op = OPS[opts.reduceOp.op]
            return self._started(self.comm.all_reduce(tensors[0], op, opts.asyncOp, _seconds(opts)), tensors)

        def run() -> None:
            for tensor in tensors:
                self._all_reduce(tensor, opts)

        return self._run(run, opts, tensors)

    allreduce_coalesced = allreduce
    allreduce_sparse = allreduce

    def reduce(self, tensors: list[Tensor], opts: Any) -> TorchWork:
        (tensor,) = tensors
        return self._run(lambda: self._reduction(tensor, opts).reduce(tensor, opts.rootRank), opts, tensors)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any) -> TorchWork:
        if is_plain(opts.reduceOp, input):
            op = OPS[opts.reduceOp.op]
            return self._started(self.comm.reduce_scatter(output, input, op, opts.asyncOp, _seconds(opts)), [output])
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> TorchWork:
        def run() -> None:
            for output, input in zip(outputs, inputs, strict=True):
                self._reduction(input, opts).reduce_scatter(output, input)

        return self._run(run, opts, outputs)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> TorchWork:
        def run() -> None:
            for output, blocks in zip(outputs, inputs, strict=True):
                self._reduction(output, opts).reduce_scatter_list(output, blocks)

        return self._run(run, opts, outputs)

    # Moves ------------------------------------------------------------------------------------

    def broadcast(self, tensors: list[Tensor], opts: Any) -> TorchWork:
        (tensor,) = tensors
        return self._started(self.comm.broadcast(tensor, opts.rootRank, opts.asyncOp, _seconds(opts)), tensors)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any) -> TorchWork:
        return self._started(self.comm.all_gather(output, input, opts.asyncOp, _seconds(opts)), [output])

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> TorchWork:
        def run() -> None:
            for output, input in zip(outputs, inputs, strict=True):
                self.comm.all_gather(output, input, timeout_s=_seconds(opts))

        return self._run(run, opts, outputs)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> TorchWork:
        def run() -> None:
            for output, input in zip(outputs, inputs, strict=True):
                moves.all_gather(self.comm, output, input, _seconds(opts))

        return self._run(run, opts, outputs)

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> TorchWork:
        """Take the outputs by rank, and in each the tensors."""
        by_tensor = [list(of_all) for of_all in zip(*outputs, strict=True)]
        return self.allgather(by_tensor, inputs, opts)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> TorchWork:
        mine = outputs[0] if self.comm.rank == opts.rootRank else []
        return self._run(lambda: moves.gather(self.comm, mine, inputs[0], opts.rootRank, _seconds(opts)), opts, outputs)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> TorchWork:
        mine = inputs[0] if self.comm.rank == opts.rootRank else []
        return self._run(
            lambda: moves.scatter(self.comm, outputs[0], mine, opts.rootRank, _seconds(opts)), opts, outputs
        )

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any
    ) -> TorchWork:
        sizes: tuple[list[int], ...] = ()
        if output_sizes or input_sizes:
            sizes = moves.elements(self.comm, output, output_sizes), moves.elements(self.comm, input, input_sizes)
        return self._started(self.comm.all_to_all(output, input, opts.asyncOp, _seconds(opts), *sizes), [output])

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> TorchWork:
        return self._run(lambda: moves.all_to_all(self.comm, outputs, inputs, _seconds(opts)), opts, outputs)

    # Messages ---------------------------------------------------------------------------------

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> TorchWork:
        return TorchWork(self.comm.isend(tensors[0], dst, tag), tensors)

    def recv(self, tensors: list[Tensor], src: int, tag: int) -> TorchWork:
        return TorchWork(self.comm.irecv(tensors[0], src, tag), tensors)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> TorchWork:
        return TorchWork(self.comm.irecv(tensors[0], None, tag), tensors)

    # Barriers ---------------------------------------------------------------------------------

    def barrier(self, opts: Any) -> TorchWork:
        return self._started(self.comm.barrier(opts.asyncOp, _seconds(opts)), [])

    def monitored_barrier(self, opts: Any, wait_all_ranks: bool = False) -> None:
        self._num_barriers += 1
        store = dist.PrefixStore(f"monitored_barrier{self._num_barriers}", self._store)
        seconds = opts.timeout.total_seconds()  # 0 is none at all here
        monitored_barrier(store, self.comm, self.comm.timeout_s if seconds < 0 else seconds, wait_all_ranks)

    # Life -------------------------------------------------------------------------------------

    def split(self, store: dist.Store, ranks: Sequence[int], options: Any) -> MinidistBackend:
        if self.comm.rank not in ranks:
            # None would say so, but torch 2.15 reads through it: the process would end by a signal.
            raise CommError(
                f"{self.comm.who('split_group')}: this rank is in none of the groups, which torch does not take from a "
                "backend written in Python; name every rank in split_ranks, or call new_group"
            )
        child = self._make_child(store, list(ranks).index(self.comm.rank), len(ranks), options._timeout)
        child.comm.recorder.among(ranks, self.comm.recorder)
        return child

    def set_timeout(self, timeout: timedelta) -> None:
        self.comm.timeout_s = timeout.total_seconds()
        self._options._timeout = timeout

    def shutdown(self) -> None:
        """Close the communicator, or leave it at once where it has failed."""
        atexit.unregister(self._at_exit)
        try:
            self.comm.ensure_usable("shutdown")
        except CommError as error:
            self.comm.abort(f"it left after {type(error).__name__}")
        else:
            self.comm.close()

    def _end(self) -> None:
        """Leave as the process ends, and say why if an error ends it."""
        error = uncaught()
        if error is None:
            return self.shutdown()
        where = self.comm.recorder.raised(error, error.__traceback__)
        if not self.comm.recorder.has_failed:  # else that has been written, and ``error`` says it once more
            records.write(f"{type(error).__name__}: {error}", [self.comm.recorder.world_rank])
        self.comm.abort(f"{type(error).__name__}: {error}{where}")

    def abort(self) -> None:
        atexit.unregister(self._at_exit)
        self.comm.abort("the process group was aborted")

    # The rest ---------------------------------------------------------------------------------

    def _get_sequence_number_for_group(self) -> int:
        return self._sequence

    def _set_sequence_number_for_group(self) -> None:
        """Nothing to do: it begins at 0 on every rank."""

    def _all_reduce(self, tensor: Tensor, opts: Any) -> None:
        if tensor.is_sparse:
            moves.sum_sparse(self.comm, tensor, _seconds(opts))
        else:
            self._reduction(tensor, opts).all_reduce(tensor)

    def _reduction(self, tensor: Tensor, opts: Any) -> Reduction:
        return Reduction(self.comm, opts.reduceOp, tensor.dtype, _seconds(opts))

    def _run(self, job: Callable[[], None], opts: Any, result: Any) -> TorchWork:
        return self._started(self.comm.in_order(job, opts.asyncOp), result)

    def _started(self, work: Work, result: Any) -> TorchWork:
        self._sequence += 1
        return TorchWork(work, result)


def _seconds(opts: Any) -> float | None:
    """Return the timeout of an operation; None where torch leaves it to the group."""
    seconds = opts.timeout.total_seconds()
    return seconds if seconds > 0 else None
