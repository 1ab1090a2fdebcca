"""Who a process is, from the environment of every launcher."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from minidist.launch import World, counted_ranks, detect, host_id, located, own_address, without_launcher
from tests.harness import run_command, run_forked
from tests.ports import free_port

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_PROCID": "6",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_LOCALID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
}
SHELL_OF_SLURM = {
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
"""What ``srun --pty bash`` or a notebook on a node finds."""


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, World("alone", 0, 1, 0, 1)),
        (TORCHRUN, World("torchrun", 5, 8, 1, 4, restarts=2)),
        (OPENMPI, World("openmpi", 3, 4, 1, 2)),
        (MPICH, World("mpich", 1, 2, 1, 2)),
        (SLURM, World("slurm", 6, 11, 2, 4)),
        ({**SLURM, **TORCHRUN}, World("torchrun", 5, 8, 1, 4, restarts=2)),
        ({**SLURM, **MPICH}, World("mpich", 1, 2, 1, 2)),
        ({"RANK": "1"}, World("alone")),
        (SHELL_OF_SLURM, World("alone")),
        ({**SHELL_OF_SLURM, "PMI_RANK": "0", "PMI_SIZE": "1"}, World("alone")),
        ({**SHELL_OF_SLURM, **TORCHRUN}, World("torchrun", 5, 8, 1, 4, restarts=2)),
        ({**SHELL_OF_SLURM, **MPICH}, World("mpich", 1, 2, 1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}, World("alone")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, World("alone")),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, World("torchrun", 0, 1, 1, 4, restarts=2)),
        ({**MPICH, "PMI_RANK": "0", "PMI_SIZE": "1"}, World("mpich", 0, 1, 1, 2)),
        ({**OPENMPI, "OMPI_COMM_WORLD_SIZE": "1"}, World("openmpi", 3, 1, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, World("torchrun", 1, 2)),
    ],
    ids=[
        *("alone", "torchrun", "openmpi", "mpich", "slurm", "torchrun-in-slurm", "mpich-in-slurm", "half"),
        *("shell-in-slurm", "shell-in-slurm-with-pmi", "torchrun-in-shell", "mpich-in-shell", "script-of-sbatch"),
        *("left-over", "torchrun-of-one", "mpich-of-one", "openmpi-of-one", "by-hand"),
    ],
)
def test_detect(environ: dict[str, str], world: World) -> None:
    assert detect(environ) == world


def test_one_rank_is_not_spelled_as_many() -> None:
    assert [counted_ranks(count) for count in (1, 2, 64)] == ["1 rank", "2 ranks", "64 ranks"]


def test_only_an_mpirun_brings_mpi() -> None:
    launchers = {detect(environ).launcher: detect(environ).by_mpi for environ in ({}, TORCHRUN, OPENMPI, MPICH, SLURM)}
    assert launchers == {"alone": False, "torchrun": False, "openmpi": True, "mpich": True, "slurm": False}


@pytest.mark.parametrize("environ", [TORCHRUN, OPENMPI, MPICH, SLURM, SHELL_OF_SLURM])
def test_ranks_started_from_here_see_nothing_of_this_world(environ: dict[str, str]) -> None:
    assert without_launcher({**environ, "SLURM_JOB_ID": "7"}) == {"SLURM_JOB_ID": "7"}


# What the launcher leaves out ---------------------------------------------------------------------


def spawned(what: str, address: str, tmp_path: Path, how: str = "fork") -> str:
    arguments, output_file = (what, address, how), tmp_path / "output.txt"
    returncode, output = run_forked("tests.spawned_ranks", *arguments, world_size=None, output=output_file, limit_s=60)
    assert returncode == 0, output
    return output


def test_what_the_launcher_says_of_the_host_is_known() -> None:
    by_hand = {"RANK": "1", "WORLD_SIZE": "2"}
    for environ, known in (({}, True), (TORCHRUN, True), (OPENMPI, True), (MPICH, True), (SLURM, True)):
        assert detect(environ).knows_host is known
    for given in ({}, {"LOCAL_RANK": "1"}, {"LOCAL_WORLD_SIZE": "2"}):
        assert not detect({**by_hand, **given}).knows_host
    assert detect({"RANK": "0", "WORLD_SIZE": "1"}).knows_host


def test_ranks_are_located_by_their_hosts() -> None:
    world = located(World("torchrun", 3, 5, knows_host=False), ["a", "b", "a", "b", "b"])
    assert (world.local_rank, world.local_world_size, world.knows_host) == (1, 3, True)
    assert host_id() == host_id() != ""


@pytest.mark.parametrize(("what", "how"), [("shm", "spawn"), ("gloo", "fork"), ("two_level", "fork")])
def test_spawned_ranks_find_out_that_they_share_a_host(what: str, how: str, tmp_path: Path) -> None:
    output = spawned(what, "127.0.0.1", tmp_path, how)
    for rank in range(2):
        assert f"sum 4.0 rank {rank} of 2 here" in output, output


def test_spawned_ranks_of_several_hosts_are_refused_by_shm(tmp_path: Path) -> None:
    output = spawned("apart", "127.0.0.1", tmp_path)
    for rank in range(2):
        assert f"rank {rank}: shm joins the ranks of one host, but of these 2 ranks only 1 are on this one" in output


def test_a_spawned_rank_that_does_not_come_is_named_in_time(tmp_path: Path) -> None:
    assert "rank 0: [rank 0] ranks [1] did not come within 1 s" in spawned("one_missing", "127.0.0.1", tmp_path)


def test_ranks_that_are_started_again_meet_whatever_their_agents_count(tmp_path: Path) -> None:
    """And find nothing of the earlier ones in the agents' store, such as the hosts that they were on."""
    output = spawned("restarted", "127.0.0.1", tmp_path)
    for rank in range(2):
        assert f"sum 4.0 rank {rank} of 2 here" in output, output


# IPv6 ---------------------------------------------------------------------------------------------


def has_ipv6_loopback() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


ipv6 = pytest.mark.skipif(not has_ipv6_loopback(), reason="this machine has no IPv6 loopback address, ::1")


@ipv6
@pytest.mark.parametrize(("what", "address"), [("shm", "::1"), ("gloo", "[::1]")])
def test_ranks_meet_at_an_ipv6_address(what: str, address: str, tmp_path: Path) -> None:
    assert spawned(what, address, tmp_path).count("sum 4.0") == 2


@ipv6
@pytest.mark.parametrize(
    "options",
    [["--master-addr=::1", "--master-port={port}"], ["--rdzv-backend=c10d", "--rdzv-endpoint=[::1]:{port}"]],
    ids=["master-addr", "rdzv-endpoint"],
)
def test_torchrun_meets_at_an_ipv6_address(options: list[str], tmp_path: Path) -> None:
    port = free_port()
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    start += [option.format(port=port) for option in options]
    arguments = [*start, "-m", "tests.fork_ranks", "gloo", "exit_in_a_fork"]
    returncode, output = run_command(arguments, tmp_path / "output.txt", 60)
    assert returncode == 0, output
    assert output.count("untouched") == 2, output


@ipv6
def test_the_own_address_is_of_the_kind_of_the_other() -> None:
    assert [own_address(host) for host in ("::1", "127.0.0.1")] == ["::1", "127.0.0.1"]
