"""Which hosts are out of reach: MPI waits for them as if they were slow, or ends the process after half a minute.

Where the world is on several hosts, its processes are joined by a `Lifeline` as well, one for all communicators.
"""

from __future__ import annotations

import atexit
import functools
from typing import Any

import torch.distributed as dist

from backends.processes.lifeline import Lifeline
from backends.processes.rendezvous import CONNECT_S, meet
from minidist.contract.forks import only_here
from minidist.launch import host_id


@functools.cache
def lifeline(MPI: Any) -> Lifeline | None:
    """Return the lifeline of this process, None on one host; all processes of the world make the first call together.

    Its ranks are those of the world.
    """
    if len(set(MPI.COMM_WORLD.allgather(host_id()))) == 1:
        return None
    place = meet().place()
    store = dist.PrefixStore("lifeline", place.store)
    made = Lifeline(store, place.host, place.rank, place.world_size, _nothing, CONNECT_S)
    atexit.register(only_here(made.leave))  # before MPI's own end, in which all wait for all
    return made


def _nothing() -> None:
    """Whoever waits in MPI looks by itself."""
