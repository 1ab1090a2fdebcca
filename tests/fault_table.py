"""Twenty faults on several communicators, and what ranks are told: ``python -m tests.fault_table --comms gloo,shm``.

Each fault has ranks of its own, whose operations have a timeout of 5 s. A cell says within how many seconds of the
fault all ranks ended that were left, and what their errors name: (r) the rank whose fault it is, (c) the operation,
(l) the line of the user's code; a dash in the place of what some rank is not told. ``none`` is a fault that a
communicator cannot meet, ``ended`` one whose ranks are ended from outside. See `tests.fault_ranks` for the faults.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests import fork_server
from tests.fault_ranks import ANYBODY, FAULTS, OUTSIDE, Fault
from tests.harness import ROOT, command, end_launcher
from tests.hosts import Network
from tests.test_host_launchers import OVER_TCP, mpirun

COMMS = ("gloo", "ring", "mpi", "shm", "thread", "hierarchical")
LIMIT_S = 10.0
"""Within this time of the fault every rank has to have ended."""
WAIT_S = 25.0
START_S = 60.0
TWO_BY_TWO = (0, 0, 1, 1)
OWN_NAME = re.compile(r"\[rank \d+/\d+\]")
"""Who says it, which is not whom it is about."""
ONE_MACHINE = dict.fromkeys(OUTSIDE, "its ranks are on one machine")
NOT_THERE: Mapping[str, Mapping[str, str]] = {
    "shm": ONE_MACHINE,
    "thread": ONE_MACHINE | dict.fromkeys(("kill", "exit", "stop"), "its ranks share a process"),
}
"""The faults that a communicator cannot meet, and why."""
UNTOLD: Mapping[str, Mapping[str, str]] = {
    "mpi": dict.fromkeys(("kill", "exit", "host"), "mpirun ends all ranks when one has died, before they can say so")
}
"""The faults of which no rank can tell, and why."""


@dataclass(frozen=True)
class Cell:
    """What became of one fault on one communicator.

    Attributes:
        ended_s: when the last rank that was left had ended; None if one had not.
        rank, call, line: whether all were told.
        said: by rank, its kind of error and what it says.
        untold: why no rank can say anything; empty where they can.
    """

    ended_s: float | None
    rank: bool
    call: bool
    line: bool
    said: Mapping[int, str]
    untold: str = ""

    @property
    def is_well(self) -> bool:
        in_time = self.ended_s is not None and self.ended_s < LIMIT_S
        return in_time and (bool(self.untold) or all(self.names))

    def __str__(self) -> str:
        ended = "hangs" if self.ended_s is None else f"{self.ended_s:.1f} s"
        named = "".join(letter if told else "-" for letter, told in zip("rcl", self.names, strict=True))
        return f"{ended} {'ended' if self.untold else named}"

    @property
    def names(self) -> tuple[bool, bool, bool]:
        return self.rank, self.call, self.line


# Worlds -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Ranks that run: whether they have all ended, and what ended them from outside."""

    has_ended: Callable[[], bool]
    strike: Callable[[], object]
    output: Callable[[], str]


def world_size(comm: str, fault: str) -> int:
    return 4 if fault in OUTSIDE or comm == "hierarchical" else 3


@contextmanager
def forked(comm: str, fault: str, folder: Path) -> Iterator[World]:
    size = None if comm == "thread" else world_size(comm, fault)
    output = folder / "output.txt"
    output.touch()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    order = fork_server.Order(
        "tests.fault_ranks", (comm, fault, str(folder)), size, str(ROOT), str(output), environment
    )
    running = fork_server.server().start(order)
    try:
        yield World(lambda: running.has_ended(0), lambda: None, output.read_text)
    finally:
        running.finish(fork_server.GRACE_S)


@contextmanager
def by_mpirun(arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> Iterator[World]:
    output = folder / "output.txt"
    with output.open("w") as sink:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=sink, stderr=sink, start_new_session=True
        )
    try:
        yield World(lambda: process.poll() is not None, lambda: None, output.read_text)
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(fork_server.GRACE_S)
        if process.poll() is None:
            end_launcher(process)


@contextmanager
def on_hosts(comm: str, fault: str, folder: Path) -> Iterator[World]:
    """Start two hosts of two ranks, of which the second one is struck."""
    arguments = ("tests.fault_ranks", comm, fault, str(folder))
    with Network(2, mbit_per_s=1000) as network:

        def strike() -> None:
            network.hosts[1].end() if fault == "host" else network.set_port(1, "down" if fault == "cut" else "lost")

        if comm == "mpi":
            start = by_mpirun(mpirun(network, folder, "-m", *arguments), OVER_TCP, folder)
            with start as world:
                yield World(world.has_ended, strike, world.output)
        else:
            with network.start(*arguments, on=TWO_BY_TWO) as ranks:
                yield World(ranks.has_ended, strike, lambda: ranks.output)


def started(comm: str, fault: str, folder: Path) -> contextlib.AbstractContextManager[World]:
    if fault in OUTSIDE:
        return on_hosts(comm, fault, folder)
    if comm == "mpi":
        arguments = command("mpirun", world_size(comm, fault), "-m", "tests.fault_ranks", comm, fault, str(folder))
        return by_mpirun(arguments, {**os.environ, "OMP_NUM_THREADS": "1"}, folder)
    return forked(comm, fault, folder)


