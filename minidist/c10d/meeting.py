"""How the ranks of a process group of torch find out where they are: by the group's store, and nothing else."""

from __future__ import annotations

import json
import os

import torch.distributed as dist

from minidist import launch
from minidist.contract.place import Place, from_everyone


def find_place(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> Place:
    """Return this rank's place; all ranks of the group call it, and no others.

    Raises:
        CommTimeoutError: not all of them came in time.
    """
    world = launch.detect()
    mine = (launch.host_id(), _address())
    told = from_everyone(dist.PrefixStore("hosts", store), rank, world_size, json.dumps(mine), timeout_s)
    hosts = [json.loads(each) for each in told]
    num_here = sum(host == mine[0] for host, _ in hosts)
    return Place(
        rank,
        world_size,
        dist.PrefixStore("minidist", store),
        "127.0.0.1" if num_here == world_size else hosts[0][1],
        num_here,
        max(num_here, world.local_world_size),
    )


def _address() -> str:
    """Return an address of this host that the others reach, by the way to the master's."""
    master = os.environ.get("MASTER_ADDR", "").strip("[]")
    return launch.own_address(master) if master else "127.0.0.1"
