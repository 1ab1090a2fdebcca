"""Some ranks of a communicator as a communicator: the split of backends that have none of their own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from backends.contact import LEFT, ContactLostError
from backends.scheduled import ScheduledCommunicator
from minidist.communicator import Work
from minidist.errors import CommError, PeerLostError


class GroupCommunicator(ScheduledCommunicator):
    """The ranks ``ranks`` of ``parent``, in that order, on a channel of their own.

    It borrows the parent: closing it leaves the parent open, and the parent has to outlive it.
    """

    def __init__(self, parent: ScheduledCommunicator, ranks: list[int], channel: int) -> None:
        super().__init__(ranks.index(parent.rank), len(ranks), parent.timeout_s, parent.segment_bytes)
        self._parent, self._ranks = parent, ranks
        self._root, self._channel = parent._root, channel
        self.checks_sizes = parent.checks_sizes  # not the dtypes: its errors would name the ranks of the parent

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        return self._parent._isend(tensor, self._ranks[dst], tag, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        return self._parent._irecv(tensor, self._ranks[src], tag, timeout_s)

    def _abort(self, reason: str) -> None:
        self._parent.abort(reason)

    def _gone(self) -> Mapping[int, str]:
        gone = self._parent._gone()
        return {self._ranks.index(rank): why for rank, why in gone.items() if rank in self._ranks}

    def _translate(self, error: Exception) -> CommError:
        failure = self._parent._translate(error)
        if isinstance(error, ContactLostError) and isinstance(failure, PeerLostError):
            peers = tuple(self._ranks.index(rank) for rank in failure.peers if rank in self._ranks)
            return PeerLostError(f"rank {peers[0]} is gone: {LEFT}", peers) if peers else failure
        return failure


def group_of(parent: ScheduledCommunicator, groups: list[list[int]]) -> GroupCommunicator | None:
    """Return the communicator of this rank's group, if it is in one; all ranks of ``parent`` call it."""
    channel = parent._new_channel()
    ranks = next((group for group in groups if parent.rank in group), None)
    return None if ranks is None else GroupCommunicator(parent, ranks, channel)
