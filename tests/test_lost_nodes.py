"""A node of torchrun that is lost: the job goes on without it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.fork_server import ROOT
from tests.ports import free_port

START_S = 150.0
END_S = 250.0
KILL_AFTER = "Step 60"


class Job:
    """Two nodes of one rank, each an agent of torchrun on this machine.

    Args:
        directory: what it writes into.
        nodes: how many there have to be, as torchrun has it.
        settings: of the training.
    """

    def __init__(self, directory: Path, nodes: str, *settings: str) -> None:
        self._directory = directory
        values = {"engine.epochs": 25, "engine.checkpoint_every_steps": 5, "engine.log_every": 20}
        values |= {"engine.checkpoint_dir": directory / "checkpoints", "hydra.run.dir": directory / "run"}
        switches = ("engine.resume=true", "engine.progress=false", "data=digits", "comm=gloo", *settings)
        training = [
            ROOT / "experiments" / "mnist.py",
            *switches,
            *(f"{name}={value}" for name, value in values.items()),
        ]
        agent = [
            f"--rdzv-endpoint=127.0.0.1:{free_port()}",
            "--rdzv-backend=c10d",
            "--rdzv-id=job",
            f"--nnodes={nodes}",
        ]
        agent += ["--nproc-per-node=1", "--max-restarts=3", "--local-addr=127.0.0.1"]
        self._arguments = [*agent, *map(str, training)]
        self._nodes: list[subprocess.Popen[bytes]] = []

    def start_node(self) -> None:
        """Start the next node; the first one is where all meet."""
        conf = f"--rdzv-conf=is_host={int(not self._nodes)},last_call_timeout=10"
        with self._output(len(self._nodes)).open("w") as output:
            command = [sys.executable, "-m", "torch.distributed.run", conf, *self._arguments]
            node = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        self._nodes.append(node)

    def said(self, node: int) -> str:
        return self._output(node).read_text()

    def wait_for(self, text: str) -> None:
        until = time.monotonic() + START_S
        while not any(text in self.said(node) for node in range(len(self._nodes))):
            assert time.monotonic() < until, [self.said(node) for node in range(len(self._nodes))]
            time.sleep(0.1)

    def kill_node(self, node: int) -> None:
        """End an agent and what it has started, at once.

        A rank that outlived its agent would get SIGTERM from the kernel, and stop the job as a user does; an agent that
        outlived its rank would start another one.
        """
        with suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self._nodes[node].pid)
            agent.suspend()
            for process in [*agent.children(recursive=True), agent]:
                process.kill()

    def end(self, node: int) -> str:
        """Wait until a node has ended well; return what it has said."""
        assert self._nodes[node].wait(END_S) == 0, self.said(node)
        return self.said(node)

    def close(self) -> None:
        for node, process in enumerate(self._nodes):
            self.kill_node(node)
            process.wait()

    def _output(self, node: int) -> Path:
        return self._directory / f"output{node}.txt"


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start jobs of two nodes, each in a directory of its own."""
    jobs: list[Job] = []

    def started(name: str, nodes: str, *settings: str) -> Job:
        (tmp_path / name).mkdir()
        job = Job(tmp_path / name, nodes, *settings)
        jobs.append(job)
        for _ in range(2):
            job.start_node()
        return job

    yield started
    for job in jobs:
        job.close()


def first_step(said: str) -> int:
    return int(re.findall(r"Step (\d+)", said)[0])


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_lost_node_leaves_a_smaller_world_that_goes_on(start: Start) -> None:
    job = start("lost", "1:2", "engine.elastic=true")
    job.wait_for(KILL_AFTER)
    job.kill_node(1)
    said = job.end(0)
    assert re.search(r"rank \d is gone|on 1 rank", said), said
    assert "Finished after 25 epochs" in said, said
    assert first_step(said.split("gloo on 1 rank")[1]) > 40, "it went on, and did not begin anew"
