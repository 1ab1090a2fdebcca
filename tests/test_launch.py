"""Who a process is, from the environment of every launcher."""

from __future__ import annotations

import pytest

from minidist.launch import World, detect, without_launcher

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


def test_only_an_mpirun_brings_mpi() -> None:
    launchers = {detect(environ).launcher: detect(environ).by_mpi for environ in ({}, TORCHRUN, OPENMPI, MPICH, SLURM)}
    assert launchers == {"alone": False, "torchrun": False, "openmpi": True, "mpich": True, "slurm": False}


@pytest.mark.parametrize("environ", [TORCHRUN, OPENMPI, MPICH, SLURM, SHELL_OF_SLURM])
def test_ranks_started_from_here_see_nothing_of_this_world(environ: dict[str, str]) -> None:
    assert without_launcher({**environ, "SLURM_JOB_ID": "7"}) == {"SLURM_JOB_ID": "7"}
