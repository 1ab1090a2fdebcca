"""One rank, or all as threads, of a world in which something goes wrong; see `tests.fault_table`, which starts them.

``python -m tests.fault_ranks gloo kill <folder>``. What a rank is told is written into the folder, and by the culprit
when its fault began.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from backends.checked import CheckedCommunicator
from backends.faulty import LossyCommunicator
from backends.hierarchical import HierarchicalCommunicator
from backends.ring import RingCommunicator
from backends.shm import ShmCommunicator
from backends.thread import ThreadCommunicator, spawn_threads
from backends.torch_dist import GlooCommunicator
from minidist.communicator import Communicator
from minidist.training.checkpoint import Checkpoints, State
from tests.checked_ranks import MISTAKES, at

TIMEOUT_S = 5.0
LATE_S = TIMEOUT_S + 2
PATIENT_S = 30.0
"""The timeout where a network or a host is lost, which is not what tells."""
CULPRIT = 1
ANYBODY = -1
BEFORE = 3
"""How many all-reduces go well before."""
LOST = 50
"""Which message of the culprit is lost: none of those with which the communicators are made."""


def _mpi(timeout_s: float) -> Communicator:
    from backends.mpi import MpiCommunicator  # only where mpirun has started the ranks

    return MpiCommunicator(timeout_s)


def _hierarchical(timeout_s: float) -> Communicator:
    """Return hosts as they are, and hosts of two ranks where all are on one machine."""
    inter = GlooCommunicator(timeout_s)
    host = str(inter.rank // 2) if os.environ.get("MASTER_ADDR") == "127.0.0.1" else None
    return HierarchicalCommunicator(functools.partial(ShmCommunicator, timeout_s), inter, host=host)


MAKE: dict[str, Callable[[float], Communicator]] = {
    "gloo": GlooCommunicator,
    "ring": lambda timeout_s: RingCommunicator(GlooCommunicator(timeout_s)),
    "mpi": _mpi,
    "shm": ShmCommunicator,
    "thread": ThreadCommunicator,
    "hierarchical": _hierarchical,
}


class Rank:
    """A rank that knows where to tell what happens to it."""

    def __init__(self, comm: Communicator, folder: Path) -> None:
        self.comm = comm
        self.folder = folder

    @property
    def is_culprit(self) -> bool:
        return self.comm.rank == CULPRIT

    def begin(self) -> None:
        """Say that the fault begins."""
        write(self.folder / "fault.json", {"at": time.time(), "pid": os.getpid()})

    def end(self, kind: str, said: str) -> None:
        """Say how it ends."""
        report = {"at": time.time(), "kind": kind, "said": said}
        write(self.folder / f"rank-{self.comm.rank}.json", report)


def write(path: Path, what: object) -> None:
    """Write a file that is there as a whole, or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(what))
    part.rename(path)


def reduce_until(rank: Rank, fault: Callable[[], object]) -> None:
    """Reduce, until the culprit meets its fault."""
    for number in range(1000):
        if number == BEFORE and rank.is_culprit:
            rank.begin()
            fault()
        rank.comm.all_reduce(torch.ones(3))  # reduces


def mistake(name: str, rank: Rank) -> None:
    rank.begin() if rank.is_culprit else None
    MISTAKES[name](rank.comm)


def missing(rank: Rank) -> None:
    """The culprit leaves out an all-reduce, and is busy with something else."""
    if rank.is_culprit:
        rank.begin()
        threading.Event().wait(LATE_S)
    else:
        rank.comm.all_reduce(torch.ones(3))  # missing


def ended(how: str, rank: Rank) -> None:
    def end() -> None:
        if how == "exit":
            os._exit(3)
        if how == "raise":
            raise ValueError("no such thing")
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)

    reduce_until(rank, end)


def slow(rank: Rank) -> None:
    reduce_until(rank, lambda: threading.Event().wait(LATE_S))


def from_outside(rank: Rank) -> None:
    """Reduce until something happens to the network, or to a host."""
    rank.comm.all_reduce(torch.ones(3))
    (rank.folder / f"ready-{rank.comm.rank}").touch()
    tensor = torch.zeros(2**16)
    while True:
        rank.comm.all_reduce(tensor)  # outside


def lost_message(rank: Rank) -> None:
    rank.begin() if rank.is_culprit else None
    for _ in range(LOST):
        rank.comm.all_reduce(torch.ones(3))  # lost message


def receives_first(rank: Rank) -> None:
    """Each rank wants to receive before it sends."""
    comm = rank.comm
    rank.begin() if rank.is_culprit else None
    comm.recv(torch.ones(3), (comm.rank - 1) % comm.world_size)  # receives first
    comm.send(torch.ones(3), (comm.rank + 1) % comm.world_size)


