"""One rank of a world on hosts, which test_hosts.py makes: ``python -m tests.host_ranks train gloo``."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

import torch

from backends.auto import AutoCommunicator
from backends.hierarchical import HierarchicalCommunicator
from backends.ring import RingCommunicator, ring_all_gather, ring_all_reduce, ring_reduce_scatter
from backends.schedules.binomial import binomial_all_reduce
from backends.schedules.direct import two_shot_all_reduce
from backends.schedules.doubling import halving_doubling_all_reduce
from backends.schedules.pairwise import pairwise_all_to_all
from backends.shm import ShmCommunicator
from backends.torch_dist.gloo import GlooCommunicator
from backends.two_level import TwoLevelCommunicator
from minidist.communicator import Communicator
from minidist.errors import PeerLostError
from minidist.launch import detect
from minidist.schedule import Schedule
from tests import training_checks

TIMEOUT_S = 60.0
CHOICES: dict[str, list[Schedule | str]] = {
    "all_reduce": [ring_all_reduce, two_shot_all_reduce, halving_doubling_all_reduce, binomial_all_reduce],
    "all_gather": [ring_all_gather],
    "reduce_scatter": [ring_reduce_scatter],
    "all_to_all": [pairwise_all_to_all],
}
"""What auto chooses from."""


def _mpi() -> Communicator:
    from backends.mpi import MpiCommunicator  # only where mpirun has started the ranks

    return MpiCommunicator(timeout_s=TIMEOUT_S)


MAKE: dict[str, Callable[[], Communicator]] = {
    "gloo": lambda: GlooCommunicator(timeout_s=TIMEOUT_S),
    "ring": lambda: RingCommunicator(GlooCommunicator(timeout_s=TIMEOUT_S)),
    "hierarchical": lambda: HierarchicalCommunicator(
        functools.partial(ShmCommunicator, TIMEOUT_S), GlooCommunicator(timeout_s=TIMEOUT_S)
    ),
    "hierarchical_ring": lambda: HierarchicalCommunicator(
        functools.partial(ShmCommunicator, TIMEOUT_S), RingCommunicator(GlooCommunicator(timeout_s=TIMEOUT_S))
    ),
    "mpi": _mpi,
    "auto": lambda: AutoCommunicator(
        GlooCommunicator(timeout_s=TIMEOUT_S), CHOICES, intra=functools.partial(ShmCommunicator, TIMEOUT_S)
    ),
    "two_level": lambda: TwoLevelCommunicator(GlooCommunicator(timeout_s=TIMEOUT_S)),
}


def say(line: str) -> None:
    """Write a line in one piece, as the ranks write into one file."""
    os.write(1, f"rank {detect().rank}: {line}\n".encode())


def train(kind: str) -> None:
    """Train as one process does, split, and leave."""
    with MAKE[kind]() as comm:
        say("connected")
        training_checks.check_equals_one_process(comm, "mlp")
        half = comm.split(comm.rank % 2)
        assert half is not None
        total = torch.ones(1000)
        half.all_reduce(total)
        assert total.tolist() == [half.world_size] * 1000
        half.close()
        say("trained")


def lose(kind: str, numel: str) -> None:
    """Reduce until a rank is lost, and say when that was, and which; the last rank may be told to end."""
    comm = MAKE[kind]()
    tensor = torch.zeros(int(numel))
    try:
        comm.all_reduce(tensor)
        say("reduces")
        while True:
            comm.all_reduce(tensor)
            comm.all_reduce(tensor, async_op=True).wait()
    except PeerLostError as error:
        say(f"raised at {time.time()}, peers {error.peers}: {error}")
    comm.close()
    say("closed")


def outlast(kind: str, seconds: str) -> None:
    """Reduce for so long, whatever the network does meanwhile."""
    with MAKE[kind]() as comm:
        tensor = torch.ones(2**16)
        until = time.monotonic() + float(seconds)
        say("reduces")
        while comm.broadcast_object(time.monotonic() < until, 0):
            comm.all_reduce(tensor.fill_(1))
            assert tensor.eq(comm.world_size).all()
        say("outlasted")


def choose() -> None:
    """Let auto choose, say how long its start took and what it runs, and train with it."""
    with GlooCommunicator(timeout_s=TIMEOUT_S) as transport:
        started = time.monotonic()
        comm = AutoCommunicator(transport, CHOICES, intra=functools.partial(ShmCommunicator, TIMEOUT_S))
        say(f"started in {time.monotonic() - started:.2f} s")
        say(f"chooses {[comm.choice('all_reduce', 4**power) for power in range(4, 13)]}")
        training_checks.check_equals_one_process(comm, "mlp")
        say("trained")
        comm.close()


def wait() -> None:
    """Wait for the end of the host."""
    say("waits")
    signal.pause()


FUNCTIONS: dict[str, Callable[..., None]] = {
    "train": train,
    "lose": lose,
    "outlast": outlast,
    "choose": choose,
    "wait": wait,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a rank that fails does not end the others before they see it
    try:
        FUNCTIONS[sys.argv[1]](*sys.argv[2:])
    except Exception:
        say(traceback.format_exc())
        sys.exit(1)
