"""Starts processes that have torch loaded: forks of one that imports it, and does nothing else, in their stead.

To start Python and to import torch takes two seconds of a core, more than most checks. ``python -m tests.fork_server``
reads one `Order` per line and answers with two: the process that it started, and how that process ended. It has one
thread and no communicator, so a fork of it is as good as a process of its own; MPI, which has to start its processes
itself, is never imported here.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent
PRELOADED = ("torch._dynamo", "tests.table", "tests.models")
"""The second of them imports what the first optimizer of a process would, the others the rest of the project."""
GRACE_S = 5.0
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Order:
    """What to run, as ``python -m program *arguments`` would, or ``python program *arguments`` where it is a file.

    Attributes:
        world_size: on how many ranks, which find what torchrun tells its own; None: in one process that has no ranks.
        directory: where.
        output: the file for all that they write.
        hosts: for each rank, the process that is its host, see `tests.hosts`; none: all are on this machine.
        variables: for each rank on a host, what it finds beside ``environment``.
    """

    program: str
    arguments: Sequence[str]
    world_size: int | None
    directory: str
    output: str
    environment: Mapping[str, str]
    hosts: Sequence[int] = ()
    variables: Sequence[Mapping[str, str]] = ()


class ForkServer:
    """The side of the tests. The server ends when there is nothing more to read, at the latest when they are gone."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, order: Order, limit_s: float) -> int | None:
        """Return the exit status, or None if it took longer than the limit and was ended."""
        return self.start(order).finish(limit_s)

    def start(self, order: Order) -> Running:
        """Start an order; there is one at a time, and whoever starts it has to finish it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(dataclasses.asdict(order)) + "\n")
        self._process.stdin.flush()
        return Running(self._process, self._read())

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


class Running:
    """An order that was started, in a process group of its own."""

    def __init__(self, server: subprocess.Popen[str], group: int) -> None:
        self._server = server
        self._group = group
        self._status: int | None = None
        self._is_over = False

    def finish(self, limit_s: float) -> int | None:
        """Return the exit status, or None if it took longer than the limit and was ended; a second time too."""
        if not self._is_over:
            in_time = False
            try:
                in_time = self.has_ended(limit_s)
            finally:  # also when the tests are interrupted
                if not in_time:
                    self._end()
            assert self._server.stdout is not None
            status = int(self._server.stdout.readline())
            self._status, self._is_over = (status if in_time else None), True
        return self._status

    def has_ended(self, limit_s: float) -> bool:
        """Whether it ends within the limit."""
        return self._is_over or bool(select.select([self._server.stdout], [], [], limit_s)[0])

    def _end(self) -> None:
        os.killpg(self._group, signal.SIGTERM)
        if not self.has_ended(GRACE_S):
            os.killpg(self._group, signal.SIGKILL)


@functools.cache
def server() -> ForkServer:
    """Return the one of this process, which starts at the first call."""
    made = ForkServer()
    atexit.register(made.close)
    return made


# In the server ----------------------------------------------------------------------------------


def main() -> None:
    """Serve orders until there are no more."""
    for module in PRELOADED:
        importlib.import_module(module)
    load_kernels()
    for line in iter(sys.stdin.readline, ""):
        pid = fork()
        if pid == 0:
            leave(lambda: become(Order(**json.loads(line))))  # noqa: B023
        os.write(1, f"{pid}\n".encode())
        os.write(1, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())


def load_kernels() -> None:
    """Load the kernels of shared memory, which takes each process that is no fork of this one half a second."""
    loading = importlib.import_module("backends.shm.compiled.loading")
    if loading.is_installed():
        _ = loading.kernels().schedule


def fork() -> int:
    """Return what `os.fork` does; what minidist keeps from being collected in a fork is this one's own."""
    pid = os.fork()
    if pid == 0:
        gc.unfreeze()
    return pid


def leave(last: Callable[[], None]) -> NoReturn:
    """Do a last thing and end as the interpreter does, but for the second that it takes to free every module."""
    status: object = None
    try:
        last()
    except SystemExit as error:
        status = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def become(order: Order) -> None:
    """Run an order in this process, in a session of its own."""
    os.setsid()
    with open(os.devnull) as nothing, open(order.output, "w") as output:
        for file, descriptor in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(file.fileno(), descriptor)
    os.chdir(order.directory)
    os.environ.clear()
    os.environ.update(order.environment)
    if order.hosts:
        become_ranks_on(order.hosts, order.variables)
        os.chdir(order.directory)  # its host has mounts of its own
    elif order.world_size is not None:
        become_ranks(order.world_size)
    sys.argv = [order.program, *order.arguments]
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ["", *sys.path]]
    if order.program.endswith(".py"):
        sys.path[0] = str(Path(order.program).parent)
        runpy.run_path(order.program, run_name="__main__")
    else:
        runpy.run_module(order.program, run_name="__main__", alter_sys=True)


def become_ranks(world_size: int) -> None:
    """Return as every rank; this process keeps their store, as torchrun does, and ends as the ranks end."""
    from torch.distributed import TCPStore

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    ranks = set()
    for rank in range(world_size):
        pid = fork()
        if pid == 0:
            listener.close()
            return os.environ.update(variables(rank, world_size, port))
        ranks.add(pid)
    # Only now: it has a thread of its own, which a fork would not have.
    store = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listener.detach())
    status = ended(ranks)
    del store
    sys.exit(status)


def become_ranks_on(hosts: Sequence[int], variables: Sequence[Mapping[str, str]]) -> None:
    """Return as every rank, in the namespaces of its host; this process ends as they do."""
    ranks = set()
    for host, mine in zip(hosts, variables, strict=True):
        enter(host, ("pid_for_children",))
        pid = fork()
        if pid == 0:
            enter(host, ("net", "uts", "mnt"))
            return os.environ.update(mine)
        ranks.add(pid)
    sys.exit(ended(ranks))


def enter(process: int, namespaces: Sequence[str]) -> None:
    """Enter namespaces of a process; that of processes takes in what is forked from now on."""
    for name in namespaces:
        with open(f"/proc/{process}/ns/{name}") as namespace:
            if LIBC.setns(namespace.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {name} of process {process}")


def variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return what torchrun sets on its ranks and somebody here reads."""
    return {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(world_size) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": f"forked-{os.getsid(0)}",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def ended(ranks: set[int]) -> int:
    """Wait for all; the first that fails has the others told to end. Return the status that torchrun would."""
    status = 0
    while ranks:
        pid, how = os.wait()
        ranks.discard(pid)
        if how != 0 and status == 0:
            status = 1
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return status


if __name__ == "__main__":
    main()
