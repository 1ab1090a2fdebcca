"""Starting ranks: what to start them with, and that none of them outlives the one who started it.

The engines are torchrun and mpirun; this only writes their command line.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from backends import cores
from minidist.errors import BackendUnavailableError
from minidist.launch import without_launcher

STOP_GRACE_S = 45.0
"""How long ranks have, after a SIGTERM, to write a checkpoint; torchrun itself kills them after 30 s."""
_PR_SET_PDEATHSIG = 1


def command(launcher: str, nproc: int, max_restarts: int, script: Sequence[str]) -> list[str]:
    """Return the command that runs ``script`` on ``nproc`` ranks of this machine.

    Raises:
        BackendUnavailableError: there is no mpirun.
    """
    if launcher == "mpirun":
        mpirun = _mpirun()
        # Inside of a Slurm job MPICH would spread the ranks over its hosts, by srun.
        options = ["--oversubscribe"] if _is_open_mpi(mpirun) else ["-launcher", "fork", "-hosts", "localhost"]
        return [mpirun, *options, "-n", str(nproc), sys.executable, *script]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={nproc}", f"--max-restarts={max_restarts}", *script]


def environment(nproc: int) -> dict[str, str]:
    """Return this process's environment and what ranks on few cores, and Open MPI as root, need besides.

    What is there of the job that this process runs in is left out: it is not who the ranks are.
    """
    return {
        "OMP_NUM_THREADS": str(threads_per_rank(nproc)),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        **without_launcher(os.environ),
    }


def threads_per_rank(local_world_size: int) -> int:
    """Return how many threads leave every rank of this machine a core of its own, where there are enough."""
    return max(1, cores.usable() // local_world_size)


def run_to_end(arguments: Sequence[str], env: dict[str, str]) -> int:
    """Run a command and return its exit status; SIGTERM and SIGINT are passed on to it.

    It leads a process group, of which nothing is left when this returns.
    """
    die_with_us = _DeathSignal(signal.SIGTERM)
    # In a session of its own it does not get the terminal's SIGINT as well as ours, which would be its second one.
    child = subprocess.Popen(arguments, env=env, start_new_session=True, preexec_fn=die_with_us)
    try:
        with _forwarded(child) as received:
            status = child.wait()
        return 128 + received[0] if received else status
    finally:
        _kill_group(child.pid)  # the ranks, too, if the launcher left them behind


def die_with_launcher() -> None:
    """Have this process told to stop when the one that started it dies."""
    _DeathSignal(signal.SIGTERM)()


@contextmanager
def _forwarded(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass signals on, the first as it is; after a grace period, or at a second signal, SIGKILL."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGALRM or received:
            _kill_group(child.pid)
        else:
            received.append(number)
            child.send_signal(signal.SIGTERM)
            signal.setitimer(signal.ITIMER_REAL, STOP_GRACE_S)  # wakes the main thread, which waits for the child

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield received
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of it has ended


class _DeathSignal:
    """Asks Linux for a signal at the death of the parent; callable between fork and exec, as it loads nothing."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def __call__(self) -> None:
        if self._libc is not None:
            self._libc.prctl(_PR_SET_PDEATHSIG, self._number)


def _mpirun() -> str:
    """Return the mpirun beside this Python, which is the one that mpi4py finds, or else that of the PATH."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which("mpirun", path=beside) or shutil.which("mpirun")
    if found is None:
        raise BackendUnavailableError("comm needs mpirun, and there is none; install one: pip install mpich")
    return found


def _is_open_mpi(mpirun: str) -> bool:
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False)
    return "Open MPI" in version.stdout
