"""What communicators between processes have in common: how they meet, and how they learn which rank is gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch.distributed as dist

from backends.contact import LEFT
from backends.deadline import Deadline
from backends.processes.lifeline import OUTAGE_S, Lifeline
from backends.processes.rendezvous import meet
from backends.scheduled import ScheduledCommunicator
from minidist.communicator import Communicator
from minidist.contract import checks
from minidist.contract.addresses import LOOPBACK
from minidist.contract.place import Place
from minidist.contract.standing import Standing
from minidist.launch import host_id


class ProcessCommunicator(ScheduledCommunicator):
    """Ranks that are processes: they meet at a store, and a `Lifeline` beside their data path joins them.

    Args:
        timeout_s, segment_bytes: see `ScheduledCommunicator`.
        place: where it is, if that is known, as in a split; None for all processes of the world, which then meet.
        outage_s: how long a host may be out of reach; one that still is 2 s later is lost.

    Raises:
        CommTimeoutError: not every rank came within ``timeout_s``.
        BackendUnavailableError: see `check_available`.
    """

    def __init__(
        self,
        timeout_s: float = 300.0,
        segment_bytes: int = 2**22,
        place: Place | None = None,
        outage_s: float = OUTAGE_S,
    ) -> None:
        checks.group(0, 1, timeout_s)
        if not outage_s > 0:
            raise ValueError(f"outage_s must be greater than 0 seconds, got {outage_s}")
        self.outage_s = outage_s
        self._start = Deadline(timeout_s)
        if place is None:
            self.check_available()
            place = meet(timeout_s).place()
        super().__init__(place.rank, place.world_size, timeout_s, segment_bytes)
        self._place = place
        self._store = place.store
        self._num_splits = 0
        self._lifeline = Lifeline(
            place.store,
            place.host,
            self.rank,
            self.world_size,
            self._interrupt,
            self._start.left_s,
            outage_s,
            self._standing,
        )

    def _interrupt(self) -> None:
        """Make operations that run in other threads fail."""
        raise NotImplementedError

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        self._num_splits += 1
        mine = self._place.address, host_id()
        everyone = self.all_gather_object(mine)
        for index, ranks in enumerate(groups):
            if self.rank in ranks:
                num_here = sum(everyone[rank][1] == mine[1] for rank in ranks)
                place = replace(
                    self._place,
                    rank=ranks.index(self.rank),
                    world_size=len(ranks),
                    store=dist.PrefixStore(f"split{self._num_splits}/{index}", self._store),
                    host=LOOPBACK if num_here == len(ranks) else everyone[ranks[0]][0],
                    num_here=num_here,
                )
                return self._made_at(place)
        return None

    def _made_at(self, place: Place) -> Communicator:
        """Return a communicator like this one for a part of its ranks."""
        return type(self)(self.timeout_s, self.segment_bytes, place, self.outage_s)

    def _close(self) -> None:
        self._lifeline.leave()

    def _abort(self, reason: str) -> None:
        self._lifeline.abort(reason)
        self._interrupt()

    def _standings(self, channel: int, timeout_s: float) -> Mapping[int, Standing]:
        return self._lifeline.standings(channel, self.world_size, timeout_s)

    def _gone(self) -> Mapping[int, str]:
        return self._lifeline.lost

    def _report_left(self, peer: int | None) -> None:
        """Tell all that a rank which said farewell was still needed, if that is all that is known.

        Args:
            peer: the one that was waited for; None where all were.
        """
        left = self._lifeline.left & ({peer} if peer is not None else self._lifeline.left)
        if left and not self._lifeline.lost:
            self._lifeline.report(min(left), LEFT)
