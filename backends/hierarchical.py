"""Two levels of communicators: one inside of each host, and one between the hosts.

Source: Jia et al., "Highly scalable deep learning training system with mixed-precision: training ImageNet in four
minutes" (2018), and the hierarchical all-reduce of Horovod and NCCL. `backends.two_level` is the same as one schedule
over one transport; here each level is a communicator of its own kind.

Nomenclature: h hosts; a *lane* is made of one rank of every host, and there are as many lanes as the smallest host has
ranks. Lane 0 is that of the *leaders*. On hosts of 3 and 2 ranks::

    host 0   rank 0   rank 1   rank 2
    host 1   rank 3   rank 4
             lane 0   lane 1            rank 2 is in none

An all-reduce adds up inside of each host, so that the rank in lane i holds shard i complete for its host; each lane
all-reduces its shard; then the shards spread inside of the hosts. A large tensor goes in pieces, whose ways between
and inside of the hosts overlap. Everything else goes over the leaders: what a host has to send to another one travels
as one message.

Cost of an all-reduce of M bytes, with k lanes and rings between the hosts: 2 (h-1) steps there; each rank of a lane
sends 2 (h-1)/h M/k bytes to other hosts, each host 2 (h-1)/h M, which is the least possible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backends.deadline import Deadline
from backends.levels import Level, Piece, Placement
from backends.processes.rendezvous import place_among
from backends.wrapper import Wrapper
from minidist import launch
from minidist.communicator import Communicator, Device, ReduceOp, Shape, Work
from minidist.contract.carriers import bytes_of
from minidist.contract.work import DONE
from minidist.errors import CommError, CommTimeoutError, PeerLostError

MAX_PIECES = 4
PIECE_BYTES = 2**20
"""The least of a piece, as each costs a few messages and a change of threads."""

LATE = 0.2
"""The part of an operation's time in which others may have run out of theirs."""