def two_threads(rank: Rank) -> None:
    """Each rank has two kinds of work, one after the other; the culprit has two threads that do both at once."""
    comm = rank.comm
    failures: list[Exception] = []

    def work(numel: int) -> None:
        for _ in range(100):
            comm.all_reduce(torch.ones(numel))  # two threads

    def reduce(numel: int) -> None:
        try:
            work(numel)
        except Exception as error:
            failures.append(error)

    if rank.is_culprit:
        rank.begin()
        threads = [threading.Thread(target=reduce, args=(numel,), daemon=True) for numel in (3, 1000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * TIMEOUT_S)
        if failures:
            raise failures[0]
    else:
        for numel in (3, 1000):
            work(numel)


def missing_barrier(rank: Rank) -> None:
    rank.begin() if rank.is_culprit else None
    if not rank.is_culprit:
        rank.comm.barrier()  # missing barrier: others
    rank.comm.all_reduce(torch.ones(3))  # missing barrier: rank 1
    rank.comm.barrier()


def sizes(rank: Rank) -> None:
    """A buffer is as long as a rank has data."""
    rank.begin() if rank.is_culprit else None
    rank.comm.broadcast(torch.ones(3 + rank.is_culprit), 0)  # sizes


def full_disk(rank: Rank) -> None:
    """The file of a checkpoint may not grow, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN) if threading.current_thread() is threading.main_thread() else None
    checkpoints = Checkpoints(rank.folder / "checkpoints", rank.comm)
    rank.comm.barrier()
    if rank.comm.rank == 0:
        rank.begin()
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    state = {"model": {"weight": torch.ones(10000)}}
    checkpoints.save(State(1, {"model": "mlp"}, state, {}))  # full disk


class Fault(NamedTuple):
    """A fault, and what has to be said of it.

    Attributes:
        act: what each rank does.
        call: what is named.
        lines: where that is; one of them has to be named.
        by_all: whether the culprit has to say it too.
        culprit: whom the others have to name; None: ranks of the other host; ANYBODY: whoever they wait
            for, or who waits where another one does not: whose message was lost most ranks cannot know.
    """

    act: Callable[[Rank], None]
    call: str
    lines: tuple[str, ...]
    by_all: bool = False
    culprit: int | None = CULPRIT


def here(*marks: str) -> tuple[str, ...]:
    return tuple(at(mark, __file__) for mark in marks)


def mismatch(name: str, call: str) -> Fault:
    lines = ("order: first", "order: second") if name == "order" else (f"{name}: rank 1",)
    return Fault(functools.partial(mistake, name), call, tuple(map(at, lines)), by_all=True)


ENDED = {how: Fault(functools.partial(ended, how), "all_reduce", here("reduces")) for how in ("kill", "exit", "raise")}
OUTSIDE = {how: Fault(from_outside, "all_reduce", here("outside"), True, None) for how in ("cut", "blackhole", "host")}
FAULTS: dict[str, Fault] = {
    "shape": mismatch("shape", "all_reduce"),
    "dtype": mismatch("dtype", "all_reduce"),
    "op": mismatch("op", "all_reduce"),
    "order": mismatch("order", "all_reduce"),
    "collective": mismatch("collective", "barrier"),
    "missing rank": Fault(missing, "all_reduce", here("missing")),
    **ENDED,
    "stop": Fault(functools.partial(ended, "stop"), "all_reduce", here("reduces")),
    **OUTSIDE,
    "slow rank": Fault(slow, "all_reduce", here("reduces")),
    "lost message": Fault(lost_message, "all_reduce", here("lost message"), culprit=ANYBODY),
    "receives first": Fault(receives_first, "recv", here("receives first"), by_all=True, culprit=ANYBODY),
    "two threads": Fault(two_threads, "all_reduce", here("two threads"), by_all=True),
    "missing barrier": Fault(missing_barrier, "barrier", here("missing barrier: others"), by_all=True),
    "sizes": Fault(sizes, "broadcast", here("sizes"), by_all=True),
    "full disk": Fault(full_disk, "Checkpoints.save", here("full disk"), by_all=True, culprit=0),
}


def made(kind: str, fault: str) -> Communicator:
    comm = MAKE[kind](PATIENT_S if fault in OUTSIDE else TIMEOUT_S)
    if fault == "lost message":
        comm = LossyCommunicator(comm, "lost", message=LOST, rank=CULPRIT)
    return CheckedCommunicator(comm)


def run(kind: str, fault: str, folder: Path) -> None:
    """Suffer a fault, and write down what this rank is told."""
    comm = made(kind, fault)
    rank = Rank(comm, folder)
    try:
        with comm:
            FAULTS[fault].act(rank)
        rank.end("nothing", "")
    except Exception as error:
        rank.end(type(error).__name__, "\n".join([str(error), *getattr(error, "__notes__", ())]))


def main(kind: str, fault: str, folder: str) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a rank that fails does not end the others before they see it
    job = functools.partial(run, kind, fault, Path(folder))
    if kind == "thread":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        spawn_threads(job, 3)
    else:
        job()


if __name__ == "__main__":
    main(*sys.argv[1:])
