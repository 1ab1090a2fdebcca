"""How the ranks of a process group of torch find out where they are: by the group's store, and nothing else."""

from __future__ import annotations

import json
import os
from typing import Any

import torch.distributed as dist

from minidist import launch
from minidist.contract import addresses
from minidist.contract.place import Place, from_everyone


def find_place(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> Place:
    """Return this rank's place; all ranks of the group call it, and no others.

    Raises:
        CommTimeoutError: not all of them came in time.
    """
    world = launch.detect()
    # Twice, as where the ways to the master begin decides which address of its host the others reach.
    known = _from_everyone("hosts", store, rank, world_size, (launch.host_id(), _way_to_master()), timeout_s)
    hosts, ways = zip(*known, strict=True)
    mine = addresses.reachable(ways[rank], hosts, ways, rank)
    theirs = _from_everyone("addresses", store, rank, world_size, mine, timeout_s)
    num_here = hosts.count(hosts[rank])
    return Place(
        rank,
        world_size,
        dist.PrefixStore("minidist", store),
        addresses.LOOPBACK if num_here == world_size else theirs[0],
        num_here,
        max(num_here, world.local_world_size),
        mine,
    )


def _from_everyone(name: str, store: dist.Store, rank: int, world_size: int, value: Any, timeout_s: float) -> list[Any]:
    told = from_everyone(dist.PrefixStore(name, store), rank, world_size, json.dumps(value), timeout_s)
    return [json.loads(each) for each in told]


def _way_to_master() -> str:
    """Return the address of this host on the way to the one that the program met at."""
    master = os.environ.get("MASTER_ADDR", "").strip("[]")
    return addresses.towards(master) if master else addresses.LOOPBACK
