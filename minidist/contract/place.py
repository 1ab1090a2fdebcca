"""Where a communicator of processes is, for those that are made without a rendezvous of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from minidist.contract.addresses import LOOPBACK


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
