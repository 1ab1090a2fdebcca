"""A model of a network whose links ranks of one host really share: who sends learns when its message arrives.

It keeps for each link until when it is busy, in memory that all ranks see, so that messages of different ranks queue
for a card that they share, as `minidist.analysis.network` says.
"""

from __future__ import annotations

import copy
import fcntl
import functools
import threading
from collections.abc import Hashable, Sequence

import numpy as np

from backends.pacing.page import Page
from minidist.analysis.network import Network
from minidist.communicator import Communicator
from minidist.launch import host_id


class SharedNetwork:
    """A network that all ranks of a communicator use, and its splits; all ranks make it.

    Args:
        comm: of the ranks, all on one host.
        network: the model; that of rank 0 counts.

    Raises:
        ValueError: the ranks are on several hosts, or too many for the model; on all of them.
    """

    def __init__(self, comm: Communicator, network: Network) -> None:
        hosts = len(set(comm.all_gather_object(host_id())))
        if hosts > 1:
            raise ValueError(
                f"a paced network stands for the one between hosts, so all ranks have to be on one host, but they are "
                f"on {hosts}; choose the transport itself, as in comm=gloo"
            )
        self._network: Network = comm.broadcast_object(network, 0)
        ranks = range(comm.world_size)
        names = dict[Hashable, int]()
        for src in ranks:
            for dst in ranks:
                for link in () if src == dst else self._network.route(src, dst, 1.0).links:
                    names.setdefault(link.name, len(names))
        self._ranks: Sequence[int] = ranks
        self._page = Page(comm, max(len(names), 1))
        self._free = self._page.words.view(np.float64)
        self._lock = threading.Lock()
        self._way = functools.lru_cache(1024)(functools.partial(_way, self._network, names))

    def among(self, ranks: Sequence[int]) -> SharedNetwork:
        """Return the same network for a split, whose rank r is ``ranks[r]`` here."""
        part = copy.copy(self)
        part._ranks = [self._ranks[rank] for rank in ranks]
        return part

    def send(self, src: int, dst: int, nbytes: int, begins: float) -> tuple[float, float]:
        """Put a message on its way; return when it arrives, and how long its first byte takes.

        Times are those of `time.monotonic`, which is one clock for all processes of a host.
        """
        alpha, betas = self._way(self._ranks[src], self._ranks[dst], nbytes)
        with self._lock:  # the file's lock does not tell the threads of one rank apart
            fcntl.flock(self._page.file, fcntl.LOCK_EX)
            try:
                served = begins
                for link, beta in betas:
                    self._free[link] = free = max(begins, self._free[link]) + beta * nbytes
                    served = max(served, free)
            finally:
                fcntl.flock(self._page.file, fcntl.LOCK_UN)
        return served + alpha, alpha


def _way(
    network: Network, names: dict[Hashable, int], src: int, dst: int, nbytes: int
) -> tuple[float, list[tuple[int, float]]]:
    """Return alpha, and each link by its place with its beta."""
    route = network.route(src, dst, float(nbytes))
    return route.alpha, [(names[link.name], link.beta) for link in route.links]
