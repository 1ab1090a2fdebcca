"""Which of two paths the collectives of shared memory take: compiled kernels, or torch's operations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from backends.shm.arena import Arena
from backends.shm.by_torch import TorchCollectives
from backends.shm.compiled import loading
from backends.shm.compiled.collectives import CompiledCollectives
from backends.shm.compiled.loading import Kernels
from backends.shm.compiled.wholes import Whole
from backends.shm.roles import Call
from minidist.collective import Run
from minidist.communicator import ReduceOp
from minidist.errors import BackendUnavailableError
from minidist.schedule import Schedule

KERNELS = ("auto", "compiled", "torch")
INSTALL = "pip install minidist[fast]"
log = logging.getLogger(__name__)


class Collectives(Protocol):
    """All collectives of one rank, on 1-d tensors; each ends within ``timeout_s``."""

    def all_reduce(self, flat: Tensor, op: ReduceOp, timeout_s: float) -> None:
        """Combine the tensors of all ranks, in place."""

    def share(self, call: Call, timeout_s: float) -> None:
        """Run any other collective."""

    def barrier(self, timeout_s: float) -> None:
        """Meet."""

    def whole(self, schedule: Schedule, run: Run, numel: int, dtype: torch.dtype, channel: int) -> Whole | None:
        """Return a schedule on tensors of a shape as what `run_whole` takes; None if it has to run over messages."""

    def run_whole(self, whole: Whole, regions: Sequence[Tensor], op: ReduceOp, timeout_s: float) -> None:
        """Run a schedule, on memory as backends/executor/layout.py has it."""

    def without_meetings(self, tensor: Tensor, timeout_s: float) -> Callable[[], None]:
        """Return what an all-reduce in place does on ``tensor`` between its meetings; all ranks call it."""
        ...


def chosen(kernels: str) -> Kernels | None:
    """Return the compiled kernels, None where this rank goes without.

    Raises:
        ValueError: there is no such choice.
        BackendUnavailableError: they are asked for, and numba is not installed.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
    if kernels == "torch":
        return None
    if loading.is_installed():
        return loading.kernels()
    if kernels == "compiled":
        raise BackendUnavailableError(f"kernels=compiled needs numba; {INSTALL}, or use kernels=auto")
    return None


def collectives(arena: Arena, kernels: Kernels | None, wanted: str) -> Collectives:
    """Return the collectives of a rank on the path that all ranks of ``arena`` can take; ``wanted`` as in `chosen`.

    Raises:
        BackendUnavailableError: compiled kernels are asked for, and another rank has none.
    """
    if kernels is not None and arena.compiled:
        return CompiledCollectives(arena, kernels)
    if wanted == "compiled":
        raise BackendUnavailableError("kernels=compiled, but another rank has no numba or kernels=torch; set all alike")
    if wanted == "auto" and arena.rank == 0:
        log.info("shm runs on torch's operations, as not all ranks have numba; %s for its faster kernels", INSTALL)
    return TorchCollectives(arena)
