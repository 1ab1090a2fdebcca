"""Whether the ranks of a host have a core each: only then may one that waits keep its core busy."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

Cores = tuple[str, list[int]]
"""A host, and the cores of it that a process may use."""


def here() -> Cores:
    """Return the cores of this process."""
    return socket.gethostname(), sorted(os.sched_getaffinity(0))


def one_each(cores: Sequence[Cores], rank: int) -> bool:
    """Return whether the ranks on the host of ``rank`` have together as many cores as they are."""
    host = cores[rank][0]
    of_host = [mine for where, mine in cores if where == host]
    return len(set().union(*of_host)) >= len(of_host)
