"""What a process has once, whatever communicators it makes: MPI itself, from its initialisation to its farewell."""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from backends.mpi.notices import Notices
from minidist import launch
from minidist.errors import BackendUnavailableError

MPICHS_NAMES = re.compile(r"/dev/shm/mpich_shm_\w+$", re.MULTILINE)
LAST_WORDS_S = 3.0
"""How long a rank that failed waits for the others to fail before it ends the job."""


class Leaving(Protocol):
    """What has to be told at exit."""

    @property
    def failed(self) -> bool: ...

    def abort(self, reason: str) -> None: ...


open_communicators: set[Leaving] = set()  # per process, as MPI itself


def load() -> Any:
    """Return mpi4py's MPI, not initialised.

    Raises:
        BackendUnavailableError: mpi4py or the MPI library is missing.
    """
    try:
        import mpi4py

        if "mpi4py.MPI" not in sys.modules:  # else it says how MPI was initialised
            mpi4py.rc.initialize = False
        from mpi4py import MPI
    except ImportError as error:
        raise BackendUnavailableError(
            f"mpi needs mpi4py: {error}; run pip install mpi4py mpich, or use comm=gloo"
        ) from error
    except RuntimeError as error:
        raise BackendUnavailableError(
            f"mpi4py finds no MPI library ({str(error).splitlines()[0]}); run pip install mpich, "
            "or install Open MPI or MPICH on the system"
        ) from error
    return MPI


@functools.cache
def initialised() -> Any:
    """Return mpi4py's MPI, ready for use from several threads.

    Where a program has imported it before, mpi4py has initialised MPI and finalises it, after this module's farewell:
    it does so when the interpreter is gone. Whoever initialises it by hand may leave its end to the farewell.
    """
    MPI = load()
    import mpi4py

    by_mpi4py = mpi4py.rc.initialize and mpi4py.rc.finalize is not False
    if not MPI.Is_initialized():
        if MPI.Init_thread(MPI.THREAD_MULTIPLE) != MPI.THREAD_MULTIPLE:
            raise BackendUnavailableError("this MPI library was built without MPI_THREAD_MULTIPLE; install another")
    elif MPI.Is_finalized():
        raise BackendUnavailableError("MPI was finalised before a communicator was made; leave that to the end")
    elif MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        raise BackendUnavailableError(
            "MPI was initialised without MPI_THREAD_MULTIPLE before minidist could ask for it; "
            "leave mpi4py.rc.thread_level at 'multiple', or make the communicator first"
        )
    atexit.register(_end, os.getpid(), not by_mpi4py)
    return MPI


@functools.cache
def notices() -> Notices:
    """Return the notices of this process; the first call is collective."""
    forget_names()
    return Notices(initialised())


def from_rank_0(value: Any) -> Any:
    """Return what rank 0 of the whole world gave; all processes call it."""
    forget_names()
    return initialised().COMM_WORLD.bcast(value)


@functools.cache
def forget_names() -> None:
    """Take away the names of MPICH's shared memory, which stay until MPI_Finalize; the first call is collective.

    Ranks that are killed never come to that, and each such job would leave some megabytes in /dev/shm.
    """
    initialised().COMM_WORLD.Barrier()  # all ranks of this host have it open
    maps = Path("/proc/self/maps")
    for name in set(MPICHS_NAMES.findall(maps.read_text())) if maps.exists() else ():
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            os.unlink(name)


def ensure_own_launcher(mpi_size: int) -> None:
    """Raise BackendUnavailableError where the launcher is not that of this MPI library."""
    world = launch.detect()
    if mpi_size != world.world_size:
        raise BackendUnavailableError(
            f"{world.launcher} started {world.world_size} processes, but this MPI library sees {mpi_size}: it is "
            f"not the one of that launcher ({sys.executable}); use the mpirun of the MPI that mpi4py finds"
        )


def _end(pid: int, finalise: bool) -> None:
    """Leave MPI at exit: in order, or by ending the job where this rank failed and the others do not end too.

    MPI_Finalize waits for all ranks, so a rank that failed must not enter it alone. The others get a moment to
    raise what they have been told, and to print it, before the launcher kills them.

    Args:
        pid: the process whose farewell it is; one that it forked says none.
        finalise: whether nobody else does. MPICH's mpirun takes the first rank that ends without it for the whole job.
    """
    MPI = load()
    if os.getpid() != pid or MPI.Is_finalized():
        return
    # Before this rank waits for the others: they may wait for it in an operation, and only these news end that.
    failed = any(comm.failed for comm in open_communicators)
    for comm in open_communicators:
        comm.abort("it ended without closing its communicator")
    told = notices() if notices.cache_info().currsize else None
    to_me = np.zeros(MPI.COMM_WORLD.size, np.int64)
    together = MPI.COMM_WORLD.Ialltoall(to_me.copy() if told is None else told.num_told, to_me)
    # A rank that has not failed waits as long as it takes: others may have much left to do that does not need it.
    deadline = time.monotonic() + (LAST_WORDS_S if failed else math.inf)
    while not together.Test() and time.monotonic() < deadline:
        time.sleep(0.01)
    if not together.Test():  # some rank does not come to its end; Abort ends the job, this process included
        sys.stdout.flush()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)
    if failed:  # what it left on its way may keep MPI_Finalize waiting; then the signal ends the process
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, LAST_WORDS_S)
    elif told is not None:
        told.hear_the_rest(to_me, LAST_WORDS_S)
    if not finalise:
        return
    MPI.Finalize()
    signal.setitimer(signal.ITIMER_REAL, 0)