# A cell -----------------------------------------------------------------------------------------


def suffer(comm: str, fault: str, folder: Path) -> Cell:
    """Let a world suffer a fault, and judge what its ranks are told."""
    size = world_size(comm, fault)
    with started(comm, fault, folder) as world:
        if fault in OUTSIDE:
            wait_until(lambda: all((folder / f"ready-{rank}").exists() for rank in range(size)), world, START_S)
            began = time.time()
            world.strike()
        else:
            wait_until((folder / "fault.json").exists, world, START_S)
            began = read(folder / "fault.json")["at"]
        left = remaining(fault, size)
        wait_until(lambda: all(report(folder, rank).exists() for rank in left), world, WAIT_S)
        if fault == "stop":
            with contextlib.suppress(ProcessLookupError):
                os.kill(read(folder / "fault.json")["pid"], signal.SIGKILL)
        output, ended_at = world.output(), time.time() if world.has_ended() else None
    cell = judged(fault, began, reports(folder, left, output, ended_at))
    return replace(cell, untold=UNTOLD.get(comm, {}).get(fault, ""))


def remaining(fault: str, size: int) -> list[int]:
    """Return the ranks that can say something in the end."""
    gone = {"kill": {1}, "exit": {1}, "stop": {1}, "host": {2, 3}}.get(fault, set())
    return [rank for rank in range(size) if rank not in gone]


def wait_until(condition: Callable[[], bool], world: World, limit_s: float) -> None:
    """Wait for a condition; no longer than the world lives."""
    until = time.monotonic() + limit_s
    while not condition() and time.monotonic() < until and not world.has_ended():
        time.sleep(0.01)


def report(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def read(path: Path) -> dict[str, float | int | str]:
    found: dict[str, float | int | str] = json.loads(path.read_text())
    return found


def reports(
    folder: Path, left: Sequence[int], output: str, ended_at: float | None
) -> dict[int, dict[str, float | int | str]]:
    """Return what each rank has said; of one that its launcher has ended before, what that says."""
    said = {rank: read(report(folder, rank)) for rank in left if report(folder, rank).exists()}
    if ended_at is not None:
        for rank in set(left) - set(said):
            said[rank] = {"at": ended_at, "kind": "ended by its launcher", "said": output[-2000:]}
    return {rank: said.get(rank, {"at": float("inf"), "kind": "hangs", "said": ""}) for rank in left}


def judged(name: str, began: float, said: Mapping[int, Mapping[str, float | int | str]]) -> Cell:
    fault = FAULTS[name]
    told = {rank: OWN_NAME.sub("", str(each["said"])) for rank, each in said.items() if must_tell(fault, rank)}
    ended_s = max(float(each["at"]) for each in said.values()) - began
    return Cell(
        ended_s if ended_s < WAIT_S else None,
        all(re.search(rf"\branks? {whom(fault, rank)}\b", text, re.IGNORECASE) for rank, text in told.items()),
        all(fault.call in text for text in told.values()),
        all(any(Path(line).name in text for line in fault.lines) for text in told.values()),
        {rank: f"{each['kind']}: {each['said']}" for rank, each in said.items()},
    )


def must_tell(fault: Fault, rank: int) -> bool:
    return fault.by_all or rank != fault.culprit


def whom(fault: Fault, rank: int) -> str:
    """Return a pattern of the rank that ``rank`` has to name."""
    if fault.culprit is None:
        return "[01]" if rank > 1 else "[23]"
    return rf"(?!{rank}\b)\d" if fault.culprit == ANYBODY else str(fault.culprit)


def explained(comm: str, table: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Yield a line for each reason why a communicator has no cell for some faults, or an empty one."""
    reasons = table.get(comm, {})
    for why in dict.fromkeys(reasons.values()):
        yield f"{comm}: {', '.join(fault for fault, reason in reasons.items() if reason == why)}: {why}"


def main() -> None:
    """Print the table, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comms", default=",".join(COMMS))
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--say", action="store_true", help="also what the ranks of a cell that is not well say")
    given = parser.parse_args()
    comms = given.comms.split(",")
    well = dict.fromkeys(comms, 0)
    there = dict.fromkeys(comms, 0)
    print(f"{'fault':<16}" + "".join(f"{comm:<14}" for comm in comms))
    for fault in given.faults.split(","):
        row = []
        for comm in comms:
            if fault in NOT_THERE.get(comm, {}):
                row.append("none")
                continue
            with tempfile.TemporaryDirectory() as folder:
                cell = suffer(comm, fault, Path(folder))
            row.append(str(cell))
            there[comm] += 1
            well[comm] += cell.is_well
            if given.say and not cell.is_well:
                print("\n".join(f"  {comm}, {fault}, rank {rank}: {said}" for rank, said in cell.said.items()))
        print(f"{fault:<16}" + "".join(f"{cell:<14}" for cell in row), flush=True)
    print(f"{'well':<16}" + "".join(f"{f'{well[comm]} of {there[comm]}':<14}" for comm in comms))
    for word, table in (("none", NOT_THERE), ("ended", UNTOLD)):
        for line in (line for comm in comms for line in explained(comm, table)):
            print(f"{word}: {line}")
    sys.exit(any(well[comm] < there[comm] for comm in comms))


if __name__ == "__main__":
    main()
