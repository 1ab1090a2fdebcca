"""What users do besides the loop of the tutorial, on several communicators, against torch's own DDP."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests import habits, harness
from tests.table import CHECKED

PROCESSES = (
    *("backends.shm.ShmCommunicator", "backends.torch_dist.GlooCommunicator", "tests.table.ring_over_gloo"),
    f"{CHECKED}backends.shm.ShmCommunicator",
)
THREADS = ("backends.thread.ThreadCommunicator", f"{CHECKED}backends.thread.ThreadCommunicator")
Failures = dict[tuple[str, str], list[str]]


@pytest.fixture(scope="module")
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Failures:
    """Run what was selected; return what each rank said, nothing where all went well, by communicator and program."""
    directory = tmp_path_factory.mktemp("habits")
    tests = [
        item for item in request.session.items if isinstance(item, pytest.Function) and item.function is test_habit
    ]
    wanted: dict[str, list[str]] = defaultdict(list)
    for item in tests:
        wanted[item.callspec.params["make"]].append(item.callspec.params["name"])
    wanted["torch"] = [name for name in habits.AGAINST_TORCH if any(name in names for names in wanted.values())]
    n = habits.WORLD_SIZE
    for num_ranks, makes in ((n, ("torch",)), (n, PROCESSES), (None, THREADS)):
        given = [f"{make}:{','.join(wanted[make])}" for make in makes if wanted[make]]
        if given:
            output_file = directory / f"{makes[0]}.txt"
            returncode, output = harness.run_forked(
                "tests.habits", str(directory), *given, world_size=num_ranks, output=output_file, limit_s=300
            )
            assert returncode == 0, output
    said: Failures = defaultdict(list)
    for path in directory.glob("outcomes-*.jsonl"):
        for line in path.read_text().splitlines():
            outcome = json.loads(line)
            said[outcome["make"], outcome["name"]].append(outcome["failure"])
    return said


def _cases() -> Iterator[object]:
    """Yield all programs on all communicators; by default on two, and what takes a compiler on shared memory alone."""
    for make in (*PROCESSES, *THREADS):
        for name in (*habits.AGAINST_TORCH, *habits.OURS):
            is_slow = make not in PROCESSES[:2] or ("compiled" in name and make != PROCESSES[0])
            yield pytest.param(make, name, marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.timeout(900)  # the first of them runs all
@pytest.mark.parametrize(("make", "name"), list(_cases()))
def test_habit(make: str, name: str, failures: Failures) -> None:
    assert len(failures[make, name]) == habits.WORLD_SIZE
    assert not any(failures[make, name]), "\n".join(failures[make, name])
