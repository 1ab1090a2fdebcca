"""Two nodes of torchrun of which one loses its rank, or is lost: the job goes on, with another one or without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.fork_server import ROOT
from tests.ports import free_port

START_S = 150.0
END_S = 250.0
KILL_AFTER = "Step 60"
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Each world has a store of its own, which a new agent can learn of."""


class Job:
    """Two nodes of one rank, each an agent of torchrun on this machine.

    Args:
        directory: what it writes into.
        nodes: how many there have to be, as torchrun has it.
        settings: of the training.
        epochs: how long it trains.
        first_is_rank_0: whether that is the rank of the first node, or of the last one; agents sort their addresses.
        environ: what else is in the environment of the agents.
    """

    def __init__(
        self,
        directory: Path,
        nodes: str,
        *settings: str,
        epochs: int = 10,
        first_is_rank_0: bool = True,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._directory = directory
        self._environ = {**os.environ, **(environ or {})}
        self._sign = 1 if first_is_rank_0 else -1
        values = {"engine.epochs": epochs, "engine.checkpoint_every_steps": 5, "engine.log_every": 20}
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
        agent += ["--nproc-per-node=1", "--max-restarts=3"]
        self._arguments = [*agent, *map(str, training)]
        self._nodes: list[subprocess.Popen[bytes]] = []

    def start_node(self) -> None:
        """Start the next node; the first one is where all meet."""
        number = len(self._nodes)
        own = [
            f"--rdzv-conf=is_host={int(number == 0)},last_call_timeout=10",
            f"--local-addr=127.0.0.{5 + self._sign * number}",
        ]
        command = [sys.executable, "-m", "torch.distributed.run", *own, *self._arguments]
        with self._output(number).open("w") as output:
            streams = {"stdout": output, "stderr": output}
            node = subprocess.Popen(command, cwd=self._directory, env=self._environ, start_new_session=True, **streams)
        self._nodes.append(node)

    def said(self, node: int) -> str:
        return self._output(node).read_text()

    def wait_for(self, text: str) -> None:
        until = time.monotonic() + START_S
        while not any(text in self.said(node) for node in range(len(self._nodes))):
            assert time.monotonic() < until, [self.said(node) for node in range(len(self._nodes))]
            time.sleep(0.1)

    def kill_rank(self, node: int) -> None:
        """End the rank of a node, at once."""
        (rank,) = psutil.Process(self._nodes[node].pid).children()
        rank.kill()

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

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return those of the last checkpoint."""
        newest = max(self._directory.glob("outputs/*/checkpoints/step_*.pt"), key=lambda path: path.name)
        return torch.load(newest, weights_only=True)["shared"]["model"]

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

    def started(name: str, *arguments: Any, **options: Any) -> Job:
        (tmp_path / name).mkdir(exist_ok=True)
        job = Job(tmp_path / name, *arguments, **options)
        jobs.append(job)
        for _ in range(2):
            job.start_node()
        return job

    yield started
    for job in jobs:
        job.close()


def first_step(said: str) -> int:
    return int(re.findall(r"Step (\d+)", said)[0])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The parameters that nobody disturbed."""
    job = Job(tmp_path_factory.mktemp("straight"), "2")
    try:
        for _ in range(2):
            job.start_node()
        for node in range(2):
            job.end(node)
        return job.parameters()
    finally:
        job.close()


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_lost_node_leaves_a_smaller_world_that_goes_on(start: Start) -> None:
    job = start("lost", "1:2", "engine.elastic=true")
    job.wait_for(KILL_AFTER)
    job.kill_node(1)
    said = job.end(0)
    assert re.search(r"rank \d is gone|on 1 rank", said), said
    assert "Finished after 10 epochs" in said, said
    assert first_step(said.split("gloo on 1 rank")[1]) > 40, "it went on, and did not begin anew"


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_is_started_again_on_both_nodes(
    victim: int, start: Start, expected: dict[str, torch.Tensor]
) -> None:
    """Though only the agent of the lost rank counts a restart."""
    job = start("rank", "2")
    job.wait_for(KILL_AFTER)
    job.kill_rank(victim)
    said = [job.end(node) for node in range(2)]
    assert first_step(said[0].split("gloo on 2 ranks")[2]) > 40, said
    check_same(job.parameters(), expected)


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("first_is_rank_0", [True, False], ids=["rank_1", "rank_0"])
def test_a_lost_node_is_replaced(first_is_rank_0: bool, start: Start, expected: dict[str, torch.Tensor]) -> None:
    job = start("replaced", "2", first_is_rank_0=first_is_rank_0, environ=OWN_STORE)
    job.wait_for(KILL_AFTER)
    job.kill_node(1)
    job.start_node()
    said = job.end(0) + job.end(2)
    assert first_step(said.split("gloo on 2 ranks")[-1]) > 40, said
    check_same(job.parameters(), expected)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_world_that_has_lost_a_node_grows_again(start: Start) -> None:
    job = start("grown", "1:2", "engine.elastic=true", epochs=25, environ=OWN_STORE)
    job.wait_for(KILL_AFTER)
    job.kill_node(1)
    job.wait_for("gloo on 1 rank ")
    job.start_node()
    said = job.end(0)
    assert re.findall(r"gloo on (\d) rank", said) == ["2", "1", "2"], said
    assert "Finished after 25 epochs" in said, said
    job.end(2)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_nodes_that_are_started_anew_go_on(start: Start, expected: dict[str, torch.Tensor]) -> None:
    lost = start("both", "2")
    lost.wait_for(KILL_AFTER)
    lost.close()
    job = start("both", "2")
    said = [job.end(node) for node in range(2)]
    assert first_step(said[0]) > 40, said
    check_same(job.parameters(), expected)
