"""One rank of a world in which test_sharded.py trains: ``python -m tests.sharded_ranks shm``."""

from __future__ import annotations

import sys

import torch

from backends.ring import RingCommunicator
from backends.shm.communicator import ShmCommunicator
from backends.torch_dist.gloo import GlooCommunicator
from minidist.communicator import Communicator
from tests import fused_checks, sharded_checks


def make(name: str) -> Communicator:
    if name == "fused":
        return ShmCommunicator(kernels="compiled")
    if name == "shm":
        return ShmCommunicator()
    gloo = GlooCommunicator()
    return RingCommunicator(gloo) if name == "ring" else gloo


if __name__ == "__main__":
    torch.set_num_threads(1)
    with make(sys.argv[1]) as comm:
        checks = fused_checks.CHECKS if sys.argv[1] == "fused" else sharded_checks.IN_PROCESSES
        for check in checks:
            check(comm)
    print(f"rank {comm.rank} passed", flush=True)
