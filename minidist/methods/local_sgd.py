"""Local SGD: replicas take steps of their own, and are averaged every so many steps.

Stich, "Local SGD Converges Fast and Communicates Little" (2019); Lin et al., "Don't Use Large Mini-Batches, Use Local
SGD" (2020), with the post-local form, which begins as plain data parallelism::

    local         . . . x . . . x . . . x      x: the mean of the parameters, one all-reduce of M bytes
    post-local    g g g g g . . . x . . . x    g: the mean of the gradients, in every step

With a period of 1 and plain SGD the mean of the parameters is a step along the mean of the gradients: that of
`DistributedDataParallel`, bit for bit as far as nothing is rounded, and to rounding elsewhere.
"""

from __future__ import annotations

from typing import Any

from minidist.communicator import ReduceOp
from minidist.methods.local import LocalMethod, ensure_count


class LocalSGD(LocalMethod):
    """Average the replicas after every ``period`` steps, at which they are bit-identical; M / period bytes per step.

    What is shown is the mean at that moment: one more all-reduce, unless the replicas are the same.

    Args:
        period: optimizer steps between two averages (H).
        local_after: steps before the first local one, in which the gradients of all ranks are averaged instead.
        ranks_per_worker: ranks that average their gradients in every step.
    """

    def __init__(self, period: int = 8, local_after: int = 0, ranks_per_worker: int = 1) -> None:
        super().__init__(ranks_per_worker=ranks_per_worker)
        ensure_count("LocalSGD", "period", period, 1)
        ensure_count("LocalSGD", "local_after", local_after, 0)
        if local_after and ranks_per_worker > 1:
            raise ValueError(
                f"LocalSGD: local_after={local_after} averages the gradients of all ranks, and ranks_per_worker="
                f"{ranks_per_worker} those of a worker; leave out one of them"
            )
        self.period = period
        self.local_after = local_after
        self._agree = True

    @property
    def uses_hook(self) -> bool:
        return super().uses_hook or self.local_after > 0

    def averages_gradients(self, step: int) -> bool:
        return super().averages_gradients(step) or step <= self.local_after

    def begin_anew(self) -> None:
        self._agree = True

    def _exchange(self, step: int) -> None:
        num_local = step - self.local_after
        self._agree = num_local <= 0 or num_local % self.period == 0
        if self._agree and num_local > 0:
            self._average()

    def _write_shared(self) -> None:
        if not self._agree:
            self._average()

    def _average(self) -> None:
        for piece in self.pieces:
            share = piece.read()
            self.comm.all_reduce(share, ReduceOp.AVG)
            piece.write(share)

    def _state(self) -> dict[str, Any]:
        return {"agree": self._agree}

    def _load(self, state: dict[str, Any]) -> None:
        self._agree = state["agree"]
