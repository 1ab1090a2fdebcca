"""The communicators that the conformance suite runs on: a new backend is one row."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
        only: the number of ranks, if it runs on one alone, and then slowly.
    """

    name: str
    make: str
    launcher: str
    lacks: Mapping[str, str] = field(default_factory=dict)
    focus: Sequence[str] = ()
    only: int | None = None

    def missing(self, check: str) -> str | None:
        """Return why the check is not for this communicator, or None."""
        return next((why for part, why in self.lacks.items() if part in check), None)


CHECKED = "checked+"
"""Before the path of what makes a communicator: within a checked one."""
CHECKED_FOCUS = {
    "thread": (
        "all_reduce_values",
        "reduce_scatter_values",
        "gather_object",
        "split",
        "random_program",
        "training_mlp",
    ),
    **dict.fromkeys(("gloo", "shm"), ("all_reduce_values", "reduce_scatter_values")),
}
CHECKED_LACKS = {"traffic": "what ranks compare is counted too"}
HIERARCHICAL = ("all_reduce_values", "reduce_scatter_values", "all_gather_values", "random_program", "training_mlp")
PACED = (*HIERARCHICAL, "split", "messages_keep", "any_source_and", "timeout_of_recv")
SCHEDULED = ("all_reduce", "reduce_scatter_values", "messages_keep", "random_program", "timeout_of", "raising_rank")
"""Of what is checked in full in another form."""
ONE_PROCESS = dict.fromkeys(("killed_rank", "exiting_rank"), "its ranks share a process")

UNCHECKED = (
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
    Row("ring-mpi", "tests.table.ring_over_mpi", "mpirun", focus=(*SCHEDULED, "exiting_rank")),
    Row("shm", "backends.shm.ShmCommunicator", "torchrun"),
    Row(
        "shm-torch",
        "tests.table.shm_by_torch",
        "torchrun",
        focus=(*SCHEDULED, "all_gather", "objects", "any_source_of"),
    ),
    Row("ring-shm", "tests.table.ring_over_shm", "torchrun", focus=SCHEDULED),
    *(
        Row(f"{name}-{transport}", f"{name}/{transport}", launcher, lacks, (*focus(name), "random_program"))
        for transport, launcher, lacks, focus in (
            ("thread", "thread", ONE_PROCESS, zoo.collectives),
            ("shm", "torchrun", {}, lambda name: ()),
        )
        for name in zoo.ALGORITHMS
        if name != "ring"
    ),
    Row("shm-mpirun", "backends.shm.ShmCommunicator", "mpirun"),
    Row("ring-shm-mpirun", "tests.table.ring_over_shm", "mpirun"),
)


def checked(row: Row) -> Row:
    """Return the row of a communicator within a checked one: the whole suite, in which no right call is refused."""
    make, lacks = f"{CHECKED}{row.make}", {**row.lacks, **CHECKED_LACKS}
    if row.name in CHECKED_FOCUS:
        return replace(row, name=f"checked-{row.name}", make=make, lacks=lacks, focus=CHECKED_FOCUS[row.name])
    return replace(row, name=f"checked-{row.name}", make=make, lacks=lacks, only=3)


ROWS = (*UNCHECKED, *(checked(row) for row in UNCHECKED if row.name != "serial"))


def made_by(path: str) -> Callable[[], Communicator]:
    """Return what a dotted path names, or what makes ``algorithm/transport``; after `CHECKED`, within a checked one."""
    if path.startswith(CHECKED):
        make = made_by(path.removeprefix(CHECKED))
        return lambda: CheckedCommunicator(make())
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
