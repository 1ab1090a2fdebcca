"""Models of networks: what a message from one rank to another takes, and which links it shares with others.

A message of m bytes that begins at time t is served by all links of its *route*. A link is a queue: it serves
messages in the order in which they begin, ``beta`` seconds per byte, and a message has left it at D = max(t, D
before) + beta m. The message arrives ``alpha`` seconds after the slowest of its links has served it. On a link of its
own that is alpha + beta m, the model of Hockney, "The communication challenge for MPP: Intel Paragon and Meiko CS-2"
(1994); on a shared link messages slow each other down, as they do in switches that interleave them. A rank reduces at
``gamma`` seconds per byte, one message after the other.

Units: seconds, bytes. A rank number is taken as it comes; hosts and switches hold consecutive ranks.
"""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ranks = NDArray[np.int64]
Seconds = NDArray[np.float64]


class Link(NamedTuple):
    """What serves one message at a time.

    Attributes:
        name: equal for the same link.
        beta: seconds per byte.
    """

    name: Hashable
    beta: float


class Route(NamedTuple):
    """How a message travels.

    Attributes:
        alpha: seconds that the first byte takes.
        links: what it shares with others.
    """

    alpha: float
    links: tuple[Link, ...]


class Network(ABC):
    """A model of what connects the ranks."""

    start: float = 0.0
    """Seconds that a rank takes to begin a collective."""

    @abstractmethod
    def route(self, src: int, dst: int, nbytes: float, reduces: bool = False) -> Route:
        """Return the way of a message of ``nbytes`` between two different ranks.

        ``reduces`` says that ``dst`` reduces it, for networks whose `reduction` is not apart from the way.
        """

    @abstractmethod
    def reduction(self, rank: int, nbytes: float) -> tuple[Link, ...]:
        """Return what ``rank`` reduces ``nbytes`` with; the slowest counts."""

    def alone(self, src: Ranks, dst: Ranks) -> tuple[Seconds, Seconds] | None:
        """Return alpha and beta of many messages at once, where each rank sends one and receives one.

        None says that they can share links even so, and have to be looked at one by one.
        """
        return None

    def gammas(self, world_size: int) -> Seconds:
        """Return the seconds per byte of the reductions of all ranks."""
        return np.array(
            [max((link.beta for link in self.reduction(rank, 1.0)), default=0.0) for rank in range(world_size)]
        )


class Flat(Network):
    """Every rank has a port into a switch that never is the bottleneck.

    Args:
        alpha: seconds per message.
        beta: seconds per byte.
        gamma: seconds per byte reduced.
        duplex: full: a port sends and receives at the same time; half: one after the other.

    Raises:
        ValueError: a value is negative or not a number, or there is no such duplex.
    """

    def __init__(self, alpha: float, beta: float, gamma: float = 0.0, duplex: str = "full") -> None:
        self._alpha, self._beta, self._gamma = _seconds(alpha=alpha, beta=beta, gamma=gamma)
        if duplex not in ("full", "half"):
            raise ValueError(f"duplex must be full or half, got {duplex!r}")
        self._full = duplex == "full"

    def route(self, src: int, dst: int, nbytes: float, reduces: bool = False) -> Route:
        # With half duplex what a rank sends and what it receives queue for one and the same link.
        out, into = (("out", src), ("in", dst)) if self._full else (("port", src), ("port", dst))
        return Route(self._alpha, (Link(out, self._beta), Link(into, self._beta)))

    def reduction(self, rank: int, nbytes: float) -> tuple[Link, ...]:
        return (Link(("reduce", rank), self._gamma),)

    def alone(self, src: Ranks, dst: Ranks) -> tuple[Seconds, Seconds] | None:
        # One message out of each port and one into it: in full duplex no link serves two.
        shape = np.ones(len(src))
        return (self._alpha * shape, self._beta * shape) if self._full else None


class Hosts(Network):
    """Hosts with links of their own between their ranks, and one network card each that all of them share.

    Args:
        ranks_per_host: how many ranks a host has.
        inside: the network in a host, whose ranks are counted from 0.
        outside: the network between hosts; each host is one of its ranks.

    Raises:
        ValueError: ranks_per_host is not at least 1.
    """

    def __init__(self, ranks_per_host: int, inside: Network, outside: Network) -> None:
        self._size = _count(ranks_per_host=ranks_per_host)
        self._inside = inside
        self._outside = outside
        self.start = inside.start

    def route(self, src: int, dst: int, nbytes: float, reduces: bool = False) -> Route:
        # Links are told apart by name, and each host counts its ranks from 0: so the host becomes a part of the name.
        # Outside, ranks of one host have one name already, which is how they share its card.
        host = src // self._size
        other = dst // self._size
        if host == other:
            route = self._inside.route(src % self._size, dst % self._size, nbytes, reduces)
            return Route(route.alpha, _renamed(("inside", host), route.links))
        route = self._outside.route(host, other, nbytes, reduces)
        return Route(route.alpha, _renamed("outside", route.links))

    def reduction(self, rank: int, nbytes: float) -> tuple[Link, ...]:
        host, local = divmod(rank, self._size)
        return _renamed(("inside", host), self._inside.reduction(local, nbytes))


