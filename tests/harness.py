"""Starts worlds the way users do and runs checks in them.

One world per launcher and number of ranks runs all checks of all its communicators in turn, because
starting Python and torch takes longer than most checks, and where nothing depends on what starts the ranks they are
forks of a process that has done so. A check that fails, hangs or crashes ends its
world; the checks after it run in the next one. A check that ends a process has a world of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests import fork_server

ROOT = Path(__file__).parent.parent
CHECK_LIMIT_S = 120.0
"""A check that takes longer hangs: its threads are dumped and its world ends."""
WORLD_LIMIT_S = 1200.0
MAX_FAILURES = 12
"""After so many failures in one kind of world the rest of its checks fail unseen."""


@dataclass(frozen=True)
class Job:
    """One check on one communicator; ``make`` is a dotted path, see `tests.table.Row`."""

    row: str
    make: str
    check: str


@dataclass(frozen=True)
class Event:
    """A line of a rank's report."""

    rank: int
    index: int
    event: str
    text: str
    at: float
    pid: int


@dataclass(frozen=True)
class World:
    """What a world left behind."""

    returncode: int | None  # None: it took too long and was ended
    ended_at: float
    output: str
    events: list[Event]
    leftovers: list[int]

    def explain(self, why: str) -> str:
        return f"{why}\nexit status {self.returncode}\n--- output of the world ---\n{self.output[-8000:]}"


def command(launcher: str, world_size: int, *arguments: str) -> list[str]:
    """Return what starts ``python *arguments`` on each rank."""
    start = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"],
        "mpirun": [],
        "thread": [],
        "none": [],
    }[launcher]
    mpirun = [str(Path(sys.executable).with_name("mpirun")), "-n", str(world_size)] if launcher == "mpirun" else []
    return [*mpirun, sys.executable, *start, *arguments]


def run_jobs(
    launcher: str, world_size: int, jobs: list[Job], directory: Path, forked: bool = False
) -> dict[Job, str | None]:
    """Run ``jobs`` in as few worlds as they let; return what went wrong, or None, for each."""
    outcomes: dict[Job, str | None] = {}
    num_failures = 0
    while jobs and num_failures < MAX_FAILURES:
        here = directory / f"world-{num_failures}"
        world = start_world(launcher, world_size, jobs, here, forked)
        passed, failure = judge(world, jobs, world_size)
        outcomes |= dict.fromkeys(jobs[:passed])
        if failure is not None:
            outcomes[jobs[passed]] = failure
            num_failures += 1
            passed += 1
        jobs = jobs[passed:]
    return outcomes | dict.fromkeys(jobs, f"not run: {MAX_FAILURES} other checks failed in this kind of world")


def judge(world: World, jobs: list[Job], world_size: int) -> tuple[int, str | None]:
    """Return how many jobs passed in turn, and what went wrong with the next one."""
    failures = sorted((e for e in world.events if e.event == "failed"), key=lambda e: (e.index, e.at))
    finished = {e.rank: e.index + 1 for e in world.events if e.event == "ok"}
    passed = min((finished.get(rank, 0) for rank in range(world_size)), default=0)
    if failures and failures[0].index <= passed:
        return failures[0].index, world.explain(f"rank {failures[0].rank} failed first:\n{failures[0].text}")
    if passed < len(jobs):
        where = {
            rank: max((e.index for e in world.events if e.rank == rank), default=None) for rank in range(world_size)
        }
        return passed, world.explain(f"the world ended, or hung, with its ranks at jobs {where}; this is job {passed}")
    if world.returncode != 0 or world.leftovers:
        return passed - 1, world.explain(f"after the last check: processes {world.leftovers} were left")
    return passed, None


def run_fatal_job(launcher: str, world_size: int, job: Job, directory: Path) -> str | None:
    """Run a job in which rank 1 ends its process; return what went wrong, or None."""
    world = start_world(launcher, world_size, [job], directory)
    failed = [e for e in world.events if e.event == "failed"]
    if failed:
        return world.explain(f"rank {failed[0].rank}:\n{failed[0].text}")
    if world.returncode is None or world.leftovers:
        return world.explain(f"it had to be ended; left processes: {world.leftovers}")
    knowing = sum(e.event == "ok" for e in world.events)
    if launcher != "mpirun" and knowing != world_size - 1:
        return world.explain(f"{knowing} of {world_size - 1} ranks saw that rank 1 was gone")
    began = max((e.at for e in world.events), default=0.0)
    return None if world.ended_at < began + 20 else world.explain("the launcher took long to end the world")


def start_world(launcher: str, world_size: int, jobs: list[Job], directory: Path, forked: bool = False) -> World:
    """Run ``jobs`` in one world, to its end or to WORLD_LIMIT_S; its ranks are forks if they can be."""
    directory.mkdir(parents=True)
    plan = {"launcher": launcher, "world_size": world_size, "jobs": [dataclasses.asdict(job) for job in jobs]}
    (directory / "plan.json").write_text(json.dumps(plan))
    module, output_file = ("tests.rank_main", str(directory)), directory / "output.txt"
    if forked and launcher != "mpirun":
        num_ranks = world_size if launcher == "torchrun" else None
        returncode, output = run_forked(*module, world_size=num_ranks, output=output_file, limit_s=WORLD_LIMIT_S)
    else:
        returncode, output = run_command(command(launcher, world_size, "-m", *module), output_file, WORLD_LIMIT_S)
    ended_at = time.time()
    events = [event for rank in range(world_size) for event in _read(directory / f"rank-{rank}.jsonl", rank)]
    return World(returncode, ended_at, output, events, _end(events, str(directory)))


def run_forked(
    program: str,
    *arguments: str,
    world_size: int | None,
    output: Path,
    limit_s: float,
    directory: Path = ROOT,
    environment: dict[str, str] | None = None,
) -> tuple[int | None, str]:
    """Do as `run_command` for ``python`` on ranks as torchrun starts them, or on none; see `fork_server.Order`."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    order = fork_server.Order(program, arguments, world_size, str(directory), str(output), variables)
    returncode = fork_server.server().run(order, limit_s)
    return returncode, output.read_text(errors="replace")


def run_command(
    arguments: list[str], output: Path, limit_s: float, environment: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """Run a command that may start processes; return its exit status, None at the limit, and all it wrote."""
    with output.open("w") as sink:
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            returncode: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:  # also when the tests are interrupted
            if process.poll() is None:
                end_launcher(process)
    return returncode, output.read_text(errors="replace")


def end_launcher(process: subprocess.Popen[bytes]) -> None:
    """Let the launcher end its ranks, which may be in sessions of their own; then end it."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(path: Path, rank: int) -> Iterable[Event]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [Event(rank, **json.loads(line)) for line in lines]


def _end(events: list[Event], directory: str) -> list[int]:
    """End the processes that reported into ``directory`` and are still there; return which."""
    leftovers = []
    for pid in {event.pid for event in events}:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            # A fork has the command line of another; and nobody else who has got the number since has this open.
            if any(file.path.startswith(directory) for file in process.open_files()):
                leftovers.append(pid)
                process.kill()
    return leftovers
