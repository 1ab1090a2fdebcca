"""A model of several hosts, as they were measured: what is inside of each one, and the card that its ranks share.

What the card takes for a message is more than its bytes: each one costs it time, also where several leave at once,
which Culler et al., "LogP: towards a realistic model of parallel computation" (1993) call o. And a card that has rested
may let a first burst pass faster than its line. So the card has three tables, of three patterns of messages of one
size, each of them run again and again, and they are taken apart at every size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from minidist.analysis.network import Link, Network, Route, interpolated


class MeasuredHosts(Network):
    """Hosts as `experiments.calibrate` has measured them.

    A message between hosts is served by its card at both ends, which sends and receives, and by the direction that it
    takes through each of them; then it travels for ``alpha``, a delay in which the cards serve others. With c messages
    of a host each way, all of them at once take alpha + max(2 c x, c y). Alpha and x are those of the patterns
    ``exchange`` and ``fan``, in which c differs; y is what is left of ``one_way``. All three depend on the size.

    Args:
        hosts: the host of each rank, as numbers.
        start: seconds that a collective takes to begin.
        nbytes: the sizes, rising.
        one_way: seconds of one message of each size between two hosts, with nobody else about.
        exchange: seconds in which every rank sends one to the next host and receives one; see `exchanged`.
        fan: seconds in which every rank sends one to every rank of other hosts; see `fanned`.
        reduce: seconds in which each rank reduces so many bytes, all at once.
        inside: the network in a host, whose ranks are counted from 0; None where each host has one rank.

    Raises:
        ValueError: there is one host, a table is not as long as the others, or no network is inside of hosts that have
            several ranks.
    """

    def __init__(
        self,
        hosts: Sequence[int],
        start: float,
        nbytes: Sequence[float],
        one_way: Sequence[float],
        exchange: Sequence[float],
        fan: Sequence[float],
        reduce: Sequence[float],
        inside: Network | None = None,
    ) -> None:
        self.start = start
        self._hosts = list(hosts)
        self._local = [self._hosts[:rank].count(host) for rank, host in enumerate(self._hosts)]
        self._exchanged, self._fanned = exchanged(self._hosts), fanned(self._hosts)
        self._inside = inside
        self._sizes, self._one_way, self._exchange = list(nbytes), list(one_way), list(exchange)
        self._fan, self._reduce = list(fan), list(reduce)
        if len(set(self._hosts)) < 2:
            raise ValueError(f"hosts must be two or more, got those of ranks {self._hosts}")
        if len(self._sizes) < 2 or sorted(set(self._sizes)) != self._sizes:
            raise ValueError(f"nbytes must be two sizes or more, rising, got {self._sizes}")
        tables = {"one_way": self._one_way, "exchange": self._exchange, "fan": self._fan, "reduce": self._reduce}
        for name, table in tables.items():
            if len(table) != len(self._sizes) or not all(seconds >= 0 for seconds in table):
                raise ValueError(f"{name} must be {len(self._sizes)} numbers of seconds, 0 or more, got {table}")
        if inside is None and self._exchanged > 1:
            raise ValueError("inside must be a network, as there are hosts of several ranks, got None")

    def route(self, src: int, dst: int, nbytes: float, reduces: bool = False) -> Route:
        host, other = self._hosts[src], self._hosts[dst]
        if host == other:
            assert self._inside is not None
            route = self._inside.route(self._local[src], self._local[dst], nbytes, reduces)
            return Route(route.alpha, tuple(Link((host, link.name), link.beta) for link in route.links))
        alpha, each, direction = self._parts(nbytes)
        seconds = {("card", host): each, ("card", other): each, ("out", host): direction, ("in", other): direction}
        return Route(alpha, tuple(Link(name, time / nbytes if nbytes else 0.0) for name, time in seconds.items()))

    def _parts(self, nbytes: float) -> tuple[float, float, float]:
        """Return alpha, x and y of a message."""
        one_way, exchange, fan = (
            interpolated(self._sizes, table, nbytes) for table in (self._one_way, self._exchange, self._fan)
        )
        # The exchange is nearest to what most schedules do, so what a fan takes more than its line gives way to it.
        each = exchange / (2 * self._exchanged)
        if self._fanned > self._exchanged:
            slope = (fan - exchange) / (2 * (self._fanned - self._exchanged))
            each = min(max(slope, 0.0), each)
        alpha = exchange - 2 * self._exchanged * each
        return alpha, each, max(one_way - alpha, 0.0)

    def reduction(self, rank: int, nbytes: float) -> tuple[Link, ...]:
        seconds = interpolated(self._sizes, self._reduce, nbytes)
        return (Link(("reduce", rank), seconds / nbytes if nbytes else 0.0),)


def exchanged(hosts: Sequence[int]) -> int:
    """Return the most messages that leave a host where every rank sends one."""
    return max(Counter(hosts).values())


def fanned(hosts: Sequence[int]) -> int:
    """Return the most messages that leave a host where every rank sends one to each rank of the others."""
    return max(count * (len(hosts) - count) for count in Counter(hosts).values())
