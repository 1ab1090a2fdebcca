"""A rank that is killed while several processes train: they end by its name, and a restart ends with the same bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.test_commands import MNIST, TINY, only_run, run, started

LONGER = (
    *TINY,
    "model=cnn",  # with dropout
    "model.width=8",
    "engine.epochs=3",
    "engine.log_every=1",
    "engine.checkpoint_every_steps=2",
)
TORCHRUN = ("torchrun", "--nproc-per-node=2", "--max-restarts=1")
pytestmark = pytest.mark.timeout(300)


def kill_rank(launcher_pid: int, rank: int) -> None:
    """End the process of ``rank`` that the launcher started."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (process / "environ").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if parent == launcher_pid and f"RANK={rank}" in variables:
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError(f"rank {rank} is not there")


def last_parameters(directory: Path) -> dict[str, torch.Tensor]:
    newest = max((only_run(directory) / "checkpoints").glob("step_*.pt"))
    return torch.load(newest, weights_only=True)["shared"]["model"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The parameters that nobody interrupted."""
    directory = tmp_path_factory.mktemp("straight")
    done = run(directory, *TORCHRUN, MNIST, "comm=ring", *LONGER)
    assert done.returncode == 0, done.stderr
    return last_parameters(directory)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_restarted_ranks_end_with_the_same_bits(victim: int, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with started(tmp_path, *TORCHRUN, MNIST, "comm=ring", *LONGER) as process:
        assert process.stdout is not None
        assert any("Step 8 " in line for line in process.stdout), "it ended before step 8"
        kill_rank(process.pid, victim)
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "Step 1 " not in output, f"it began again instead of going on:\n{output}"
    found = last_parameters(tmp_path)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
