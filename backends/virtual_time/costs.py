"""What operations take on a network, and what they send."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from backends.executor.plan import planned
from backends.executor.program import program
from backends.virtual_time.clock import Times
from minidist.analysis.network import Link, Network, Ranks, Route, Seconds
from minidist.analysis.simulate import simulate
from minidist.collective import Run
from minidist.schedule import Schedule

MAX_KEPT = 4096
"""How many times of collectives are kept, and how many counts of what a rank sends."""


class Costs:
    """The times of some ranks on several networks, whose collectives run as schedules say.

    Args:
        schedules: by the name of the collective.
        networks: what a message takes.
        ranks: the places of the ranks on the networks.
    """

    def __init__(self, schedules: Mapping[str, Schedule], networks: Sequence[Network], ranks: Sequence[int]) -> None:
        self._schedules = schedules
        self._world = list(networks)
        self._networks = [_Among(network, ranks) for network in networks]
        if len(ranks) > 1:
            self.message(0, len(ranks) - 1, 1)  # refused where a network has not so many places
        self._ranks = list(ranks)
        self._seconds = functools.lru_cache(MAX_KEPT)(self._simulated)
        self.sent = functools.lru_cache(MAX_KEPT)(self._count)

    def among(self, ranks: Sequence[int]) -> Costs:
        """Return the costs of some of these ranks."""
        return Costs(self._schedules, self._world, [self._ranks[rank] for rank in ranks])

    def ends(self, run: Run, nbytes: int, begins: Sequence[Times]) -> list[Times]:
        """Return when each rank has finished a collective that each begins at its time.

        Args:
            run: the collective.
            nbytes: of its larger tensor.
            begins: by rank.
        """
        starts: NDArray[np.float64] = np.array(begins).T  # by network
        first = starts.min(axis=1)
        ends = [
            time + np.array(self._seconds(run, nbytes, network, tuple(late.tolist())))
            for network, (time, late) in enumerate(zip(first, starts - first[:, None], strict=True))
        ]
        return list(np.array(ends).T)

    def message(self, src: int, dst: int, nbytes: int) -> tuple[Times, Times]:
        """Return, by network, what the first byte of a message takes, and the slowest link for all of them."""
        routes = [network.route(src, dst, float(nbytes)) for network in self._networks]
        alphas = [route.alpha for route in routes]
        return np.array(alphas), np.array([nbytes * max(link.beta for link in route.links) for route in routes])

    def _simulated(self, run: Run, nbytes: int, network: int, late: tuple[float, ...]) -> Sequence[float]:
        return simulate(self._schedules[run.name], run, nbytes, self._networks[network], starts=late).ends

    def _count(self, run: Run, rank: int, numel: int) -> tuple[int, int]:
        """Return how many messages a rank sends, of how many elements; ``numel`` as for `Executor`."""
        steps = program(
            planned(self._schedules[run.name], run, rank), rank, numel, max(numel * run.world_size, 1), None
        )
        return steps.num_sent, steps.numel_sent


class _Among(Network):
    """A network for some of its ranks, whose rank r is ``ranks[r]``."""

    def __init__(self, network: Network, ranks: Sequence[int]) -> None:
        self._network = network
        self._ranks = np.array(ranks)
        self.start = network.start

    def route(self, src: int, dst: int, nbytes: float, reduces: bool = False) -> Route:
        return self._network.route(int(self._ranks[src]), int(self._ranks[dst]), nbytes, reduces)

    def reduction(self, rank: int, nbytes: float) -> tuple[Link, ...]:
        return self._network.reduction(int(self._ranks[rank]), nbytes)

    def alone(self, src: Ranks, dst: Ranks) -> tuple[Seconds, Seconds] | None:
        return self._network.alone(self._ranks[src], self._ranks[dst])
