"""One rank of a world whose rank 1 ends before its third operation: ``gloo kill``."""

from __future__ import annotations

import os
import signal
import sys
import threading

import torch

from backends.faulty import KilledCommunicator
from backends.shm import ShmCommunicator
from backends.torch_dist import GlooCommunicator
from minidist.errors import CommError

MAKE = {"gloo": GlooCommunicator, "shm": ShmCommunicator}


def main(kind: str, how: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher asks the others to end when one has died
    comm = KilledCommunicator(MAKE[kind](timeout_s=8), rank=1, operation=3, how=how)
    if comm.rank == 1 and how == "stop":
        waker = os.fork()  # what stops has to end some time
        if waker == 0:
            threading.Event().wait(20)
            os.kill(os.getppid(), signal.SIGKILL)
            os._exit(0)
    done = 0
    try:
        for _ in range(5):
            comm.all_reduce(torch.ones(1000))
            done += 1
    except CommError as error:
        print(f"rank {comm.rank} after {done} operations: {type(error).__name__}: {error}\n", end="", flush=True)
    comm.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
