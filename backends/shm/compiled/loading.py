"""Compiles the kernels once per machine: one rank compiles, the others wait for it and load what it has kept.

What is kept lies in a directory of our own, named after the sources, so that no kernel outlives a change in a file that
it only imports; and nothing is written where Python's packages lie.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from minidist.communicator import ReduceOp

Kernel = Callable[[int, int, int, int], int]
"""Called with the addresses of a desk, a plan, a source and a target; see backends/shm/compiled/desk.py."""
SOURCES = (*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parent.parent / "layout.py")


def is_installed() -> bool:
    """Whether there is what compiles."""
    return importlib.util.find_spec("numba") is not None


class Kernels:
    """The kernels of this process, compiled or loaded when the first communicator asks for them."""

    def __init__(self) -> None:
        with _kept():
            from backends.shm.compiled import all_reduce, reducers, sharing
        self.all_reduce: Kernel = all_reduce.all_reduce
        self.reduce_share: Kernel = all_reduce.reduce_share
        self.share: Kernel = sharing.share
        self.barrier: Kernel = sharing.barrier
        self.scratch_bytes: int = reducers.SCRATCH_BYTES
        self._reducers = reducers
        self._made: dict[tuple[object, int], object] = {}
        self.reducer(torch.float32, ReduceOp.SUM)

    @functools.cached_property
    def schedule(self) -> Kernel:
        """The kernel of whole schedules, for those who run one."""
        with _kept():
            from backends.shm.compiled import schedules
        kernel: Kernel = schedules.schedule
        return kernel

    @functools.cached_property
    def step(self) -> Kernel:
        """The kernel of a step in one pass, for those who take one."""
        with _kept():
            from backends.shm.compiled import step
        kernel: Kernel = step.step
        return kernel

    def reducer(self, dtype: torch.dtype, op: ReduceOp) -> int:
        """Return the address of the reducer of a dtype and an operation."""
        key = self._reducers.KINDS[dtype], self._reducers.OPS.index(op)
        if key not in self._made:
            with _kept():
                self._made[key] = self._reducers.make_reducer(*key)
        address: int = self._made[key].address  # type: ignore[attr-defined]
        return address

    def itemsize(self, dtype: torch.dtype) -> int:
        """Return the bytes of what a reducer takes for an element."""
        return int(self._reducers.itemsize_of(dtype))


@functools.cache
def kernels() -> Kernels:
    """Return the kernels."""
    return Kernels()


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Keep what is compiled here; while another process of this user does so, wait."""
    import numba

    directory = _directory()
    before = numba.config.CACHE_DIR
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        numba.config.CACHE_DIR = str(directory)
        try:
            yield
        finally:
            numba.config.CACHE_DIR = before


@functools.cache
def _directory() -> Path:
    """Return where the kernels of these sources are kept."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]
    with contextlib.suppress(OSError, RuntimeError):  # a user whom the system does not know has no home
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minidist"
        return _made(cache / digest)
    return _made(Path(tempfile.gettempdir()) / f"minidist-{os.getuid()}" / digest)


def _made(directory: Path) -> Path:
    """Make a directory that nobody else can write to: what lies in it is run."""
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    for path in (directory.parent, directory):
        status = path.stat(follow_symlinks=False)
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise PermissionError(f"{path} must belong to user {os.getuid()} alone; remove it")
    if not os.access(directory, os.W_OK):
        raise PermissionError(f"{directory} cannot be written to")
    return directory
