"""Shared memory between the ranks of one host.

A tensor from `ShmCommunicator.empty` lies in memory that every rank has mapped, so a collective works on it in
place, and nothing is copied on the way. Other tensors pass through a *stage*, a small piece of shared memory per rank,
in rounds. Ranks that meet (backends/shm/arena.py) compare what they mean to do, so that ranks that disagree all raise
`MismatchError`. A small tensor is copied before the first meeting, which is then all that it needs.

Cost of an all-reduce of M bytes on n ranks: 2 meetings in place, in which every rank reads and writes (n-1)/n M of
the others' memory; about 2 + M / (n STAGE_BYTES / (n+1)) meetings, and twice the traffic, through the stage.
Compare Li, Hoefler and Snir, "NUMA-aware shared-memory collective communication for MPI" (2013).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backends.contact import ContactLostError, contact_lost
from backends.deadline import Deadline
from backends.processes.communicator import ProcessCommunicator
from backends.processes.offer import Offer, Read
from backends.processes.signature import MEETING
from backends.shm import doorbell
from backends.shm.all_reduce import AllReduce, Blocks
from backends.shm.arena import NOWHERE, Arena, ensure_one_host
from backends.shm.mailbox import Message
from backends.shm.sharing import share
from minidist import launch
from minidist.communicator import Device, ReduceOp, Shape, Work
from minidist.contract.carriers import bytes_of
from minidist.contract.place import Place
from minidist.errors import CommError


class ShmCommunicator(ProcessCommunicator):
    """Shared memory, for ranks that are processes of one host; started by torchrun or mpirun.

    Messages move while their sender or their receiver waits for something on shared memory, whatever it is; a
    large one does not move while both compute.
    """

    checks_sizes = checks_dtypes = receives_from_any = True
    tag_bits = 31

    def __init__(self, timeout_s: float = 300.0, segment_bytes: int = 2**22, place: Place | None = None) -> None:
        super().__init__(timeout_s, segment_bytes, place)
        self._open_arena: Arena | None = None  # abort() looks for it
        try:
            self._open_arena = arena = self._make_arena()
        except BaseException as error:  # the other ranks wait for this one
            self.abort(f"{type(error).__name__}: {error}")
            raise
        self._all_reduces: AllReduce | None = AllReduce(arena)
        # A helper thread on the core of its rank made steps 2 to 8 % slower than to communicate in between.
        self.overlaps = arena.cores_per_rank > 1

    def _make_arena(self) -> Arena:
        place = self._place
        ensure_one_host(place.num_here, place.world_size)
        deadline = Deadline(self.timeout_s)
        return Arena(self.rank, self.world_size, self._store, self.why_hopeless, deadline, place.local_world_size)

    @classmethod
    def check_available(cls) -> None:
        doorbell.ensure_futex()
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
        assert self._all_reduces is not None  # as the arena
        self.traffic.count(tensor.nbytes)
        self._all_reduces.run(tensor if tensor.dim() == 1 else tensor.view(-1), op, Deadline(timeout_s))

    def _reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        flat = tensor.view(-1)
        reads = [(flat, [(rank, 0) for rank in self._own_rank_first()])] if self.rank == dst else []
        self._share(Offer("reduce", flat, flat, op=op, root=dst), reads, timeout_s)

    def _broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        flat = tensor.view(-1)
        if self.rank == src:
            self._share(Offer("broadcast", flat, flat, root=src), [], timeout_s)
        else:
            self._share(Offer("broadcast", flat, None, root=src), [(flat, [(src, 0)])], timeout_s)

    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        reads = [(chunk, [(rank, 0)]) for rank, chunk in enumerate(self._executor.blocks(output))]
        self._share(Offer("all_gather", input, input.view(-1)), reads, timeout_s)

    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        reads = [(output.view(-1), [(rank, self.rank) for rank in self._own_rank_first()])]
        self._share(Offer("reduce_scatter", output, input.view(-1), self.world_size, op), reads, timeout_s)

    def _gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        chunks = [] if output is None else self._executor.blocks(output)
        reads = [(chunk, [(rank, 0)]) for rank, chunk in enumerate(chunks)]
        self._share(Offer("gather", input, input.view(-1), root=dst), reads, timeout_s)

    def _scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        source = None if input is None else input.view(-1)
        reads = [(output.view(-1), [(src, self.rank)])]
        self._share(Offer("scatter", output, source, self.world_size, root=src), reads, timeout_s)

    def _all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        chunks = self._executor.blocks(output)
        reads = [(chunk, [(rank, self.rank)]) for rank, chunk in enumerate(chunks)]
        self._share(Offer("all_to_all", chunks[0], input.view(-1), self.world_size), reads, timeout_s)

    def _barrier(self, timeout_s: float) -> None:
        self.traffic.count(0)
        self._arena.meet(MEETING, NOWHERE, Deadline(timeout_s))

    def _share(self, offer: Offer, reads: Sequence[Read], timeout_s: float) -> None:
        self.traffic.count(0 if offer.source is None else offer.source.nbytes)
        share(self._arena, offer, reads, Deadline(timeout_s))

    def _own_rank_first(self) -> list[int]:
        """Return all ranks; what is read from memory that is also the target has to be read first."""
        return sorted(range(self.world_size), key=lambda rank: rank != self.rank)

    def shared_blocks(self, tensor: Tensor) -> Blocks:
        """Return what this rank works on in an all-reduce of ``tensor``, which came from `empty` on every rank.

        Every rank calls it. For measurements, and for collectives that others write.
        """
        self.ensure_usable("shared_blocks")
        assert self._all_reduces is not None
        if self._arena.heap.offset_of(tensor) == NOWHERE:
            raise ValueError(f"{self.who('shared_blocks')}: tensor is not in shared memory; make it with empty()")
        return self._all_reduces.blocks(tensor, Deadline(self.timeout_s))

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
            self._open_arena = self._all_reduces = None


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
