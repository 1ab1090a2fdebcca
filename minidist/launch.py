"""Who am I? Reads what the launcher says about this process; how ranks meet is in backends/processes/rendezvous.py."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class World:
    """This process among those that were started together.

    Attributes:
        launcher: torchrun, openmpi, mpich, slurm, or alone.
        rank, world_size: place and number of all processes.
        local_rank, local_world_size: place and number of the processes on this host.
        restarts: how often the launcher has started this world again after a failure.
        knows_host: whether local_rank and local_world_size are known; torch's mp.spawn, for one, says nothing of them,
            and then the ranks have to find out when they meet.
    """

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    restarts: int = 0
    knows_host: bool = field(default=True, compare=False)

    @property
    def by_mpi(self) -> bool:
        """Whether an mpirun started it, so that MPI can be used."""
        return self.launcher in ("openmpi", "mpich")


# launcher: the variables of rank, world size, local rank, local world size, restarts. The order matters:
# under srun or a shell of a job the outer launcher's variables are there too.
_VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}

# What of a world of one rank says that a launcher was used: RANK and WORLD_SIZE may be left over in a shell, Slurm's
# PMI sets rank and size in each of its steps, and a step of one task is what `srun --pty bash` is.
_STARTED_ON_PURPOSE: dict[str, tuple[str, ...]] = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "LOCAL_RANK"),
    "openmpi": ("OMPI_COMM_WORLD_RANK",),
    "mpich": ("MPI_LOCALRANKID",),
    "slurm": (),
}


def detect(environ: Mapping[str, str] = os.environ) -> World:
    """Return who this process is, from the environment that its launcher set; alone without one.

    A shell or a notebook in a job looks like a world of one rank, though nobody launched ranks: of such a world the
    launcher has to have left more than its rank and size.
    """
    for launcher, (rank, size, *others) in _VARIABLES.items():
        if rank in environ and size in environ:
            if _number(environ[size]) == 1 and not any(name in environ for name in _STARTED_ON_PURPOSE[launcher]):
                continue
            fields = ("rank", "world_size", "local_rank", "local_world_size", "restarts")
            names = dict(zip(fields, (rank, size, *others), strict=False))
            values = {field: _number(environ[name]) for field, name in names.items() if name in environ}
            knows_host = {"local_rank", "local_world_size"} <= values.keys() or values["world_size"] == 1
            return World(launcher, **values, knows_host=knows_host)
    return World("alone")


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` without what `detect` reads: for ranks that are started anew from here."""
    names = {name for names in _VARIABLES.values() for name in names}
    return {name: value for name, value in environ.items() if name not in names}


def counted_ranks(count: int) -> str:
    """Return a number of ranks in words: ``1 rank``, ``2 ranks``."""
    return f"{count} rank" if count == 1 else f"{count} ranks"


def host_id() -> str:
    """Return what is the same for processes that share a host, and another for those of two hosts or containers."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot_id.read_text().strip() if boot_id.exists() else ''}"


def located(world: World, hosts: Sequence[str]) -> World:
    """Return ``world`` with its place on its host, by the hosts of all ranks."""
    here = [rank for rank, host in enumerate(hosts) if host == hosts[world.rank]]
    return replace(world, local_rank=here.index(world.rank), local_world_size=len(here), knows_host=True)


def own_address(host: str) -> str:
    """Return the address of this host by which it reaches ``host``."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing: it only chooses a route
        return str(probe.getsockname()[0])


def _number(value: str) -> int:
    """Return the first number: Slurm writes "4(x2),3" for the tasks per node, and it is near enough."""
    return int(value.split("(")[0].split(",")[0])
