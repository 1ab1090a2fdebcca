"""Processes that a rank forks, such as the workers of a DataLoader: what is its own they leave alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minidist.contract.forks import Living, Maker, only_here
from minidist.errors import CommError
from tests.conformance_faults import in_a_fork
from tests.harness import command, run_command, run_forked


def run_ranks(kind: str, what: str, tmp_path: Path, world_size: int | None = 2) -> tuple[int | None, str]:
    """Run a function of tests/fork_ranks.py on every rank; return how they ended, and what they wrote."""
    output, environment = tmp_path / "output.txt", {"REPORT": str(tmp_path)}
    return run_forked(
        "tests.fork_ranks", kind, what, world_size=world_size, output=output, limit_s=100, environment=environment
    )


def test_what_is_registered_acts_in_its_own_process_only(tmp_path: Path) -> None:
    touch = only_here(lambda name: (tmp_path / name).touch())
    assert in_a_fork(lambda: touch("fork")) == 0
    touch("here")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_maker_knows_its_forks() -> None:
    maker = Maker("[rank 0/2] ")
    maker.ensure_here("barrier")

    def refused() -> None:
        assert not maker.is_here
        with pytest.raises(
            CommError, match=r"\[rank 0/2\] barrier: this process \(\d+\) was forked from the rank's own"
        ):
            maker.ensure_here("barrier")

    assert in_a_fork(refused) == 0


def test_a_fork_begins_without_what_lives_in_its_parent() -> None:
    inherited: list[torch.Tensor] = []
    living, things = Living(inherited.append), [torch.ones(1), torch.ones(2)]
    for thing in things:
        living.add(thing)

    def begins_anew() -> None:
        assert living.all() == []
        assert len(inherited) == 2
        living.add(things[0])
        assert len(living.all()) == 1

    assert in_a_fork(begins_anew) == 0
    assert len(living.all()) == 2
    assert inherited == []


def run_to_the_end(launcher: str, world_size: int, kind: str, tmp_path: Path) -> tuple[int | None, str]:
    """Let every rank fork and exit, as processes of their own: what the interpreter does at its end is the point."""
    arguments = command(launcher, world_size, "-m", "tests.fork_ranks", kind, "exit_in_a_fork")
    return run_command(arguments, tmp_path / "output.txt", 100)


# Over Gloo by default in test_launch.py, at an IPv6 address.
@pytest.mark.parametrize("kind", ["shm", pytest.param("gloo", marks=pytest.mark.slow)])
def test_a_fork_that_drops_all_and_ends_leaves_its_parent_as_it_was(kind: str, tmp_path: Path) -> None:
    returncode, output = run_to_the_end("torchrun", 2, kind, tmp_path)
    assert returncode == 0, output
    assert output.count("untouched") == 2, output


def test_a_fork_of_one_rank_alone_ends(tmp_path: Path) -> None:
    returncode, output = run_to_the_end("none", 1, "gloo", tmp_path)
    assert (returncode, output.count("untouched")) == (0, 1), output


def test_a_fork_cannot_join_in_the_place_of_its_parent(tmp_path: Path) -> None:
    returncode, output = run_ranks("gloo", "join_from_a_fork", tmp_path)
    assert returncode == 0, output
    assert output.count("was forked from the rank's own") == 2, output
    assert output.count("statuses [0]") == 2, output


def test_forks_that_are_ranks_of_another_world_meet(tmp_path: Path) -> None:
    returncode, output = run_ranks("gloo", "found_a_world_of_forks", tmp_path, world_size=None)
    assert returncode == 0, output
    assert output.count("sum of two") == 2, output
    assert "statuses [0, 0]" in output, output


@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_a_killed_rank_is_named_while_its_workers_are_busy(kind: str, tmp_path: Path) -> None:
    try:
        _, output = run_ranks(kind, "die_with_busy_workers", tmp_path, world_size=3)
    finally:
        for busy in tmp_path.glob("busy-*"):
            os.kill(int(busy.name.removeprefix("busy-")), signal.SIGKILL)
    assert output.count("named rank 1") == 2, output


GARBAGE = """
import gc, os
import minidist.contract.forks

class Thing:
    def __init__(self):
        self.itself = self
    def __del__(self):
        print("destroyed in", "the fork" if os.getpid() != parent else "its process", flush=True)

parent = os.getpid()
gc.disable()
Thing()
if os.fork() == 0:
    gc.collect()
    os._exit(0)
os.wait()
gc.collect()
"""


def test_garbage_at_the_fork_is_not_collected_there() -> None:
    """Its destructors would need threads, and act on connections, that are the parent's."""
    done = subprocess.run([sys.executable, "-c", GARBAGE], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "destroyed in its process\n"
