"""What users do besides the loop of the tutorial, on several communicators, against torch's own DDP."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from tests import habits, harness

PROCESSES = ("backends.shm.ShmCommunicator", "backends.torch_dist.GlooCommunicator", "tests.table.ring_over_gloo")
THREADS = ("backends.thread.ThreadCommunicator",)
Failures = dict[tuple[str, str], list[str]]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Failures:
    """Run everything; return what each rank said, nothing where all went well, by communicator and program."""
    directory = tmp_path_factory.mktemp("habits")
    for launcher, makes in (("torchrun", ("torch",)), ("torchrun", PROCESSES), ("thread", THREADS)):
        arguments = harness.command(launcher, habits.WORLD_SIZE, "-m", "tests.habits", str(directory), *makes)
        returncode, output = harness.run_command(arguments, directory / f"{makes[0]}.txt", limit_s=300)
        assert returncode == 0, output
    said: Failures = defaultdict(list)
    for path in directory.glob("outcomes-*.jsonl"):
        for line in path.read_text().splitlines():
            outcome = json.loads(line)
            said[outcome["make"], outcome["name"]].append(outcome["failure"])
    return said


@pytest.mark.timeout(900)  # the first of them runs all
@pytest.mark.parametrize("name", [*habits.AGAINST_TORCH, *habits.OURS])
@pytest.mark.parametrize("make", [*PROCESSES, *THREADS])
def test_habit(make: str, name: str, failures: Failures) -> None:
    assert len(failures[make, name]) == habits.WORLD_SIZE
    assert not any(failures[make, name]), "\n".join(failures[make, name])
