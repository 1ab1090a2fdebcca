"""Ranks that torch's mp.spawn starts, or forks, which are told their place in the world and none on their host.

``python -m tests.spawned_ranks shm 127.0.0.1 fork``: what to run, the address of rank 0, and how to start the ranks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
import torch.multiprocessing as mp

from backends.processes import rendezvous
from backends.shm.communicator import ShmCommunicator
from backends.torch_dist.gloo import GlooCommunicator
from backends.two_level import TwoLevelCommunicator
from minidist import launch
from minidist.communicator import Communicator
from minidist.errors import CommError
from tests.ports import free_port

MAKE: dict[str, Callable[[], Communicator]] = {
    "shm": lambda: ShmCommunicator(timeout_s=30),
    "gloo": lambda: GlooCommunicator(timeout_s=30),
    "two_level": lambda: TwoLevelCommunicator(GlooCommunicator(timeout_s=30)),
}


def run(rank: int, what: str, address: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    if what == "apart":
        launch.host_id = lambda: f"host {rank}"
        try:
            ShmCommunicator(timeout_s=30)
        except CommError as error:
            print(f"rank {rank}: {error}\n", end="", flush=True)
        return
    if what == "one_missing":
        if rank == 0:
            try:
                GlooCommunicator(timeout_s=1)
            except CommError as error:
                print(f"rank 0: {error}\n", end="", flush=True)
        return
    with MAKE[what]() as comm:
        comm.all_reduce(total := torch.ones(10_000))
        child = comm.split(0)
        assert child is not None
        child.all_reduce(total)
        child.close()
        world = rendezvous.meet().world
        print(f"sum {total.max()} rank {world.local_rank} of {world.local_world_size} here\n", end="", flush=True)


if __name__ == "__main__":
    mp.start_processes(run, (sys.argv[1], sys.argv[2], free_port()), nprocs=2, start_method=sys.argv[3])
