"""One rank of three, whose first two share a card: each sends over it to the third; see test_paced.py."""

from __future__ import annotations

import time

import torch

from backends.paced import PacedCommunicator
from backends.shm import ShmCommunicator
from minidist.analysis.network import Flat, Hosts

if __name__ == "__main__":
    torch.set_num_threads(1)
    with PacedCommunicator(ShmCommunicator(60, kernels="torch"), Hosts(2, Flat(0.0, 0.0), Flat(0.0, 1e-4))) as comm:
        comm.transport.barrier()
        started = time.monotonic()
        if comm.rank < 2:
            comm.send(torch.ones(250), 2)
        else:
            for src in range(2):
                comm.recv(torch.ones(250), src)
        print(f"sent from {started} to {time.monotonic()}", flush=True)
