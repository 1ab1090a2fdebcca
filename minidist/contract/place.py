"""Where a communicator of processes is, and what its ranks tell each other before it is made: by a store alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from minidist.contract.addresses import LOOPBACK
from minidist.errors import CommTimeoutError, PeerLostError

POLL_S = 0.005


@dataclass(frozen=True)
class Place:
    """One rank's place in a group of processes.

    Attributes:
        rank, world_size: of the group.
        store: what its ranks share, and nobody else uses.
        host: an address of its rank 0 that all of them reach.
        num_here: how many of them are on this rank's host.
        local_world_size: how many ranks of the whole job are on this host.
        address: of this rank, by which those of other hosts reach it.
    """

    rank: int
    world_size: int
    store: dist.Store
    host: str
    num_here: int
    local_world_size: int
    address: str = LOOPBACK

    @property
    def one_host(self) -> bool:
        """Whether all of them are on one host."""
        return self.num_here == self.world_size


def from_everyone(
    store: dist.Store,
    rank: int,
    world_size: int,
    value: str,
    timeout_s: float,
    gone: Mapping[int, str] | None = None,
) -> list[str]:
    """Return what every rank has put into a store that they use for nothing else; all of them call it.

    Args:
        store: nothing else is in it.
        rank: this one.
        world_size: how many there are.
        value: what this rank puts into it.
        timeout_s: for all of them to come.
        gone: the ranks that are known to be gone and why, as that becomes known.

    Raises:
        CommTimeoutError: not all of them came in time.
        PeerLostError: not all of them came, and one is gone.
    """
    deadline = time.monotonic() + timeout_s
    keys = [str(other) for other in range(world_size)]
    store.set(keys[rank], value)
    while not store.check(keys):
        lost = next(iter(gone.items()), None) if gone else None
        if lost is not None and not store.check(keys):  # asked again, as it may have come and gone since
            raise PeerLostError(f"[rank {rank}] rank {lost[0]} is gone: {lost[1]}", (lost[0],))
        if time.monotonic() > deadline:
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
            raise CommTimeoutError(f"[rank {rank}] ranks {missing} did not come within {timeout_s:g} s")
        time.sleep(POLL_S)
    return [store.get(key).decode() for key in keys]
