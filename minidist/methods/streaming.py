"""Streaming DiLoCo: a fragment of the model at a time, on its way while training goes on.

Douillard et al., "Streaming DiLoCo with Overlapping Communication" (2025). With a period of 6, 2 fragments and tau 1::

    step              1    2    3    4    5    6    7    8    9
    fragment 0                  o----x                        o----x      o: its pseudo-gradients leave
    fragment 1                                 o----x                     x: its outer step, tau later

A fragment takes part of its outer values, and keeps part of the steps that it took while they were on their way.
"""

from __future__ import annotations

from minidist.gradients.hooks import AllReduce, Hook
from minidist.methods.local import ensure_count
from minidist.methods.outer import OuterMethod


class StreamingDiLoCo(OuterMethod):
    """`DiLoCo` by fragments; M / period bytes per step, and never more than a fragment at once.

    The outer values of a fragment are bit-identical on all workers once it had its outer step; so are the replicas'
    with ``mixing`` 0. With one fragment, ``tau`` 0 and ``mixing`` 0 it is `DiLoCo`, bit for bit.

    Args:
        period: inner steps between two outer ones of a fragment (H).
        num_fragments: parts of about equal size, each of neighbouring parameters.
        tau: inner steps that are taken while the pseudo-gradients of a fragment are on their way, below ``period``.
        mixing: how much of its own a replica keeps, from 0 to below 1.
        outer_lr, outer_momentum: of the outer SGD.
        hook: how pseudo-gradients travel.
        ranks_per_worker: ranks that average their gradients in every step.
    """

    def __init__(
        self,
        period: int = 16,
        num_fragments: int = 4,
        tau: int = 2,
        mixing: float = 0.5,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        hook: Hook = AllReduce(),  # noqa: B008  (an AllReduce has no state)
        ranks_per_worker: int = 1,
    ) -> None:
        super().__init__(period, outer_lr, outer_momentum, hook, num_fragments, ranks_per_worker)
        ensure_count("StreamingDiLoCo", "tau", tau, 0)
        if tau >= period:
            raise ValueError(
                f"StreamingDiLoCo: tau must be below period, {period}, or a fragment would leave before it has come "
                f"back, got {tau}"
            )
        if not 0 <= mixing < 1:
            raise ValueError(f"StreamingDiLoCo: mixing must be at least 0 and below 1, got {mixing}")
        self.tau = tau
        self.mixing = mixing

    def _exchange(self, step: int) -> None:
        for outer in self.outers:
            if self._leaves(outer.piece.fragment, step):
                outer.start()
        for outer in self.outers:
            if outer.in_flight and self._leaves(outer.piece.fragment, step - self.tau):
                values = outer.finish()
                outer.piece.write(outer.piece.read().lerp_(values, 1 - self.mixing))

    def _leaves(self, fragment: int, step: int) -> bool:
        """Return whether a fragment leaves after a step: the last at the end of a period, the others evenly before."""
        return (step - (fragment + 1) * self.period // self.num_fragments) % self.period == 0
