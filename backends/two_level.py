"""Two levels of rings: inside of each host, and between the hosts.

Source: Jia et al., "Highly scalable deep learning training system with mixed-precision: training ImageNet in four
minutes" (2018), and the hierarchical all-reduce of Horovod and NCCL.

Nomenclature: h hosts with k ranks each, n = h k; ranks are numbered host by host in what follows. The tensor is cut
into k shards of h chunks. Inside of a host a ring reduce-scatter leaves rank k' of it with shard k'; the ranks k' of
all hosts all-reduce it by a ring; a ring all-gather inside of the host spreads the result.

Cost for M bytes: 2 (k-1) steps inside of hosts and 2 (h-1) between them, where a ring over all ranks takes 2 (n-1);
each rank sends 2 (k-1)/k M bytes inside and 2 (h-1)/n M outside, together the least possible.

On 2 hosts with 2 ranks, chunks a b c d::

    host 0              host 1
    rank 0    rank 1    rank 2    rank 3
    a b c d   a b c d   a b c d   a b c d
    a b           c d   a b           c d       reduce-scatter inside: shards a b and c d
    A B           C D   A B           C D       all-reduce between ranks 0 and 2, 1 and 3
    A B C D   A B C D   A B C D   A B C D       all-gather inside
"""

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from functools import partial

from backends.algorithm import AlgorithmCommunicator
from backends.ring import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from minidist import launch
from minidist.communicator import Communicator
from minidist.errors import CommError
from minidist.schedule import Schedule, Step, among


def two_level_all_reduce(
    rank: int, world_size: int, ranks_per_host: int, order: Sequence[int] | None = None
) -> Iterator[Step]:
    """Reduce-scatter inside of the host, all-reduce between hosts, all-gather inside.

    Args:
        rank: this one.
        world_size: the number of ranks.
        ranks_per_host: how many ranks each host has.
        order: the ranks host by host; None where they are numbered so.
    """
    order = order or range(world_size)
    num_hosts = world_size // ranks_per_host
    host, local = divmod(order.index(rank), ranks_per_host)
    inside = order[host * ranks_per_host : (host + 1) * ranks_per_host]
    across = order[local::ranks_per_host]
    shards = [range(shard * num_hosts, (shard + 1) * num_hosts) for shard in range(ranks_per_host)]
    yield from among(ring_reduce_scatter(local, ranks_per_host), inside, shards)
    yield from among(ring_all_reduce(host, num_hosts), across, shards[local])
    yield from among(ring_all_gather(local, ranks_per_host), inside, shards)


def two_level_on(hosts: Sequence[Sequence[int]]) -> Schedule:
    """Return the all-reduce on the ranks of each host, all of which have equally many."""
    order = [rank for host in hosts for rank in host]
    is_usual = order == sorted(order)  # then it can be drawn for other numbers of ranks too
    return partial(two_level_all_reduce, ranks_per_host=len(hosts[0]), order=None if is_usual else order)


class TwoLevelCommunicator(AlgorithmCommunicator):
    """All-reduce on two levels; see `AlgorithmCommunicator`. A split of it is one of its transport.

    Args:
        transport, timeout_s, segment_bytes: see there.
        ranks_per_host: of ranks that are numbered host by host; None to ask the ranks where they are.

    Raises:
        ValueError: the ranks cannot be divided into hosts of that size, or the hosts have ranks in different numbers.
    """

    def __init__(
        self,
        transport: Communicator,
        ranks_per_host: int | None = None,
        timeout_s: float | None = None,
        segment_bytes: int = 2**22,
    ) -> None:
        hosts = _hosts(transport) if ranks_per_host is None else _equal_hosts(transport.world_size, ranks_per_host)
        super().__init__(transport, {"all_reduce": two_level_on(hosts)}, timeout_s, segment_bytes)

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        """The ranks of a group need not be those of whole hosts, so it is left to the transport."""
        return self._inner.split(groups)


def _equal_hosts(world_size: int, size: int) -> list[list[int]]:
    if size < 1 or world_size % size:
        raise ValueError(
            f"ranks_per_host must divide the {launch.counted_ranks(world_size)}, got {size}; "
            "set comm.ranks_per_host, or choose comm=ring"
        )
    return [list(range(first, first + size)) for first in range(0, world_size, size)]


def _hosts(transport: Communicator) -> list[list[int]]:
    """Return the ranks of each host; all ranks call it, as what one alone is told need not fit."""
    hosts = ranks_by(transport.all_gather_object(launch.host_id()))
    sizes = [len(ranks) for ranks in hosts]
    if len(set(sizes)) > 1:
        with contextlib.suppress(CommError):  # until all know: what a rank hears of one that leaves at once is its loss
            transport.barrier()
        raise ValueError(
            f"two_level needs as many ranks on every host, but they have {', '.join(map(str, sizes))}; "
            "choose comm=hierarchical, which takes any mix, or comm=ring"
        )
    return hosts


def ranks_by(values: Sequence[Hashable]) -> list[list[int]]:
    """Return the ranks that gave each value, in the order of their first ones."""
    return [[rank for rank, other in enumerate(values) if other == value] for value in dict.fromkeys(values)]
