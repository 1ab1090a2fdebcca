"""The cores that the ranks of a host share: only with one for each may a rank that waits keep its own busy."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

SPIN_S = 2e-3
"""How long a rank with a core to itself looks before it sleeps: a process that sleeps wakes late."""
Cores = tuple[str, list[int]]
"""A host, and the cores of it that a process may use."""


def here() -> Cores:
    """Return the cores of this process."""
    return socket.gethostname(), sorted(os.sched_getaffinity(0))


def per_rank(cores: Sequence[Cores], rank: int, local_world_size: int) -> int:
    """Return how many cores there are for each rank on the host of ``rank``, which is this one; 0 if fewer than ranks.

    A group of some ranks does not count cores that the other ranks of the job use too, ``local_world_size`` in all.
    """
    host = cores[rank][0]
    of_host = [mine for where, mine in cores if where == host]
    of_job = (os.cpu_count() or 1) // local_world_size
    return min(len(set().union(*of_host)) // len(of_host), of_job)
