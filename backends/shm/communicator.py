"""Shared memory between the ranks of one host.

A tensor from `ShmCommunicator.empty` lies in memory that every rank has mapped, so a collective works on it in
place, and nothing is copied on the way. Other tensors pass through a *stage*, a small piece of shared memory per rank,
in rounds. Ranks that meet (backends/shm/arena.py) compare what they mean to do, so that ranks that disagree all raise
`MismatchError`. A small tensor is copied before the first meeting, which is then all that it needs.

Cost of an all-reduce of M bytes on n ranks: 2 meetings in place, in which every rank reads and writes (n-1)/n M of
the others' memory; through the stage twice the traffic, and a wait for each block of a rank's share. What does it is
either a compiled kernel (backends/shm/compiled/), one call for all meetings, or torch's operations, with the same bits.
Schedules over it are one call, too, where they are compiled (backends/shm/script.py), and else messages.
Compare Li, Hoefler and Snir, "NUMA-aware shared-memory collective communication for MPI" (2013).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from backends.contact import ContactLostError, contact_lost
from backends.deadline import Deadline
from backends.processes.communicator import ProcessCommunicator
from backends.shm import choice, doorbell
from backends.shm.arena import Arena, ensure_one_host
from backends.shm.choice import Collectives
from backends.shm.compiled.collectives import CompiledCollectives
from backends.shm.compiled.wholes import Whole
from backends.shm.layout import NOWHERE
from backends.shm.mailbox import Message
from backends.shm.roles import Call
from minidist import launch
from minidist.collective import Run
from minidist.communicator import Device, ReduceOp, Shape, Work
from minidist.contract.carriers import bytes_of
from minidist.contract.fused_step import FusedStep
from minidist.contract.place import Place
from minidist.errors import CommError
from minidist.schedule import Schedule


class ShmCommunicator(ProcessCommunicator):
    """Shared memory, for ranks that are processes of one host; started by torchrun or mpirun.

    Messages move while their sender or their receiver waits for something on shared memory, whatever it is; a
    large one does not move while both compute.

    Args:
        timeout_s, segment_bytes, place: see `ProcessCommunicator`.
        kernels: what does the arithmetic and the copies: ``compiled`` kernels, which take numba; ``torch``'s
            operations; or ``auto``, the first where all ranks can.

    Raises:
        BackendUnavailableError: ``kernels`` is compiled, and not all ranks have numba and are to use it.
    """

    checks_sizes = checks_dtypes = receives_from_any = True
    tag_bits = 31

    def __init__(
        self,
        timeout_s: float = 300.0,
        segment_bytes: int = 2**22,
        place: Place | None = None,
        kernels: str = "auto",
    ) -> None:
        self.kernels = kernels
        self._compiled = choice.chosen(kernels)  # before ranks wait for each other: the first of a machine compiles
        super().__init__(timeout_s, segment_bytes, place)
        self._open_arena: Arena | None = None  # abort() looks for it
        try:
            self._open_arena = arena = self._make_arena()
        except BaseException as error:  # the other ranks wait for this one
            self.abort(f"{type(error).__name__}: {error}")
            raise
        self._open_collectives: Collectives | None = choice.collectives(arena, self._compiled, kernels)
        # A helper thread on the core of its rank made steps 2 to 8 % slower than to communicate in between.
        self.overlaps = arena.cores_per_rank > 1

    def _make_arena(self) -> Arena:
        place = self._place
        ensure_one_host(place.num_here, place.world_size)
        deadline = Deadline(self.timeout_s)
        progress = self._progress
        return Arena(
            self.rank,
            self.world_size,
            self._store,
            self.why_hopeless,
            deadline,
            place.local_world_size,
            lambda: progress.serving,
            self._compiled is not None,
        )

    @classmethod
    def check_machine(cls) -> None:
        doorbell.ensure_futex()

    @classmethod
    def check_available(cls) -> None:
        super().check_available()
        world = launch.detect()
        if world.knows_host:
            ensure_one_host(world.local_world_size, world.world_size)

    def empty(self, shape: Shape, dtype: torch.dtype = torch.float32, device: Device = None) -> Tensor:
        if device is not None and torch.device(device).type != "cpu":
            return super().empty(shape, dtype, device)
        self.ensure_usable("empty")
        sizes = torch.Size([shape] if isinstance(shape, int) else shape)
        if any(size < 0 for size in sizes):
            raise ValueError(f"{self.who('empty')}: sizes must be at least 0, got {tuple(sizes)}")
        return self._arena.heap.allocate(sizes.numel(), dtype, self.who("empty")).view(sizes)

    # Collectives ------------------------------------------------------------------------------

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        self.traffic.count(tensor.nbytes)
        self._collectives.all_reduce(tensor if tensor.dim() == 1 else tensor.view(-1), op, timeout_s)

    def _reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        self._share("reduce", tensor, tensor, tensor if self.rank == dst else None, timeout_s, op, dst)

    def _broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        if self.rank == src:
            self._share("broadcast", tensor, tensor, None, timeout_s, root=src)
        else:
            self._share("broadcast", tensor, None, tensor, timeout_s, root=src)

    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        self._share("all_gather", input, input, output, timeout_s)

    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        self._share("reduce_scatter", output, input, output, timeout_s, op)

    def _gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        self._share("gather", input, input, output, timeout_s, root=dst)

    def _scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        self._share("scatter", output, input, output, timeout_s, root=src)

    def _all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        self._share("all_to_all", output.view(-1)[: output.numel() // self.world_size], input, output, timeout_s)

    def _barrier(self, timeout_s: float) -> None:
        self.traffic.count(0)
        self._collectives.barrier(timeout_s)

    def fuses_steps(self, dtype: torch.dtype) -> bool:
        return isinstance(self._collectives, CompiledCollectives) and dtype == torch.float32

    def _fused_step(self, memory: Tensor, step: FusedStep, timeout_s: float) -> None:
        assert isinstance(self._collectives, CompiledCollectives)  # or it did not say that it fuses steps
        self.traffic.count(memory.nbytes // self.world_size)
        self._collectives.step(step, timeout_s)

    def _share(
        self,
        kind: str,
        piece: Tensor,
        source: Tensor | None,
        target: Tensor | None,
        timeout_s: float,
        op: ReduceOp = ReduceOp.SUM,
        root: int = 0,
    ) -> None:
        """Offer ``source``, of pieces as large as ``piece``, and read into ``target``."""
        self.traffic.count(0 if source is None else source.nbytes)
        flat_source, flat_target = (None if each is None else each.view(-1) for each in (source, target))
        self._collectives.share(Call(kind, piece.numel(), flat_source, flat_target, op, root), timeout_s)

    def without_meetings(self, tensor: Tensor) -> Callable[[], None]:
        """Return what this rank does in an all-reduce of ``tensor``, but for waiting; for measurements.

        Every rank calls it, with a tensor from `empty`.
        """
        self.ensure_usable("without_meetings")
        if self._arena.heap.offset_of(tensor) == NOWHERE:
            raise ValueError(f"{self.who('without_meetings')}: tensor is not in shared memory; make it with empty()")
        return self._collectives.without_meetings(tensor, self.timeout_s)

    def _whole(
        self, schedule: Schedule, run: Run, numel: int, dtype: torch.dtype, tag: int
    ) -> Callable[[Sequence[Tensor], ReduceOp, float], None] | None:
        whole = self._collectives.whole(schedule, run, numel, dtype, tag >> self.tag_bits)
        return None if whole is None else functools.partial(self._run_whole, whole)

    def _run_whole(self, whole: Whole, regions: Sequence[Tensor], op: ReduceOp, timeout_s: float) -> None:
        self._collectives.run_whole(whole, regions, op, timeout_s)

    # Point to point ---------------------------------------------------------------------------

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        message = self._arena.mail.send(bytes_of(tensor), dst, tag, tensor.dtype)
        return _ShmWork(self, self._arena, message, dst, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        message = self._arena.mail.receive(bytes_of(tensor), src, tag, tensor.dtype)
        return _ShmWork(self, self._arena, message, src, timeout_s)

    # Life -------------------------------------------------------------------------------------

    @property
    def _arena(self) -> Arena:
        assert self._open_arena is not None  # it is gone once the communicator is closed, and nothing runs then
        return self._open_arena

    @property
    def _collectives(self) -> Collectives:
        assert self._open_collectives is not None  # as the arena
        return self._open_collectives

    def _made_at(self, place: Place) -> ShmCommunicator:
        return ShmCommunicator(self.timeout_s, self.segment_bytes, place, self.kernels)

    def why_hopeless(self, peer: int, deadline: Deadline) -> Exception | None:
        """Return why to wait for ``peer`` any longer is hopeless, if it is."""
        if self._closed:
            return CommError(self._closed)
        if self._lifeline.lost:
            return self._lost()
        return contact_lost(peer, self._lifeline.left, self.world_size) or deadline.missed_by(peer)

    def _translate(self, error: Exception) -> CommError:
        if isinstance(error, ContactLostError):
            self._report_left(error.peer)
            return self._lost()
        return super()._translate(error)

    def _interrupt(self) -> None:
        """Nothing to do: who waits looks up often enough."""

    def _close(self) -> None:
        super()._close()
        self._let_go()

    def _abort(self, reason: str) -> None:
        super()._abort(reason)
        self._let_go()

    def _let_go(self) -> None:
        """Forget everything that keeps memory mapped; what still runs fails, as it should."""
        if self._open_arena is not None:
            self._open_arena.close()
            self._open_arena = self._open_collectives = None


class _ShmWork(Work):
    """A message in the mailbox, on its way."""

    def __init__(self, comm: ShmCommunicator, arena: Arena, message: Message, peer: int, timeout_s: float) -> None:
        self._comm = comm
        self._arena = arena  # its own: it can be waited for when the communicator has let go of it
        self._message = message
        self._peer = peer
        self._deadline = Deadline(timeout_s)

    def wait(self) -> None:
        if not self._has_ended():
            self._arena.wait_until(self._has_ended, self._peer, self._deadline)
        self.peer = self._message.src
        if self._message.error is not None:
            raise self._message.error

    def is_done(self) -> bool:
        return self._has_ended() or self._comm.why_hopeless(self._peer, self._deadline) is not None

    def exception(self) -> BaseException | None:
        return self._message.error

    def _has_ended(self) -> bool:
        if not self._message.done:
            self._arena.mail.advance()
        return self._message.done
