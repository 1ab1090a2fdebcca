"""One rank of a world in which test_forks.py forks: ``python -m tests.fork_ranks gloo exit_in_a_fork``."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from backends.shm.communicator import ShmCommunicator
from backends.torch_dist.gloo import GlooCommunicator
from minidist.communicator import Communicator
from minidist.errors import CommError, PeerLostError
from tests.ports import free_port

BACKENDS = {"shm": ShmCommunicator, "gloo": GlooCommunicator}
LIMIT_S = 30.0
BUSY_S = 60.0


def forked(*children: Callable[[], None]) -> list[int]:
    """Run each in a fork that then ends as a program does; return their exit statuses, -9 for one that hangs."""
    pids = []
    for child in children:
        pids.append(os.fork())
        if pids[-1] == 0:
            child()
            sys.exit(0)
    until = time.monotonic() + 20
    return [ended(pid, until) for pid in pids]


def ended(pid: int, until: float) -> int:
    while (status := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(status[1])


def exit_in_a_fork(kind: str) -> None:
    """A fork drops everything that it inherited, and ends: all of it is there for its parent."""
    state: dict[str, object] = {"comm": BACKENDS[kind](timeout_s=30)}
    comm = state["comm"]
    assert isinstance(comm, Communicator)
    state["tensor"] = tensor = comm.empty(1000).fill_(1)
    state["aborted"] = aborted = BACKENDS[kind](timeout_s=30)  # nothing but its user holds it any more
    aborted.abort("not needed")
    comm.all_reduce(tensor, async_op=True).wait()  # starts its thread
    del comm, tensor, aborted

    def drop() -> None:
        state.clear()
        gc.collect()

    statuses = forked(drop)
    comm, tensor = state["comm"], state["tensor"]
    assert isinstance(comm, Communicator)
    assert isinstance(tensor, Tensor)
    comm.all_reduce(total := torch.ones(3))
    n = comm.world_size
    untouched = tensor.tolist() == [n] * 1000 and total.tolist() == [n] * 3
    print("untouched" if untouched and statuses == [0] else f"{statuses}, {tensor}, {total}", flush=True)
    comm.close()


def join_from_a_fork(kind: str) -> None:
    """A fork cannot take the place of its parent among the ranks."""
    with BACKENDS[kind](timeout_s=30) as comm:

        def join() -> None:
            try:
                BACKENDS[kind](timeout_s=5)
            except CommError as error:
                print(error, flush=True)

        statuses = forked(join)
        comm.barrier()
        print(f"statuses {statuses}", flush=True)


def found_a_world_of_forks(kind: str) -> None:
    """A process that has met a world of its own forks two that are told to be ranks of another: these meet."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    BACKENDS[kind](timeout_s=30).close()
    port = str(free_port())

    def be(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_PORT=port)
        with BACKENDS[kind](timeout_s=30) as comm:
            comm.all_reduce(total := torch.ones(1))
            print("sum of two" if total == 2 else f"sum {total}", flush=True)

    print(f"statuses {forked(lambda: be(0), lambda: be(1))}", flush=True)


class Samples(Dataset[Tensor]):
    """Samples in shared memory, of which the last ones take long."""

    def __init__(self, data: Tensor, report: Path) -> None:
        self.data, self.report = data, report

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        if index >= len(self.data) - 2:
            (self.report / f"busy-{os.getpid()}").touch()
            time.sleep(BUSY_S)
        return self.data[index]


def die_with_busy_workers(kind: str) -> None:
    """Rank 1 is killed while its workers go on: the others hear of it although its forks live."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun asks the others to end when one has died
    comm, report = BACKENDS[kind](timeout_s=60), Path(os.environ["REPORT"])
    data = comm.empty((4, 2)).fill_(1)
    if comm.rank == 1:
        workers = iter(DataLoader(Samples(data, report), num_workers=2, multiprocessing_context="fork"))
        assert sum(float(next(workers).sum()) for _ in range(2)) == 4
        while len(list(report.glob("busy-*"))) < 2:
            time.sleep(0.01)
        comm.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()
    started = time.monotonic()
    try:
        comm.all_reduce(data)
    except PeerLostError as error:
        seconds = time.monotonic() - started
        named = error.peers == (1,) and seconds < LIMIT_S
        print("named rank 1" if named else f"{error} after {seconds:.1f} s", flush=True)
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {
        "exit_in_a_fork": exit_in_a_fork,
        "join_from_a_fork": join_from_a_fork,
        "found_a_world_of_forks": found_a_world_of_forks,
        "die_with_busy_workers": die_with_busy_workers,
    }[sys.argv[2]](sys.argv[1])
