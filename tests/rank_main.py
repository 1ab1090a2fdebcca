"""One rank, or all ranks as threads, of a world that runs checks: started by `harness`, never by hand.

Its argument is a directory with ``plan.json``; what happens is written there line by line, because the
process may end at any moment.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TextIO

import torch

from backends.thread import spawn_threads
from minidist.communicator import Communicator
from minidist.launch import detect
from tests.harness import CHECK_LIMIT_S, Job
from tests.inputs import DEVICE
from tests.table import CHECKS, made_by, needs_of


class Rank:
    """Runs the jobs of a plan one after the other; the first failure ends the process."""

    def __init__(self, directory: Path, rank: int, world_size: int, report: TextIO) -> None:
        self._directory, self._rank, self._world_size, self._report = directory, rank, world_size, report
        self._num_meetings = 0
        self._comm: Communicator | None = None
        self._made_by = ""

    def run(self, jobs: list[Job]) -> None:
        for index, job in enumerate(jobs):
            self._say(index, "start")
            faulthandler.dump_traceback_later(CHECK_LIMIT_S, exit=True)
            try:
                self._run_check(job)
            except BaseException:  # an assertion of a check, or anything that it ran into
                self._say(index, "failed", traceback.format_exc())
                os._exit(1)  # nothing of a broken world is worth an orderly end, which could hang
            self._say(index, "ok")
        self._let_go()
        faulthandler.cancel_dump_traceback_later()

    def _run_check(self, job: Job) -> None:
        check, needs = CHECKS[job.check], needs_of(job.check)
        if needs.fresh or needs.own_world:
            self._let_go()
            with made_by(job.make)() as comm:
                check(comm, self.meet)
            return
        if self._made_by != job.make:
            self._let_go()
            self._comm, self._made_by = made_by(job.make)(), job.make
        for _ in range(1 if needs.once else 2):
            check(self._comm)

    def _let_go(self) -> None:
        if self._comm is not None:
            self._comm.close()
        self._comm, self._made_by = None, ""

    def meet(self) -> None:
        """Return once every rank has called it as often as this one."""
        self._num_meetings += 1
        marks = [self._directory / f"meeting-{self._num_meetings}-{rank}" for rank in range(self._world_size)]
        marks[self._rank].touch()
        while not all(mark.exists() for mark in marks):
            time.sleep(0.005)

    def _say(self, index: int, event: str, text: str = "") -> None:
        line = {"index": index, "event": event, "text": text, "at": time.time(), "pid": os.getpid()}
        self._report.write(json.dumps(line) + "\n")
        self._report.flush()


def main(directory: Path) -> None:
    plan = json.loads((directory / "plan.json").read_text())
    jobs = [Job(**job) for job in plan["jobs"]]
    torch.set_num_threads(1)
    if any(needs_of(job.check).own_world for job in jobs):
        # A launcher that sees a rank end asks the others to end; they are to see it themselves first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def run_rank(rank: int) -> None:
        # Not set_default_device: what a thread leaves behind there takes the GIL when the thread ends, and crashes
        # the process if the interpreter is ending by then.
        device = torch.device(os.environ.get(DEVICE, "cpu"))
        with device, (directory / f"rank-{rank}.jsonl").open("w") as report:
            Rank(directory, rank, plan["world_size"], report).run(jobs)

    if plan["launcher"] == "thread":
        spawn_threads(lambda: run_rank(int(threading.current_thread().name.removeprefix("rank"))), plan["world_size"])
    else:
        run_rank(detect().rank)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
