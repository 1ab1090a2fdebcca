"""The cores that the ranks of a host share: only with one for each may a rank that waits keep its own busy.

A process may use those of its affinity (taskset, Slurm), and of these as many as the quota of its control group has
(containers): https://docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SPIN_S = 2e-3
"""How long a rank with a core to itself looks before it sleeps: a process that sleeps wakes late."""
GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


class Cores(NamedTuple):
    """What one process may use.

    Attributes:
        host: where.
        cores: by number, those of its affinity.
        group: its control group, whose quota all of its processes share.
        quota: how many cores that is; infinite without one.
    """

    host: str
    cores: list[int]
    group: str
    quota: float


def here() -> Cores:
    """Return the cores of this process."""
    return Cores(socket.gethostname(), sorted(os.sched_getaffinity(0)), *_quota())


def usable() -> int:
    """Return how many cores this process may keep busy, and its children with it."""
    mine = here()
    return max(1, int(min(len(mine.cores), mine.quota)))


def per_rank(cores: Sequence[Cores], rank: int, local_world_size: int) -> int:
    """Return how many cores there are for each rank on the host of ``rank``, which is this one; 0 if fewer than ranks.

    A group of some ranks does not count cores that the other ranks of the job use too, ``local_world_size`` in all.
    """
    of_host = [mine for mine in cores if mine.host == cores[rank].host]
    by_affinity = len(set().union(*(mine.cores for mine in of_host)))
    by_quota = sum({mine.group: mine.quota for mine in of_host}.values())
    of_job = (os.cpu_count() or 1) // local_world_size
    return min(int(min(by_affinity, by_quota)) // len(of_host), of_job)


def _quota() -> tuple[str, float]:
    """Return the control group of this process, and how many cores it may use at a time."""
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            quota = min(map(_own_quota, _with_parents(GROUPS / controllers, path)), default=math.inf)
            if quota < math.inf:
                return path, quota
    return "/", math.inf


def _with_parents(root: Path, path: str) -> Iterator[Path]:
    """Yield the folder of a group and those of all it is a part of; in a container the root is the group's own."""
    folder = root / path.lstrip("/")
    yield from (each for each in (folder, *folder.parents) if each.is_relative_to(root))


def _own_quota(folder: Path) -> float:
    """Return the cores of one group, in the files of either version."""
    if (both := folder / "cpu.max").exists():
        quota, period = both.read_text().split()
    elif (of_version_1 := folder / "cpu.cfs_quota_us").exists():
        quota, period = of_version_1.read_text(), (folder / "cpu.cfs_period_us").read_text()
    else:
        return math.inf
    return int(quota) / int(period) if quota.strip() not in ("max", "-1") else math.inf
