"""What joins the processes of a world beside MPI: a `Lifeline`, one for all communicators.

Which hosts are out of reach it knows alone: MPI waits for them as if they were slow, or ends the process after half a
minute. And over it ranks ask each other how far they have come. Nothing of it is on the way of data.
"""

from __future__ import annotations

import atexit
import functools
import weakref
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from backends.processes.inquiry import OwnStanding
from backends.processes.lifeline import Lifeline
from backends.processes.rendezvous import CONNECT_S, meet
from minidist.contract.forks import only_here
from minidist.contract.standing import Standing

CHANNEL_BITS = 32
"""How much of the lifeline's channel is that of one communicator."""


class Reach:
    """The processes of a world, by their ranks there.

    Making one is collective.
    """

    def __init__(self) -> None:
        place = meet().place()
        self._own_standings: dict[int, weakref.WeakMethod[OwnStanding]] = {}  # by key
        self._world_size = place.world_size
        self._lifeline = Lifeline(
            dist.PrefixStore("lifeline", place.store),
            place.host,
            place.rank,
            place.world_size,
            _nothing,
            CONNECT_S,
            own_standing=self._standing,
        )
        atexit.register(only_here(self._lifeline.leave))  # before MPI's own end, in which all wait for all

    @property
    def lost(self) -> Mapping[int, str]:
        """The processes that cannot be reached, and why."""
        return self._lifeline.lost

    def watch(self, key: str, own_standing: OwnStanding) -> None:
        """Let this method tell how far this rank has come on the communicator ``key``, for as long as that lives."""
        living = {old: method for old, method in self._own_standings.items() if method() is not None}
        self._own_standings = {**living, int(key, 16): weakref.WeakMethod(own_standing)}

    def standings(self, key: str, channel: int, timeout_s: float) -> dict[int, Standing]:
        """Return how far each process has come on a channel of a communicator, if it is in that."""
        return self._lifeline.standings(int(key, 16) << CHANNEL_BITS | channel, self._world_size, timeout_s)

    def _standing(self, channel: int) -> Standing | None:
        method = self._own_standings.get(channel >> CHANNEL_BITS)
        own_standing = None if method is None else method()
        return None if own_standing is None else own_standing(channel % (1 << CHANNEL_BITS))


@functools.cache
def reach(MPI: Any) -> Reach | None:
    """Return that of this process, None in a world of one; all processes of the world make the first call together."""
    return Reach() if MPI.COMM_WORLD.size > 1 else None


def _nothing() -> None:
    """Whoever waits in MPI looks by itself."""
