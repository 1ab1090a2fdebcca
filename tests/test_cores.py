"""How many cores the ranks of a host have: affinities, and the quotas of control groups in files of either version."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from backends import cores
from backends.cores import Cores, per_rank


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a directory stand for what the kernel says of control groups."""
    monkeypatch.setattr(cores, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("where", ["groups/jobs/mine", "groups/jobs", "groups"])
def test_a_quota_of_any_level_counts(where: str, kernel: Path) -> None:
    write(kernel / "membership", "0::/jobs/mine\n")
    write(kernel / "groups/jobs/mine/cpu.max", "max 100000\n")
    write(kernel / where / "cpu.max", "150000 100000\n")
    assert cores.here()[2:] == ("/jobs/mine", 1.5)


def test_quotas_of_the_first_version(kernel: Path) -> None:
    write(kernel / "membership", "5:memory:/m\n3:cpu,cpuacct:/box\n0::/\n")
    write(kernel / "groups/cpu,cpuacct/box/cpu.cfs_period_us", "100000\n")
    quota = kernel / "groups/cpu,cpuacct/box/cpu.cfs_quota_us"
    write(quota, "-1\n")
    assert cores.here().quota == math.inf
    write(quota, "300000\n")
    assert cores.here()[2:] == ("/box", 3.0)


def test_no_groups_are_no_limit(kernel: Path) -> None:
    assert cores.here() == Cores(os.uname().nodename, sorted(os.sched_getaffinity(0)), "/", math.inf)


def test_one_process_may_keep_at_least_one_core_busy(kernel: Path) -> None:
    assert cores.usable() == len(os.sched_getaffinity(0))
    write(kernel / "membership", "0::/mine\n")
    write(kernel / "groups/mine/cpu.max", "50000 100000\n")
    assert cores.usable() == 1


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([Cores("a", [0, 1], "/", math.inf)] * 2, 1),
        ([Cores("a", [0], "/", math.inf)] * 2, 0),
        ([Cores("a", [0], "/", math.inf), Cores("a", [1], "/", math.inf)], 1),
        ([Cores("a", [0, 1], "/box", 1.0)] * 2, 0),
        ([Cores("a", [0, 1], "/box1", 1.0), Cores("a", [0, 1], "/box2", 1.0)], 1),
        ([Cores("a", [0, 1], "/box", 1.0), Cores("b", [0, 1], "/", math.inf)], 1),
    ],
)
def test_cores_of_each_rank(ranks: list[Cores], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert per_rank(ranks, 0, len(ranks)) == expected


def test_other_ranks_of_the_job_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    two = [Cores("a", [0, 1, 2, 3], "/", math.inf)] * 2
    assert per_rank(two, 0, 2) == 2
    assert per_rank(two, 0, 4) == 1