class FatTree(Network):
    """Two levels of switches: leaves with ranks, and a core above whose links to the leaves may be too few.

    Args:
        ranks_per_leaf: how many ranks a leaf switch has.
        oversubscription: bandwidth of the ranks of a leaf over that of its links to the core; 1 is none.
        alpha, beta, gamma: of a rank's port, as in `Flat`.
        hop: seconds that a message through the core takes longer.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        ranks_per_leaf: int,
        oversubscription: float,
        alpha: float,
        beta: float,
        gamma: float = 0.0,
        hop: float = 0.0,
    ) -> None:
        self._size = _count(ranks_per_leaf=ranks_per_leaf)
        self._ports = Flat(alpha, beta, gamma)
        (self._hop,) = _seconds(hop=hop)
        if not 1 <= oversubscription < math.inf:
            raise ValueError(f"oversubscription must be at least 1, got {oversubscription}")
        # All ports of a leaf together have ranks_per_leaf / beta bytes per second; the way up has a part of that.
        self._up = beta * oversubscription / ranks_per_leaf

    def route(self, src: int, dst: int, nbytes: float, reduces: bool = False) -> Route:
        route = self._ports.route(src, dst, nbytes, reduces)
        leaf = src // self._size
        other = dst // self._size
        if leaf == other:
            return route
        # One link up and one down stand for all there are, as if the switches spread messages evenly over them.
        core = (Link(("up", leaf), self._up), Link(("down", other), self._up))
        return Route(route.alpha + self._hop, (*route.links, *core))

    def reduction(self, rank: int, nbytes: float) -> tuple[Link, ...]:
        return self._ports.reduction(rank, nbytes)


class Torus(Network):
    """A ring, or a torus of two dimensions; a message crosses the links between neighbours, each in its own direction.

    Messages go along the columns first, then along the rows, each the shorter way around.

    Args:
        rows, columns: of the torus; a ring has one row. Rank r stands in row r // columns.
        alpha: seconds per message.
        beta: seconds per byte on each link.
        gamma: seconds per byte reduced.
        hop: seconds for each link after the first.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self, rows: int, columns: int, alpha: float, beta: float, gamma: float = 0.0, hop: float = 0.0
    ) -> None:
        self._rows = _count(rows=rows)
        self._columns = _count(columns=columns)
        self._alpha, self._beta, self._gamma, self._hop = _seconds(alpha=alpha, beta=beta, gamma=gamma, hop=hop)

    def route(self, src: int, dst: int, nbytes: float, reduces: bool = False) -> Route:
        if max(src, dst) >= self._rows * self._columns:
            raise ValueError(f"a torus of {self._rows} x {self._columns} has no rank {max(src, dst)}")
        row, column = divmod(src, self._columns)
        to_row, to_column = divmod(dst, self._columns)
        # A link is where it begins and its direction: 1 and -1 in a row, 2 and -2 in a column.
        along = [(row, at, way) for at, way in _way(column, to_column, self._columns)]
        across = [(at, to_column, way * 2) for at, way in _way(row, to_row, self._rows)]
        links = tuple(Link(place, self._beta) for place in (*along, *across))
        return Route(self._alpha + self._hop * (len(links) - 1), links)

    def reduction(self, rank: int, nbytes: float) -> tuple[Link, ...]:
        return (Link(("reduce", rank), self._gamma),)


