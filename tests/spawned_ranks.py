"""Ranks that torch's mp.spawn starts, or forks, which are told their place in the world and none on their host.

``python -m tests.spawned_ranks shm 127.0.0.1 fork``: what to run, the address of rank 0, and how to start the ranks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
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


def restart(rank: int, address: str, port: int, attempt: int) -> None:
    """Join a start of the ranks in the store of an agent; the first one is on two hosts, and only rank 1's counts."""
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(rank * attempt)}
    run(rank, "shm" if attempt else "apart", address, port)


if __name__ == "__main__":
    what, address, how = sys.argv[1:]
    if what == "restarted":
        store = dist.TCPStore(address, 0, None, True, wait_for_workers=False)
        for attempt in range(2):
            mp.start_processes(restart, (address, store.port, attempt), nprocs=2, start_method=how)
    else:
        mp.start_processes(run, (what, address, free_port()), nprocs=2, start_method=how)
