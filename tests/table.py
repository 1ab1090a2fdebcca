"""The communicators that the conformance suite runs on: a new backend is one row."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType

from backends.checked import CheckedCommunicator
from backends.hierarchical import HierarchicalCommunicator
from backends.paced import PacedCommunicator
from backends.ring import RingCommunicator
from backends.shm import ShmCommunicator
from backends.thread import ThreadCommunicator
from backends.virtual import VirtualCommunicator
from minidist.analysis.network import Flat
from minidist.communicator import Communicator
from tests import (
    conformance,
    conformance_faults,
    conformance_order,
    conformance_sources,
    conformance_training,
    zoo,
)
from tests.inputs import Needs

MODULES: tuple[ModuleType, ...] = (
    conformance,
    conformance_order,
    conformance_sources,
    conformance_training,
    conformance_faults,
)
CHECKS: dict[str, Callable[..., None]] = {
    name: check for module in MODULES for name, check in vars(module).items() if name.startswith("check_")
}


def needs_of(check: str) -> Needs:
    """Return what the check of this name asks for."""
    return getattr(CHECKS[check], "needs", Needs())


@dataclass(frozen=True)
class Row:
    """A communicator under test.

    Attributes:
        name: as it stands in the names of the tests.
        make: dotted path of what makes it, called without arguments on every rank.
        launcher: torchrun, mpirun, thread, or none for one rank that nobody starts.
        lacks: a part of the names of checks that it cannot pass, with the reason.
        focus: parts of the names of the checks that are not slow for it; all, if empty.
    """

    name: str
    make: str
    launcher: str
    lacks: Mapping[str, str] = field(default_factory=dict)
    focus: Sequence[str] = ()

    def missing(self, check: str) -> str | None:
        """Return why the check is not for this communicator, or None."""
        return next((why for part, why in self.lacks.items() if part in check), None)


CHECKED = ("all_reduce_values", "reduce_scatter_values", "gather_object", "split", "random_program", "training_mlp")
CHECKED_LACKS = {"traffic": "what ranks compare is counted too"}
HIERARCHICAL = ("all_reduce_values", "reduce_scatter_values", "all_gather_values", "random_program", "training_mlp")
PACED = (*HIERARCHICAL, "split", "messages_keep", "any_source_and", "timeout_of_recv")
ONE_PROCESS = dict.fromkeys(("killed_rank", "exiting_rank"), "its ranks share a process")

ROWS = (
    Row("serial", "backends.serial.SerialCommunicator", "none"),
    Row("thread", "backends.thread.ThreadCommunicator", "thread", ONE_PROCESS),
    Row("ring-thread", "tests.table.ring_over_thread", "thread", ONE_PROCESS),
    Row(
        "group-of-thread",
        "tests.table.group_of_thread",
        "thread",
        {
            **ONE_PROCESS,
            "leaving_rank": "closing a group leaves its parent, whose ranks are all there, as it is",
            "training": "it runs the same schedules as its parent, the row thread",
        },
    ),
    Row("hierarchical-thread", "tests.table.hierarchical_over_thread", "thread", ONE_PROCESS, HIERARCHICAL),
    Row("hierarchical", "tests.table.hierarchical_over_shm_and_ring", "torchrun", focus=HIERARCHICAL),
    Row("paced-thread", "tests.table.paced_over_thread", "thread", ONE_PROCESS, PACED),
    Row(
        "virtual",
        "tests.table.virtual",
        "thread",
        ONE_PROCESS,
        (*PACED, "traffic", "mismatch", "async", "rank_is_named"),
    ),
    Row("ring-virtual", "tests.table.ring_over_virtual", "thread", ONE_PROCESS, PACED),
    Row("paced-shm", "tests.table.paced_over_shm", "torchrun", focus=("random_program",)),
    Row("gloo", "backends.torch_dist.GlooCommunicator", "torchrun"),
    Row("ring-gloo", "tests.table.ring_over_gloo", "torchrun"),
    Row("mpi", "backends.mpi.MpiCommunicator", "mpirun"),
    Row("ring-mpi", "tests.table.ring_over_mpi", "mpirun"),
    Row("shm", "backends.shm.ShmCommunicator", "torchrun"),
    Row("shm-torch", "tests.table.shm_by_torch", "torchrun"),
    Row("ring-shm", "tests.table.ring_over_shm", "torchrun"),
    Row("checked-thread", "tests.table.checked_over_thread", "thread", ONE_PROCESS | CHECKED_LACKS, CHECKED),
    Row("checked-gloo", "tests.table.checked_over_gloo", "torchrun", CHECKED_LACKS, CHECKED[:2]),
    Row("checked-shm", "tests.table.checked_over_shm", "torchrun", CHECKED_LACKS, CHECKED[:2]),
    *(
        Row(f"{name}-{transport}", f"{name}/{transport}", launcher, lacks, (*zoo.collectives(name), "random_program"))
        for transport, launcher, lacks in (("thread", "thread", ONE_PROCESS), ("shm", "torchrun", {}))
        for name in zoo.ALGORITHMS
        if name != "ring"
    ),
    Row("shm-mpirun", "backends.shm.ShmCommunicator", "mpirun"),
    Row("ring-shm-mpirun", "tests.table.ring_over_shm", "mpirun"),
)


def made_by(path: str) -> Callable[[], Communicator]:
    """Return what a dotted path names, or what makes the communicator of ``algorithm/transport``."""
    if "/" in path:
        return partial(zoo.make, path)
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def ring_over_thread() -> Communicator:
    return RingCommunicator(ThreadCommunicator())


def ring_over_gloo() -> Communicator:
    return RingCommunicator(made_by("backends.torch_dist.GlooCommunicator")())


def ring_over_mpi() -> Communicator:
    return RingCommunicator(made_by("backends.mpi.MpiCommunicator")())


def ring_over_shm() -> Communicator:
    return RingCommunicator(made_by("backends.shm.ShmCommunicator")())


def checked_over_thread() -> Communicator:
    return CheckedCommunicator(ThreadCommunicator())


def checked_over_gloo() -> Communicator:
    return CheckedCommunicator(made_by("backends.torch_dist.GlooCommunicator")())


def checked_over_shm() -> Communicator:
    return CheckedCommunicator(made_by("backends.shm.ShmCommunicator")())


def hierarchical_over_thread() -> Communicator:
    """Return hosts of two, and one of one where the ranks are odd in number; they take turns."""
    transport = ThreadCommunicator()
    return HierarchicalCommunicator(None, transport, host=str(transport.rank % ((transport.world_size + 1) // 2)))


def hierarchical_over_shm_and_ring() -> Communicator:
    inter = ring_over_gloo()
    return HierarchicalCommunicator(made_by("backends.shm.ShmCommunicator"), inter, host=str(inter.rank // 2))


def shm_by_torch() -> Communicator:
    return ShmCommunicator(kernels="torch")


def paced_over_thread() -> Communicator:
    return PacedCommunicator(ThreadCommunicator(), Flat(alpha=1e-6, beta=1e-12), jitter=1.0)


def paced_over_shm() -> Communicator:
    return PacedCommunicator(ShmCommunicator(), Flat(alpha=1e-6, beta=1e-12))


def virtual() -> Communicator:
    return VirtualCommunicator(Flat(alpha=1e-3, beta=1e-6))


def ring_over_virtual() -> Communicator:
    return RingCommunicator(virtual())


def group_of_thread() -> Communicator:
    """Return all ranks in another order, so that a rank of the group is another one of its parent."""
    parent = ThreadCommunicator()
    return parent.split(0, key=-parent.rank)