class HierarchicalCommunicator(Wrapper):
    """All collectives on two levels; messages go over ``inter``. See `Wrapper`.

    Args:
        intra: makes what joins the ranks of one host, called with their ``place``, as `ShmCommunicator` is; None for a
            split of ``inter``.
        inter: a communicator of all ranks, of which each lane gets a split.
        timeout_s: None for that of ``inter``.
        host: what tells this host from others; None asks the system.
    """

    def __init__(
        self,
        intra: Callable[..., Communicator] | None,
        inter: Communicator,
        timeout_s: float | None = None,
        host: str | None = None,
    ) -> None:
        super().__init__(inter, timeout_s)
        self._make_intra = intra
        self._host = launch.host_id() if host is None else host
        self._where = where = Placement(inter.all_gather_object(self._host), self.rank)
        splits = list(self.traffic.splits)
        neighbours = inter.split(where.host)
        assert neighbours is not None  # every rank is on a host
        self._inside = Level(_joined(neighbours, intra), where.here)
        lane = inter.split(where.local if where.local < where.num_lanes else None)
        self._across = None if lane is None else Level(lane, [ranks[where.local] for ranks in where.ranks_of])
        self.traffic.splits[:] = splits  # what the levels send, `_collective` counts as sent here

    def empty(self, shape: Shape, dtype: torch.dtype = torch.float32, device: Device = None) -> Tensor:
        return self._inside.comm.empty(shape, dtype, device)

    def _collective(self, name: str) -> Callable[..., None]:
        hook: Callable[..., None] = getattr(self, f"_{name}")

        def run(*args: Any) -> None:
            *others, timeout_s = args
            before, deadline = self._sent(), Deadline(timeout_s)
            try:
                hook(*others, deadline)
            except PeerLostError as error:
                raise self._cause(error, deadline) from error
            except Exception as error:
                self._abort_levels(f"{type(error).__name__}: {error}")
                raise
            finally:
                messages, nbytes = self._sent()
                self.traffic.messages += messages - before[0]
                self.traffic.bytes += nbytes - before[1]

        return run

    # Reductions -------------------------------------------------------------------------------

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, deadline: Deadline) -> None:
        """While a piece is between the hosts, the next one is added up inside of them, and the last one spreads."""
        cut = min(MAX_PIECES, max(tensor.nbytes // PIECE_BYTES, 1))
        pieces = [Piece(part, self._where) for part in tensor.view(-1).tensor_split(cut)]
        works: list[Work] = []
        for index, piece in enumerate(pieces):
            self._add_up_inside(piece, op, deadline)
            works.append(self._start_across(piece, op, cut > 1, deadline))
            if index:
                self._spread_inside(pieces[index - 1], works[index - 1], deadline)
        self._spread_inside(pieces[-1], works[-1], deadline)

    def _add_up_inside(self, piece: Piece, op: ReduceOp, deadline: Deadline) -> None:
        """Leave each shard complete for this host with the rank of its lane."""
        if piece.shared.numel() and not self._where.fits:
            self._inside.run("all_reduce", piece.flat, op, deadline=deadline)
            return
        if piece.shared.numel():
            self._inside.run("reduce_scatter", piece.block, piece.shared, op, deadline=deadline)
        if piece.rest.numel():
            self._inside.run("reduce", piece.rest, self._where.num_lanes - 1, op, deadline=deadline)

    def _start_across(self, piece: Piece, op: ReduceOp, async_op: bool, deadline: Deadline) -> Work:
        """Let the lane of this rank, if any, begin to add its shard up."""
        if self._across is None or not piece.shard.numel():
            return DONE
        return self._across.start("all_reduce", piece.shard, op, async_op, deadline=deadline)

    def _spread_inside(self, piece: Piece, across: Work, deadline: Deadline) -> None:
        """Give all ranks of this host what each lane has come to."""
        if self._across is not None:
            self._across.finish(across)
        if piece.shared.numel() and not self._where.fits:
            for lane, shard in enumerate(piece.shards):
                self._inside.run("broadcast", shard, lane, deadline=deadline)
            return
        if piece.shared.numel():
            self._inside.run("all_gather", piece.shared, piece.block, deadline=deadline)
        if piece.rest.numel():
            self._inside.run("broadcast", piece.rest, self._where.num_lanes - 1, deadline=deadline)

    def _reduce(self, tensor: Tensor, dst: int, op: ReduceOp, deadline: Deadline) -> None:
        host, _ = self._where.of(dst)
        self._inside.run("reduce", tensor, 0, op, deadline=deadline)
        self._between_leaders("reduce", tensor, host, op, deadline=deadline)
        self._hand_over(tensor, dst, deadline)

    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, deadline: Deadline) -> None:
        where, rows = self._where, input.view(self.world_size, -1)
        if where.is_even and self._across is not None:
            of_lane = self._rows(len(where.ranks_of), output)
            self._inside.run("reduce_scatter", of_lane, self._as_shared(rows[where.by_lane]), op, deadline=deadline)
            self._across.run("reduce_scatter", output, of_lane, op, deadline=deadline)
            return
        added = self._as_shared(rows)
        self._inside.run("reduce", added, 0, op, deadline=deadline)
        of_host = self._rows(where.width, output)
        if where.is_leader:
            self._between_leaders("reduce_scatter", of_host, self._padded(added), op, deadline=deadline)
        self._inside.run("scatter", output, *self._of_leader(of_host), 0, deadline=deadline)

    # Moves ------------------------------------------------------------------------------------

    def _broadcast(self, tensor: Tensor, src: int, deadline: Deadline) -> None:
        host, local = self._where.of(src)
        if self._where.host == host:
            self._inside.run("broadcast", tensor, local, deadline=deadline)
        self._between_leaders("broadcast", tensor, host, deadline=deadline)
        if self._where.host != host:
            self._inside.run("broadcast", tensor, 0, deadline=deadline)

    def _all_gather(self, output: Tensor, input: Tensor, deadline: Deadline) -> None:
        where, own, rows = self._where, bytes_of(input), bytes_of(output).view(self.world_size, -1)
        if where.is_even and self._across is not None:
            of_lane = self._rows(len(where.ranks_of), own)
            self._across.run("all_gather", of_lane, own, deadline=deadline)
            by_lane = self._rows(self.world_size, own)
            self._inside.run("all_gather", by_lane, of_lane, deadline=deadline)
            rows[where.by_lane] = by_lane
            return
        of_host = self._gathered_here(own, deadline)
        table = self._rows(len(where.ranks_of) * where.width, own)
        self._between_leaders("all_gather", table, of_host, deadline=deadline)
        if where.is_leader:
            rows.copy_(table[where.slots])
        self._inside.run("broadcast", rows, 0, deadline=deadline)

    def _gather(self, output: Tensor | None, input: Tensor, dst: int, deadline: Deadline) -> None:
        where, own, (host, _) = self._where, bytes_of(input), self._where.of(dst)
        of_host = self._gathered_here(own, deadline)
        rows = self._rows(self.world_size, own) if output is None else bytes_of(output).view(self.world_size, -1)
        table = self._rows(len(where.ranks_of) * where.width, own) if where.host == host else None
        self._between_leaders("gather", table, of_host, host, deadline=deadline)
        if where.is_leader and table is not None:
            rows.copy_(table[where.slots])
        self._hand_over(rows, dst, deadline)

    def _scatter(self, output: Tensor, input: Tensor | None, src: int, deadline: Deadline) -> None:
        where, own, (host, local) = self._where, bytes_of(output), self._where.of(src)
        rows = self._rows(self.world_size, own) if input is None else bytes_of(input).view(self.world_size, -1)
        if where.host == host and local != 0:
            self._pass(rows, local, 0, deadline)
        table = self._padded(rows) if where.is_leader and where.host == host else None
        of_host = self._rows(where.width, own)
        self._between_leaders("scatter", of_host, table, host, deadline=deadline)
        self._inside.run("scatter", own, *self._of_leader(of_host), 0, deadline=deadline)

    def _all_to_all(self, output: Tensor, input: Tensor, deadline: Deadline) -> None:
        """The leaders exchange blocks of (source, target) pairs: all that one host has for another."""
        where, own = self._where, bytes_of(input)
        width, here, num_hosts = where.width, len(where.here), len(where.ranks_of)
        of_host = self._gathered_here(own, deadline)
        pairs = back = None
        if where.is_leader:
            sources = of_host[:here].view(here, self.world_size, -1)
            pairs = sources.new_zeros(num_hosts, width, width, sources.shape[2])
            padded = sources.new_zeros(here, num_hosts * width, sources.shape[2])
            padded[:, where.slots] = sources
            pairs[:, :here] = padded.view(here, num_hosts, width, -1).transpose(0, 1)
            back = torch.empty_like(pairs)
        self._between_leaders("all_to_all", back, pairs, deadline=deadline)
        targets = None
        if back is not None:
            by_target = back.permute(2, 0, 1, 3).reshape(width, num_hosts * width, -1)
            targets = by_target[:here, where.slots].contiguous()
        self._inside.run("scatter", bytes_of(output), targets, 0, deadline=deadline)

    def _barrier(self, deadline: Deadline) -> None:
        self._inside.run("barrier", deadline=deadline)
        self._between_leaders("barrier", deadline=deadline)
        self._inside.run("barrier", deadline=deadline)

    # What they are made of --------------------------------------------------------------------

    def _between_leaders(self, operation: str, *args: Any, deadline: Deadline) -> None:
        if self._where.is_leader and self._across is not None:
            self._across.run(operation, *args, deadline=deadline)

    def _gathered_here(self, own: Tensor, deadline: Deadline) -> Tensor:
        """Return the rows of this host, padded; only the leader's mean anything."""
        of_host = self._rows(self._where.width, own)
        self._inside.run("gather", *self._of_leader(of_host), own, 0, deadline=deadline)
        return of_host

    def _of_leader(self, of_host: Tensor) -> tuple[Tensor | None]:
        """Return what only the leader gives to a collective of its host: the rows without their padding."""
        return (of_host[: len(self._where.here)] if self._where.is_leader else None,)

    def _hand_over(self, tensor: Tensor, dst: int, deadline: Deadline) -> None:
        """Bring what the leader of the host of ``dst`` has there."""
        host, local = self._where.of(dst)
        if self._where.host == host and local != 0:
            self._pass(tensor, 0, local, deadline)

    def _pass(self, tensor: Tensor, src: int, dst: int, deadline: Deadline) -> None:
        """Send from one rank of this host to another one."""
        if self._where.local == src:
            self._inside.run("send", tensor, dst, deadline=deadline)
        elif self._where.local == dst:
            self._inside.run("recv", tensor, src, deadline=deadline)

    def _rows(self, count: int, like: Tensor) -> Tensor:
        """Return memory for rows that are as large as a tensor."""
        return self.empty((count, like.numel()), like.dtype)

    def _as_shared(self, rows: Tensor) -> Tensor:
        return self.empty(rows.shape, rows.dtype).copy_(rows)

    def _padded(self, rows: Tensor) -> Tensor:
        table = rows.new_zeros(len(self._where.ranks_of) * self._where.width, rows.shape[1])
        table[self._where.slots] = rows
        return table

    # Life -------------------------------------------------------------------------------------

    def _levels(self) -> list[Communicator]:
        return [level.comm for level in (self._across, self._inside) if level is not None]

    def _sent(self) -> tuple[int, int]:
        levels = self._levels()
        return sum(comm.traffic.messages for comm in levels), sum(comm.traffic.bytes for comm in levels)

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        child = self._inner.split(groups)
        return None if child is None else HierarchicalCommunicator(self._make_intra, child, self.timeout_s, self._host)

    def _cause(self, error: PeerLostError, deadline: Deadline) -> CommError:
        """Return why a rank has left a level: most often as another one is lost, of which all hear in a moment."""
        self._abort_levels(str(error))
        # A rank whose time is up leaves its levels, which can reach us before our own time is up.
        if deadline.left_s < LATE * deadline.timeout_s:
            return CommTimeoutError(f"no answer within {deadline.timeout_s:.3g} s; a rank did not take part")
        cause = self._lost() if self._gone() else self._inner.translate(RuntimeError(str(error)))
        return cause if isinstance(cause, PeerLostError) else error

    def _close(self) -> None:
        for comm in self._levels():
            comm.close()
        super()._close()

    def _abort(self, reason: str) -> None:
        super()._abort(reason)  # first: what all hear of is the cause, and that a rank left its levels is not
        self._abort_levels(reason)

    def _abort_levels(self, reason: str) -> None:
        """Let those go who wait on one level for a rank that has failed on the other."""
        for comm in self._levels():
            comm.abort(reason)


def _joined(neighbours: Communicator, make: Callable[..., Communicator] | None) -> Communicator:
    """Return a communicator of the kind that is wanted, of the ranks of one host, which have one already."""
    if make is None:
        return neighbours
    with neighbours:
        made = make(place=place_among(neighbours))
        made.recorder.among(range(made.world_size), neighbours.recorder)
        return made