def _way(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield where a message is before each link on the shorter way around, and the direction."""
    forwards = (end - start) % size
    way = 1 if 2 * forwards <= size else -1  # forwards where both are as short
    for step in range(forwards if way == 1 else size - forwards):
        yield (start + way * step) % size, way


class Slow(Network):
    """Another network in which one rank, or one pair of ranks, is slower than the rest.

    Args:
        network: the network.
        factor: how many times slower.
        rank: the slow rank: its messages both ways, and its reductions.
        peer: if it is given, only the messages from ``rank`` to it are slow.

    Raises:
        ValueError: the factor is not at least 1.
    """

    def __init__(self, network: Network, factor: float, rank: int, peer: int | None = None) -> None:
        if not 1 <= factor < math.inf:
            raise ValueError(f"factor must be at least 1, got {factor}")
        self._network = network
        self._factor = factor
        self._rank = rank
        self._peer = peer
        self.start = network.start

    def route(self, src: int, dst: int, nbytes: float, reduces: bool = False) -> Route:
        route = self._network.route(src, dst, nbytes, reduces)
        if not (self._rank in (src, dst) if self._peer is None else (src, dst) == (self._rank, self._peer)):
            return route
        # The slow end holds up its message, not the links that others use. Its link is named by this object, too: one
        # slow network may stand in another, and they must not queue for each other.
        slowest = max(link.beta for link in route.links) * self._factor
        return Route(route.alpha * self._factor, (*route.links, Link(("slow", id(self), src, dst), slowest)))

    def reduction(self, rank: int, nbytes: float) -> tuple[Link, ...]:
        factor = self._factor if rank == self._rank and self._peer is None else 1.0
        return tuple(Link(link.name, link.beta * factor) for link in self._network.reduction(rank, nbytes))

    def alone(self, src: Ranks, dst: Ranks) -> tuple[Seconds, Seconds] | None:
        if (both := self._network.alone(src, dst)) is None:
            return None
        if self._peer is None:
            slow = (src == self._rank) | (dst == self._rank)
        else:
            slow = (src == self._rank) & (dst == self._peer)
        factor = np.where(slow, self._factor, 1.0)
        return both[0] * factor, both[1] * factor


class Measured(Network):
    """One host as `experiments.calibrate` has measured it, whose ranks share its cores and its memory.

    A message is served by the ports of its ranks, which take what a message takes that has the host for itself, and by
    the host, which takes its share of what an exchange takes in which all ranks send at once; reductions likewise, in
    one piece with their messages. So latency counts as work, which it is where ranks share cores. How long things take
    depends on the size; between two sizes, and beyond them, the time is interpolated on a line.

    Args:
        ranks: how many exchanged messages at once when it was measured.
        start: seconds that a collective takes to begin.
        nbytes: the sizes, rising.
        one_way: seconds of one message of each size, with nobody else about.
        exchange: seconds in which every rank sends and receives one.
        reduce: seconds in which one rank reduces so many bytes.
        reduce_all: seconds in which all ranks do.

    Raises:
        ValueError: a table is not as long as the others, or holds a negative number.
    """

    def __init__(
        self,
        ranks: int,
        start: float,
        nbytes: Sequence[float],
        one_way: Sequence[float],
        exchange: Sequence[float],
        reduce: Sequence[float],
        reduce_all: Sequence[float],
    ) -> None:
        self.ranks = _count(ranks=ranks)
        (self.start,) = _seconds(start=start)
        self._sizes = list(nbytes)
        if len(self._sizes) < 2 or sorted(set(self._sizes)) != self._sizes:
            raise ValueError(f"nbytes must be two sizes or more, rising, got {self._sizes}")
        tables = {"one_way": one_way, "exchange": exchange, "reduce": reduce, "reduce_all": reduce_all}
        for name, table in tables.items():
            if len(table) != len(self._sizes):
                raise ValueError(f"{name} must have a value for each of the {len(self._sizes)} sizes, got {len(table)}")
            _seconds(**{f"{name}[{index}]": value for index, value in enumerate(table)})
        self._one_way = list(one_way)
        self._exchange = list(exchange)
        self._reduce = list(reduce)
        self._reduce_all = list(reduce_all)

    def route(self, src: int, dst: int, nbytes: float, reduces: bool = False) -> Route:
        # An exchange moves one message of every rank, so one message keeps the host busy for its share of it. Where few
        # ranks send, their ports are slower than that.
        port = self._at(self._one_way, nbytes)
        host = self._at(self._exchange, nbytes)
        reduce, reduce_all = (
            (self._at(self._reduce, nbytes), self._at(self._reduce_all, nbytes)) if reduces else (0.0, 0.0)
        )
        seconds = {("out", src): port, ("in", dst): port + reduce, "host": (host + reduce_all) / self.ranks}
        # Alpha is 0, as latency is in these times. What has no bytes is not sent, so that it takes none is no matter.
        return Route(0.0, tuple(Link(name, time / nbytes if nbytes else 0.0) for name, time in seconds.items()))

    def reduction(self, rank: int, nbytes: float) -> tuple[Link, ...]:
        return ()  # it is in the times of its message

    def _at(self, seconds: list[float], nbytes: float) -> float:
        return interpolated(self._sizes, seconds, nbytes)


def interpolated(sizes: Sequence[float], seconds: Sequence[float], nbytes: float) -> float:
    """Return the seconds at ``nbytes`` on the lines between the sizes; beyond them with the slope at the end."""
    index = min(max(bisect.bisect(sizes, nbytes), 1), len(sizes) - 1)
    low, high = sizes[index - 1 : index + 1]
    first, last = seconds[index - 1 : index + 1]
    # Beneath the smallest size a steep line would go below 0.
    return max(first + (last - first) * (nbytes - low) / (high - low), 0.0)


def _renamed(where: Hashable, links: tuple[Link, ...]) -> tuple[Link, ...]:
    return tuple(Link((where, link.name), link.beta) for link in links)


def _seconds(**values: float) -> list[float]:
    for name, value in values.items():
        # `not 0 <= value`, as a value that is not a number is neither above 0 nor below; and to Python True is a 1.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number of seconds, 0 or more, got {value!r}")
    return list(values.values())


def _count(**values: int) -> int:
    ((name, value),) = values.items()
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value
