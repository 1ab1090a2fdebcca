"""Ranks of which rank 1 does not come, once as it waits elsewhere and once as it is stopped: ``ring/gloo``.

What the others are told is printed, with the seconds that it took.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from backends.processes.rendezvous import meet
from minidist.communicator import Communicator
from minidist.errors import CommError
from tests.table import made_by

MAKE = {
    "gloo": "backends.torch_dist.GlooCommunicator",
    "ring/gloo": "tests.table.ring_over_gloo",
    "shm": "backends.shm.ShmCommunicator",
    "hierarchical": "tests.table.hierarchical_over_shm_and_ring",
}
TIMEOUT_S = 2.0
PATIENT = timedelta(seconds=60)


def main(kind: str) -> None:
    store = meet().place().store
    for name in ("away", "stopped"):
        comm = made_by(MAKE[kind])()
        comm.all_reduce(torch.ones(3))
        comm.recorder.step = 17
        pids = comm.all_gather_object(os.getpid())
        have_failed = dist.PrefixStore(name, store)
        if comm.rank != 1:
            fail(comm, name)
            have_failed.set(str(comm.rank), "")
        elif name == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        have_failed.wait(["0", "2"], PATIENT)  # away
        if comm.rank == 0:
            os.kill(pids[1], signal.SIGCONT)
        comm.abort("the test is over")


def fail(comm: Communicator, name: str) -> None:
    started = time.monotonic()
    try:
        comm.all_reduce(torch.ones(4), timeout_s=TIMEOUT_S)  # missed
    except CommError as error:
        print(f"rank {comm.rank} {name} after {time.monotonic() - started:.1f} s: {error}\n", end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
