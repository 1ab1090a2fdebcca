"""What a run leaves: its processes, files in shared memory, and temporary files."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

IN_MEMORY = Path("/dev/shm")


def processes_in(directory: Path) -> Iterator[psutil.Process]:
    """Yield the processes whose working directory it is; a fork has the command line and variables of another."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.cwd() == str(directory) and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def holders(path: Path, directory: Path) -> list[psutil.Process]:
    """Return the processes in a directory that have a file open."""
    found = []
    for process in processes_in(directory):
        with contextlib.suppress(psutil.Error, OSError):
            if any(Path(file.path) == path for file in process.open_files()):
                found.append(process)
    return found


def seconds_until_ended(processes: list[psutil.Process], limit_s: float) -> float | None:
    """Wait for the end of processes, whoever's children they are; return how long it took, None beyond the limit."""
    started = time.monotonic()
    while any(_lives(process) for process in processes):
        if time.monotonic() > started + limit_s:
            return None
        time.sleep(0.01)
    return time.monotonic() - started


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def in_memory() -> set[str]:
    """Return the names in shared memory."""
    return {path.name for path in IN_MEMORY.iterdir()}


def orphans(before: set[str], limit_s: float = 5.0) -> set[str]:
    """Return the names in shared memory that were not there before, and that no process has mapped.

    Others on this machine make some meanwhile: what is theirs is mapped, or gone, within the limit.
    """
    until = time.monotonic() + limit_s
    left = in_memory() - before
    while left and time.monotonic() < until:
        left = _unmapped(left) & in_memory()
        time.sleep(0.05)
    return left


def _unmapped(names: set[str]) -> set[str]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mapped = Path(f"/proc/{process.pid}/maps").read_text()
            names = {name for name in names if f"{IN_MEMORY}/{name}" not in mapped}
    return names
