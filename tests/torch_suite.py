"""Runs torch's own distributed_test.py, which is in its wheel, on a backend: ``python -m tests.torch_suite``.

::

    python -m tests.torch_suite --backend gloo                      what passes natively
    python -m tests.torch_suite --backend minidist --comm ring/gloo -k all_reduce
    python -m tests.torch_suite --as gloo                           under the name of gloo
    python -m tests.torch_suite --like mpi -k all_to_all            those that torch has for MPI alone

Torch starts three new processes for each test. Here they are forks of one that has torch loaded, as most of the time
would otherwise go into that; the tests are torch's, unchanged. What it says of a backend that it does not know ("ddp",
"subgroup") is said here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import unittest
from collections import Counter
from pathlib import Path
from typing import Any

import torch.multiprocessing

from minidist.c10d import register
from tests.fork_server import load_kernels

LIMIT_S = 90


def load(backend: str, like: str, world_size: int, folder: Path) -> type[unittest.TestCase]:
    """Return those of torch's tests that are for ``like``, as a class of ours that runs them on ``backend``."""
    (folder / "barrier").mkdir()
    (folder / "test_dir").mkdir()
    os.environ.update(
        BACKEND=like,
        WORLD_SIZE=str(world_size),
        TEMP_DIR=str(folder),
        MASTER_ADDR="127.0.0.1",
        DISTRIBUTED_TESTS_DEFAULT_TIMEOUT=str(LIMIT_S),
    )
    from torch.testing._internal.common_distributed import DistTestCases

    for feature in ("ddp", "gpu", "plugin", "subgroup"):
        DistTestCases.backend_feature[feature].add("minidist")
    from torch.testing._internal.distributed import distributed_test

    os.environ["BACKEND"] = distributed_test.BACKEND = backend
    for lists in ("PROFILING_SUPPORTED_BACKENDS", "SEND_RECV_PROFILING_SUPPORTED_BACKENDS"):
        getattr(distributed_test, lists).clear()  # under Gloo's name too: its events in a profile are its own

    class TorchSuite(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):  # type: ignore[misc]
        def setUp(self) -> None:
            super().setUp()
            self._start_processes(torch.multiprocessing.get_context("fork").Process)

        def tearDown(self) -> None:
            for process in self.processes:  # what hangs has been reported
                if process.is_alive():
                    process.kill()
            super().tearDown()

    return TorchSuite


def run(case: type[unittest.TestCase], name: str) -> tuple[str, str]:
    """Run one test; return passed, failed or skipped, and why."""
    result = unittest.TestResult()
    unittest.TestSuite([case(name)]).run(result)
    if result.skipped:
        return "skipped", result.skipped[0][1]
    problems = result.failures + result.errors
    return ("failed", problems[0][1]) if problems else ("passed", "")


def last_words(trace: str) -> str:
    """Return the line of a traceback that says most."""
    lines = [line.strip() for line in trace.splitlines() if "Error" in line and "raise " not in line]
    ours = [line for line in lines if "RuntimeError: Process" not in line]
    return (ours or lines or trace.splitlines()[-1:] or [""])[-1][:300]


def main() -> None:
    """Run the chosen tests, and print what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="minidist")
    parser.add_argument("--like", help="a backend whose tests are run: gloo or mpi; the backend's own name otherwise")
    parser.add_argument("--as", dest="name", help="the name that minidist has, for programs that ask for gloo")
    parser.add_argument("--comm", default=None, help="what MINIDIST_COMM is set to")
    parser.add_argument("--world-size", type=int, default=3)
    parser.add_argument("-k", default="", help="a part of the names; or several, with commas")
    parser.add_argument("--output", type=Path, help="where the outcomes go, as JSON")
    given = parser.parse_args()
    if given.comm:
        os.environ["MINIDIST_COMM"] = given.comm
    if given.comm and "shm" in given.comm:
        load_kernels()
    sys.argv = sys.argv[:1]  # torch's tests read it too
    outcomes: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if given.name:
            register(given.name)
        backend = given.name or given.backend
        case = load(backend, given.like or backend, given.world_size, Path(folder))
        parts = given.k.split(",")
        names = [name for name in unittest.TestLoader().getTestCaseNames(case) if any(part in name for part in parts)]
        for name in names:
            started = time.perf_counter()
            status, why = run(case, name)
            seconds = round(time.perf_counter() - started, 2)
            outcomes[name] = {"status": status, "why": why, "seconds": seconds}
            if status != "skipped":
                print(f"{status:7} {seconds:6.2f} s  {name}  {last_words(why)}", flush=True)
            if given.output:
                given.output.write_text(json.dumps(outcomes, indent=1))
    print(dict(Counter(outcome["status"] for outcome in outcomes.values())))


if __name__ == "__main__":
    main()
