"""Every check of the conformance suite on every row of its table; see conformance.py for other communicators."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests import harness
from tests.harness import Job
from tests.table import CHECKS, ROWS, Row, needs_of


@dataclass(frozen=True)
class Case:
    """One test: a check on a communicator with a number of ranks."""

    row: Row
    world_size: int
    check: str

    @property
    def job(self) -> Job:
        return Job(self.row.name, self.row.make, self.check)

    @property
    def world(self) -> tuple[str, int]:
        """What it takes to share a world with another case."""
        return self.row.launcher, self.world_size


def _rows(config: pytest.Config) -> tuple[Row, ...]:
    path = config.getoption("--comm")
    if not path:
        return ROWS
    lacks = dict(declared.split("=", 1) for declared in config.getoption("--comm-lacks"))
    return (Row(path, path, config.getoption("--comm-launcher"), lacks),)


def _world_sizes(config: pytest.Config, row: Row) -> list[int]:
    if row.launcher == "none":
        return [1]
    if chosen := config.getoption("--world-sizes"):
        return [int(size) for size in chosen.split(",")]
    if row.only is not None:
        return [row.only]
    more = [5, 8] if row.launcher != "thread" else [5] if row.name == "thread" else []
    return [1, 2, 3, 4, *(more if config.getoption("--slow") else [])]


def _wanted(row: Row, world_size: int, check: str) -> bool:
    """Whether it says anything; what a row of the table lacks is declared there, and no lack of this machine."""
    needs = needs_of(check)
    if row in ROWS and row.missing(check) is not None:
        return False
    return world_size >= needs.ranks and (world_size == 3 or not needs.own_world)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    slow = metafunc.config.getoption("--slow")  # nine of ten are: to make them and to leave them out takes seconds
    cases = [
        pytest.param(case, id=f"{row.name}-{world_size}-{check}", marks=_marks(row, world_size, check))
        for row in _rows(metafunc.config)
        for world_size in _world_sizes(metafunc.config, row)
        for check in CHECKS
        if _wanted(row, world_size, check)
        if slow or row.missing(check) or not _is_slow(row, world_size, check)
        for case in [Case(row, world_size, check)]
    ]
    metafunc.parametrize("case", cases)


def _marks(row: Row, world_size: int, check: str) -> list[pytest.MarkDecorator]:
    reason = row.missing(check)
    if reason is not None:
        return [pytest.mark.skip(reason=f"{row.name}: {reason}")]
    return [pytest.mark.slow] if _is_slow(row, world_size, check) else []


FATAL_BY_DEFAULT = {"gloo": "check_killed_rank_is_named"}
OTHER_LAUNCHER = ("shm-mpirun", "ring-shm-mpirun")
SIMILAR = ("ring-thread", "group-of-thread", "ring-gloo")
FAULTS_IN_THREES = ("thread", "shm")
"""Rows that run with several numbers of ranks, of which faults, that wait for their times, need one."""


def _is_slow(row: Row, world_size: int, check: str) -> bool:
    """Slow are processes but in threes, and what is much like another one; but shared memory in twos, and training."""
    if row.only is not None:
        return True
    if row.focus:
        in_focus = any(check.startswith(f"check_{part}") for part in row.focus)
        return not in_focus or world_size != 3 or (row.launcher == "torchrun" and needs_of(check).own_world)
    if (
        row.name in OTHER_LAUNCHER
        or world_size > 4
        or (row.launcher in ("torchrun", "mpirun") and world_size not in (2, 3))
    ):
        return True
    if row.name in ("gloo", "mpi") and world_size == 2 and not check.startswith("check_training"):
        return True
    if needs_of(check).own_world:
        return FATAL_BY_DEFAULT.get(row.name) != check
    if row.name in FAULTS_IN_THREES and world_size in (2, 4) and needs_of(check).fresh:
        return True
    if row.name in SIMILAR and (world_size != 3 or ("large" in check and "refused" in check)):
        return True
    return (
        check.startswith("check_training")
        and check != "check_training_mlp"
        and (world_size != 2 or row.name in SIMILAR)
    )


class Worlds:
    """Runs the cases that were selected, those that share a world together, and keeps the outcomes."""

    def __init__(self, cases: list[Case], tmp_path_factory: pytest.TempPathFactory, forked: bool) -> None:
        self._cases, self._tmp_path_factory, self._forked = cases, tmp_path_factory, forked
        self._outcomes: dict[tuple[str, int], dict[Job, str | None]] = {}

    def outcome(self, case: Case) -> str | None:
        if needs_of(case.check).own_world:
            directory = self._tmp_path_factory.mktemp(case.check) / "world"
            return harness.run_fatal_job(*case.world, case.job, directory)
        if case.world not in self._outcomes:
            self._outcomes[case.world] = self._run_all(case.world)
        return self._outcomes[case.world][case.job]

    def _run_all(self, world: tuple[str, int]) -> dict[Job, str | None]:
        jobs = [case.job for case in self._cases if case.world == world and not needs_of(case.check).own_world]
        return harness.run_jobs(*world, jobs, self._tmp_path_factory.mktemp(f"{world[0]}-{world[1]}"), self._forked)


@pytest.fixture(scope="session")
def worlds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    selected = [item for item in request.session.items if isinstance(item, pytest.Function)]
    run = [item for item in selected if item.function is test_conformance and item.get_closest_marker("skip") is None]
    # Launchers start the ranks of the slow set, of other people's communicators, and of what ends processes.
    forked = not (request.config.getoption("--slow") or request.config.getoption("--comm"))
    return Worlds([item.callspec.params["case"] for item in run], tmp_path_factory, forked)


@pytest.mark.timeout(3600)  # the first test of a world runs all of it; the harness has its own limits
def test_conformance(case: Case, worlds: Worlds) -> None:
    failure = worlds.outcome(case)
    if failure is not None:
        pytest.fail(failure, pytrace=False)
