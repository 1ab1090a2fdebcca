"""How the ranks of a process group of torch find out where they are: by the group's store, and nothing else."""

from __future__ import annotations

import json
import os
import time

import torch.distributed as dist

from minidist import launch
from minidist.contract.place import Place
from minidist.errors import CommTimeoutError

POLL_S = 0.002


def find_place(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> Place:
    """Return this rank's place; all ranks of the group call it, and no others.

    Raises:
        CommTimeoutError: not all of them came in time.
    """
    world = launch.detect()
    mine = (launch.host_id(), _address())
    hosts = [tuple(host) for host in _from_everyone(store, rank, world_size, mine, timeout_s)]
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


def _from_everyone(
    store: dist.Store, rank: int, world_size: int, value: tuple[str, str], timeout_s: float
) -> list[list[str]]:
    deadline = time.monotonic() + timeout_s
    keys = [f"host{other}" for other in range(world_size)]
    store.set(keys[rank], json.dumps(value))
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
            raise CommTimeoutError(f"[rank {rank}/{world_size}] ranks {missing} did not come within {timeout_s:g} s")
        time.sleep(POLL_S)
    return [json.loads(store.get(key)) for key in keys]
