"""The base of every transport: with a send and a receive alone, all collectives work, as schedules over them.

To write a backend, derive from `ScheduledCommunicator` and implement `_isend` and `_irecv`. Override the collectives
that your transport does better. Every hook gets ``timeout_s`` and must end, one way or another, about then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from backends.contact import LEFT, ContactLostError
from backends.executor.executor import Executor
from backends.schedules import DEFAULTS
from minidist.communicator import Communicator, ReduceOp, Work
from minidist.contract import checks
from minidist.contract.inner import Inner
from minidist.contract.standing import Standing
from minidist.errors import CommError, PeerLostError


class ScheduledCommunicator(Communicator):
    """Every collective as a schedule over `_isend` and `_irecv`, which a backend has to bring.

    Args:
        rank, world_size, timeout_s: see `Communicator`.
        segment_bytes: the largest message; what is larger travels in segments. The same on all ranks.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float = 300.0, segment_bytes: int = 2**22) -> None:
        super().__init__(rank, world_size, timeout_s)
        self.segment_bytes = checks.segment_bytes(segment_bytes)
        self._executor = Executor(Inner(self), DEFAULTS, self._schedule_tag, segment_bytes, proves=False)

    def _collective(self, name: str) -> Callable[..., None]:
        hook: Callable[..., None] = getattr(self, f"_{name}")
        return hook

    # Hooks: what a backend may do better; they block until it is done -------------------------

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        """Combine in place. ``op`` is never AVG in any hook: the caller divides."""
        self._executor.all_reduce(tensor, op, timeout_s)

    def _reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        """Only dst's result counts: ``tensor`` is scratch on the other ranks."""
        self._executor.reduce(tensor, dst, op, timeout_s)

    def _broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        self._executor.broadcast(tensor, src, timeout_s)

    def _all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        """``input`` may be this rank's block of ``output``."""
        self._executor.all_gather(output, input, timeout_s)

    def _reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        """``input`` keeps its values."""
        self._executor.reduce_scatter(output, input, op, timeout_s)

    def _gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        """``output`` is None but on dst."""
        self._executor.gather(output, input, dst, timeout_s)

    def _scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        """``input`` is None but on src."""
        self._executor.scatter(output, input, src, timeout_s)

    def _all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        self._executor.all_to_all(output, input, timeout_s)

    def _barrier(self, timeout_s: float) -> None:
        self._executor.barrier(timeout_s)

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        channel = self._new_channel()
        ranks = next((group for group in groups if self.rank in group), None)
        return None if ranks is None else GroupCommunicator(self, ranks, channel)


class GroupCommunicator(ScheduledCommunicator):
    """Some ranks of a communicator as a communicator: the split of backends that have none of their own.

    The ranks ``ranks`` of ``parent``, in that order, on a channel of their own.

    It borrows the parent: closing it leaves the parent open, and the parent has to outlive it.
    """

    def __init__(self, parent: ScheduledCommunicator, ranks: list[int], channel: int) -> None:
        super().__init__(ranks.index(parent.rank), len(ranks), parent.timeout_s, parent.segment_bytes)
        self._parent = Inner(parent)
        self._ranks = ranks
        self._parent.put_on_channel(self, channel)
        self._executor.tag = self._schedule_tag
        self.checks_sizes = parent.checks_sizes  # not the dtypes: its errors would name the ranks of the parent

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        return self._parent.isend(tensor, self._ranks[dst], tag, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        return self._parent.irecv(tensor, self._ranks[src], tag, timeout_s)

    def _abort(self, reason: str) -> None:
        self._parent.comm.abort(reason)

    def _standings(self, channel: int, timeout_s: float) -> Mapping[int, Standing]:
        found = self._parent.standings(channel, timeout_s)
        return {self._ranks.index(rank): standing for rank, standing in found.items() if rank in self._ranks}

    def _gone(self) -> Mapping[int, str]:
        gone = self._parent.gone()
        return {self._ranks.index(rank): why for rank, why in gone.items() if rank in self._ranks}

    def _translate(self, error: Exception) -> CommError:
        failure = self._parent.translate(error)
        if isinstance(error, ContactLostError) and isinstance(failure, PeerLostError):
            peers = tuple(self._ranks.index(rank) for rank in failure.peers if rank in self._ranks)
            return PeerLostError(f"rank {peers[0]} is gone: {LEFT}", peers) if peers else failure
        return failure
